"""Step 4: the training loop, in the open. Read `loop.py` first."""
