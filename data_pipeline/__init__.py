"""From text of any kind to a frozen tokenizer and packed records."""
