"""Run folders, lineage and reports."""
