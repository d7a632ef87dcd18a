"""Mixture files: what they may say, read strictly."""
