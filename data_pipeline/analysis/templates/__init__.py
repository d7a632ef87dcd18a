"""The analysis page: template and style."""
