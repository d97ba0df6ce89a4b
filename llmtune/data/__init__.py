"""Step 1: rows from any usual format, then encoded, masked, packed examples."""
