"""Step 4: the training loop, written out in full. Read `loop.py` first."""
