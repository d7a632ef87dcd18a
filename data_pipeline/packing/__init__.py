"""From a corpus and a tokenizer to packed records."""
