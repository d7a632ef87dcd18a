"""Weights to and from other formats: Hugging Face safetensors, GGUF."""
