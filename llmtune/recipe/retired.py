"""What earlier versions had (commands, options, recipe keys, metrics), and what to use instead: docs/retired.md."""

from __future__ import annotations

from llmtune.errors import Problem, RecipeError

FSDP = "Use --strategy fsdp: FSDP2 shards what ZeRO-3 shards."
PAIRS = "Use lm-eval's task: `evaluate.benchmarks: [crows_pairs_english]`."
RETIRED = {
    "--strategy zero2": FSDP,
    "--strategy zero3": FSDP,
    "--strategy deepspeed": FSDP,
    "--strategy tp": "Use --strategy fsdp, which shards every model over any number of processes.",
    "launch sky": "Run `sky jobs launch` with examples/launch/skypilot.yaml, which starts torchrun.",
    "launch kubernetes": "Run `kubectl create -f` with examples/launch/trainjob.yaml, which starts torchrun.",
    "doctor FOLDER": "Read trainer_state.json in the Trainer's folder. To train on from its adapter, set "
    "adapter.start_from to the folder.",
    "evaluate.fairness.pairs": PAIRS,
    **dict.fromkeys((f"fairness.{name}" for name in ("stereotype", "stereotype_distance", "lm_score", "icat")), PAIRS),
}
"""By what a user types (a command, an option, a recipe key, a metric of a gate): a sentence that says what to use."""


def retired_problem(name: str, where: str | None) -> Problem:
    """Return the problem of something in `RETIRED` that is used at `where`."""
    return Problem(f"`{name}` was removed", where, RETIRED[name])


def refuse_retired(name: str) -> RecipeError:
    """Return the error for a command or an option in `RETIRED`."""
    return RecipeError(retired_problem(name, "docs/retired.md"))
