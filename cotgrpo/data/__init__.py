"""From reasoning data to batches: triples (rows), template (tokens and masks), tokenizer, batches (shuffle, pack)."""
