"""Step 5, first half: measure the effect of tuning on rows that training never saw."""
