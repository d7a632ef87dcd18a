"""The one sampling engine."""
