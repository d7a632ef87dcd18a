"""Decontamination: training text that holds items of the evaluation sets in use is found, listed and dropped."""
