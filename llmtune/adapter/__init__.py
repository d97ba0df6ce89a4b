"""Step 3: put adapters into a model, check their wiring, save them as plain PEFT folders, merge them in memory."""

import llmtune.model  # noqa: F401  # must be first: it mutes a library that PEFT imports
