"""Duplicates over the whole corpus: which documents are copies, and of which older one that is kept."""
