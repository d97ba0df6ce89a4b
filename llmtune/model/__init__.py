"""Step 2: find, plan for, rank and load one model; its attention over packed rows and its loss."""

from llmtune.model import library_logging  # noqa: F401  # must be first: it mutes a library
