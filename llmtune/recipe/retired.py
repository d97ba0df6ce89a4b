"""Commands, options and values that earlier versions had, and what to use instead: the table of docs/retired.md."""

from __future__ import annotations

from llmtune.errors import LlmtuneError, RecipeError

FSDP = "Use --strategy fsdp: FSDP2 shards what ZeRO-3 shards."
RETIRED = {
    "--strategy zero2": FSDP,
    "--strategy zero3": FSDP,
    "--strategy deepspeed": FSDP,
    "--strategy tp": "Use --strategy fsdp, which shards every model over any number of processes.",
    "launch sky": "Run `sky jobs launch` with examples/launch/skypilot.yaml, which starts torchrun.",
    "launch kubernetes": "Run `kubectl create -f` with examples/launch/trainjob.yaml, which starts torchrun.",
    "doctor FOLDER": "Read trainer_state.json in the Trainer's folder. To train on from its adapter, set "
    "adapter.start_from to the folder.",
}
"""What was retired, as a user typed it, and a sentence that says what to use instead."""


def refuse_retired(name: str) -> LlmtuneError:
    """Return the error for a key of `RETIRED`."""
    return RecipeError.of(f"`{name}` was removed", "docs/retired.md", RETIRED[name])
