"""What a tokenizer is trained on, and what it does to a corpus."""
