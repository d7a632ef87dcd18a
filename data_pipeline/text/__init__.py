"""Text as numbers: what every step that compares documents by their words shares."""
