"""From reasoning data to batches: rows, triples and questions, templates, tokenizer, packed batches, graded answers."""
