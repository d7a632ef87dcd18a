"""What all commands run on: processes, stages that do nothing twice, progress, YAML with line numbers."""
