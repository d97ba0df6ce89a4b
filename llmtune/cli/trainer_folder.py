"""`llmtune doctor FOLDER`: what a folder of transformers' Trainer tells about its run, and what it does not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.recipe.user_files import MAX_TEXT_BYTES, read_bytes
from llmtune.records import Json

STATE = "trainer_state.json"
UNTOLD = (
    ("the rows", "which were learned, which were cut or left out, and what of them was masked: the folder holds none"),
    ("the gain", "no base model was measured, and no test rows were kept apart: llmtune run RECIPE measures both"),
)
PICKLED = "training_args.bin is a pickle, which runs code when it is read, so it is not read: migrate the configuration"


def examine_run(folder: Path, console: Console) -> Json:
    """Read `trainer_state.json` and what lies beside it; print it, and return the same as a dictionary.

    Raises RecipeError where the folder is no run of a Trainer, EnvironmentProblem where its files are damaged.
    """
    states = [path for path in (folder, *sorted(folder.glob("checkpoint-*"), key=_step)) if (path / STATE).is_file()]
    if not states:
        fix = (
            "Name a folder with trainer_state.json, or with checkpoint-N folders. A run of llmtune: llmtune verify RUN."
        )
        raise RecipeError.of(f"no {STATE} is there", str(folder), fix)
    state = _read(states[0] / STATE if states[0] == folder else states[-1] / STATE)
    adapters = [path / "adapter_config.json" for path in (folder, states[-1])]
    adapter = next((_read(path) for path in adapters if path.is_file()), {})
    told = dict(_tell(state, adapter, folder))
    untold = dict(UNTOLD)
    if (folder / "training_args.bin").exists() or (states[-1] / "training_args.bin").exists():
        untold["its settings"] = PICKLED
    for title, lines, style in (("told", told, "green"), ("not told", untold, "yellow")):
        for name, words in lines.items():
            console.print(f"[{style}]{title:<8}[/]  {name}: {escape(words)}", highlight=False, soft_wrap=True)
    return {"folder": str(folder), "told": told, "not_told": untold}


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_bytes(file, MAX_TEXT_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        fix = "Take the folder of another checkpoint."
        raise EnvironmentProblem.of(f"cannot be read: {error}", str(file), fix) from None
    if not isinstance(values, dict):
        raise EnvironmentProblem.of("it holds no mapping", str(file), "Take the folder of another checkpoint.")
    return values


def _numbers(history: list[Any], name: str) -> list[tuple[int, float]]:
    """Return the steps and values of one entry of the log."""
    entries = [one for one in history if isinstance(one, dict) and isinstance(one.get(name), int | float)]
    return [(int(_number(one, "step")), float(one[name])) for one in entries]


def _number(values: dict[str, Any], name: str) -> float:
    """Return a finite number; 0 where there is none."""
    value = values.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) else 0


def _tell(state: dict[str, Any], adapter: dict[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    history = state.get("log_history")
    history = history if isinstance(history, list) else []
    done, planned = int(_number(state, "global_step")), int(_number(state, "max_steps"))
    ended = "" if not planned or done >= planned else f", and {planned - done:,} were still to come: it was stopped"
    yield "steps", f"{done:,} of {planned:,}, {_number(state, 'epoch'):.2f} epochs{ended}"
    if batch := state.get("train_batch_size"):
        yield "rows in a micro-batch", f"{batch}; how many make a step is in its settings"
    losses, evaluations = _numbers(history, "loss"), _numbers(history, "eval_loss")
    if losses:
        bad = [step for step, loss in losses if not math.isfinite(loss)]
        trouble = f"; NO NUMBER from step {bad[0]} on" if bad else ""
        yield "training loss", f"{losses[0][1]:.4f} at step {losses[0][0]}, {losses[-1][1]:.4f} at the end{trouble}"
        if len(losses) > 1 and all(loss == 0 for _, loss in losses[1:]):
            yield "look at this", "a loss of 0 is logged where it was no number and the Trainer hid it"
    if evaluations:
        step, best = min(evaluations, key=lambda one: one[1])
        last = evaluations[-1][1]
        rose = f", and {last:.4f} at the end: the last step is not the best" if last > best else ", the last"
        yield "validation loss", f"{best:.4f} at step {step} of {len(evaluations)} measurements{rose}"
        if kept := state.get("best_model_checkpoint"):
            yield "best checkpoint", Path(str(kept)).name
    norms = [norm for _, norm in _numbers(history, "grad_norm")]
    if norms:
        yield "gradient norm", f"up to {max(norms):.3g}, {sorted(norms)[len(norms) // 2]:.3g} in the middle"
    rates = [rate for _, rate in _numbers(history, "learning_rate")]
    if rates:
        yield "learning rate", f"up to {max(rates):.3g}, {rates[-1]:.3g} at the end"
    if tokens := _number(state, "num_input_tokens_seen"):
        yield "tokens read", f"{tokens:,.0f}, padding among them"
    if adapter:
        parts = [
            f"{name} {adapter[name]}" for name in ("peft_type", "r", "lora_alpha", "lora_dropout") if name in adapter
        ]
        yield "adapter", f"{', '.join(parts)}, on {adapter.get('base_model_name_or_path') or 'an unnamed model'}"
        yield "go on from it", f"adapter.start_from: {folder}"
    if not (folder / "chat_template.jinja").is_file() and not (folder / "tokenizer_config.json").is_file():
        yield "look at this", "no tokenizer lies beside the weights: how a conversation was written is not told"
