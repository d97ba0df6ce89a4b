"""The tasks, one per file, and their registry."""
