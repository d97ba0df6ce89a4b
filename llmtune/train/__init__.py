"""Step 4: the training loop, in the open. Read `loop.py` first."""

from llmtune.train.loop import train

__all__ = ["train"]
