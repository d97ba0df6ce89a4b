"""Step 5, first half: what the tuning did, measured on rows that training never saw."""
