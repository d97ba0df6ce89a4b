"""The run folder: its files, their validity, and the origin of its numbers."""
