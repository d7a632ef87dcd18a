"""One small file per training objective."""
