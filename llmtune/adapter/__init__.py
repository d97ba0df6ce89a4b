"""Step 3: adapters put into a model, proven to be wired, saved as plain PEFT folders, merged in memory."""

import llmtune.model  # noqa: F401  # first: it mutes a library that PEFT imports
