"""From reasoning data to batches: triples (rows), template and chat (tokens and masks), tokenizer, batches (shuffle, pack)."""
