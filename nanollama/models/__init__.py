"""Model declarations and their accounting."""
