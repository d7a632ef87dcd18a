"""What is in a corpus, measured and drawn."""
