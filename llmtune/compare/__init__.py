"""Compare runs on the same held-out rows: existing runs, or one recipe trained with several methods."""
