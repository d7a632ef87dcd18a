"""Packed data on the training side: record format, frozen tokenizers, mixtures, the loader."""
