"""Runs side by side on the same held-out rows: runs that exist, or one recipe trained with several methods."""
