"""The report page: template, style, and the script that reads values off the charts."""
