"""Step 3: adapters put into a model, proven to be wired, saved as plain PEFT folders, merged in memory."""

import llmtune.model  # noqa: F401  # first: it mutes a library that PEFT imports
from llmtune.adapter.injection import describe, inject, trainable_parameters
from llmtune.adapter.load import find_adapter
from llmtune.adapter.merging import merge
from llmtune.adapter.saving import load_adapter, save_adapter

__all__ = ["describe", "find_adapter", "inject", "load_adapter", "merge", "save_adapter", "trainable_parameters"]
