"""Removed commands, options, recipe keys and metrics, with their replacements; see docs/retired.md."""

from __future__ import annotations

from llmtune.errors import Problem, RecipeError

FSDP = "Use --strategy fsdp: FSDP2 shards what ZeRO-3 shards."
PAIRS = "Use lm-eval's task: `evaluate.benchmarks: [crows_pairs_english]`."
SBATCH = ("partition", "account", "qos", "time", "gres", "gpus-per-node", "cpus-per-task", "mem", "constraint")
RETIRED = {
    "--strategy zero2": FSDP,
    "--strategy zero3": FSDP,
    "--strategy deepspeed": FSDP,
    "--strategy tp": "Use --strategy fsdp, which shards every model over any number of processes.",
    "launch sky": "Run `sky jobs launch` with examples/launch/skypilot.yaml, which starts torchrun.",
    "launch kubernetes": "Run `kubectl create -f` with examples/launch/trainjob.yaml, which starts torchrun.",
    "sweep": "Run Optuna around `llmtune.run`, as examples/sweep.py does.",
    "launch slurm --follow": "Pipe the script of --dry-run into `sbatch --wait`; show the log with `tail -f`.",
    **{f"launch slurm --{name}": f"Use --sbatch=--{name}=VALUE." for name in SBATCH},
    "doctor FOLDER": "Read trainer_state.json in the Trainer's folder. To continue training its adapter, set "
    "adapter.start_from to the folder.",
    "deploy serve --max-batch": "Omit it: requests are answered one at a time. For many clients, add --engine vllm.",
    "deploy serve RUN RUN": "Serve each run on its own --port, or add --engine vllm, which serves several adapters.",
    "deploy certify FILE.xml": "Certify the .onnx file, which OpenVINO reads itself.",
    "GET /metrics": "Add --engine vllm: its server has /metrics in Prometheus' format.",
    "evaluate.fairness.pairs": PAIRS,
    **dict.fromkeys((f"fairness.{name}" for name in ("stereotype", "stereotype_distance", "lm_score", "icat")), PAIRS),
}
"""The text a user types (command, option, recipe key, gate metric) -> a sentence naming the replacement."""


def retired_problem(name: str, where: str | None) -> Problem:
    """Return the problem of using an entry of `RETIRED` at `where`."""
    return Problem(f"`{name}` was removed", where, RETIRED[name])


def refuse_retired(name: str) -> RecipeError:
    """Return the error for a command or an option in `RETIRED`."""
    return RecipeError(retired_problem(name, "docs/retired.md"))
