"""Step 2: one model, found, planned for, ranked and loaded; its attention over packed rows and its loss."""

from llmtune.model import library_logging  # noqa: F401  # first: it mutes a library
