"""Step 5: measure the effect of tuning on rows that training never saw."""
