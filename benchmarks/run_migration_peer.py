"""Run and record trainings by TRL, LLaMA-Factory or axolotl: `PYTHON run_migration_peer.py TOOL FOLDER...`.

The tool reads `config.yaml` of each folder. This file only records the rows and tokens of each step and the losses in
`theirs.json`, and the adapter before its first step in `start`.
"""

from __future__ import annotations

import json
import os
import sys
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

STOP = "<|im_end|>"
"""Ends each turn, without the line break of ChatML: the other tools learn it, llmtune does not."""


class Record:
    """The rows that the tool trains on, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.adapter: dict[str, Any] = {}
        self.open: list[dict[str, Any]] = []

    def count(self, trainer: Trainer, inputs: dict[str, Any]) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not self.adapter:
            model.save_pretrained("start")
            settings = model.peft_config["default"]
            targets = sorted(settings.target_modules)
            trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            self.adapter = {"r": settings.r, "alpha": settings.lora_alpha, "targets": targets, "trained": trained}
        rows = [row for i in range(len(inputs["input_ids"])) for row in cut(inputs, i)]
        learned = int((inputs["labels"][..., 1:] != -100).sum())
        self.open.append({"tokens": sum(map(len, rows)), "learned": learned, "rows": rows})

    def step(self) -> None:
        self.steps.append(
            {
                "tokens": sum(part["tokens"] for part in self.open),
                "learned": sum(part["learned"] for part in self.open),
                "rows": [row for part in self.open for row in part["rows"]],
            }
        )
        self.open = []


def cut(inputs: dict[str, Any], index: int) -> list[list[int]]:
    """Split one line of a batch into its rows, without padding."""
    ids = inputs["input_ids"][index].tolist()
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 4:  # packed rows that do not attend to each other
        seen = mask[index, 0]
        seen = seen if seen.dtype == torch.bool else seen == 0
        first = seen.int().argmax(-1).tolist()  # where the row of each token begins
        real = seen.diagonal().tolist()
        rows: dict[int, list[int]] = {}
        for token, begins, counts in zip(ids, first, real, strict=True):
            if counts:
                rows.setdefault(begins, []).append(token)
        return list(rows.values())
    if "position_ids" in inputs:
        positions = inputs["position_ids"][index].tolist()
        borders = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
        labels = inputs["labels"][index]
        return [ids[a:b] for a, b in pairwise(borders) if bool((labels[a:b] != -100).any())]  # else it is padding
    kept = mask[index].bool().tolist() if mask is not None else [True] * len(ids)
    return [[token for token, real in zip(ids, kept, strict=True) if real]]


def main() -> None:
    tool, *folders = sys.argv[1:]
    inner_step, inner_train = Trainer.training_step, Trainer.train
    records: list[Record] = []

    @wraps(inner_step)
    def counted(self: Trainer, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> torch.Tensor:
        records[-1].count(self, inputs)
        return inner_step(self, model, inputs, *rest, **named)

    @wraps(inner_train)
    def watched(self: Trainer, *args: Any, **named: Any) -> Any:
        record = Record()
        records.append(record)
        self.add_callback(step_ends(record))
        result = inner_train(self, *args, **named)
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        steps = [{**step, "loss": loss} for step, loss in zip(record.steps, losses, strict=True)]
        Path("theirs.json").write_text(json.dumps({"adapter": record.adapter, "steps": steps}), encoding="utf-8")
        return result

    Trainer.training_step, Trainer.train = counted, watched
    train = {"trl": train_trl, "llamafactory": train_llamafactory, "axolotl": train_axolotl}[tool]
    for folder in folders:
        os.chdir(folder)
        train("config.yaml")


def step_ends(record: Record) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            record.step()

    return Steps()


def train_trl(config: str) -> None:
    from trl.scripts import sft

    sft.main(*sft.make_parser().parse_args_and_config(args=["--config", config])[:4])


def train_llamafactory(config: str) -> None:
    sys.modules.setdefault("torchaudio", module_from_spec(ModuleSpec("torchaudio", None)))
    from llamafactory.data.formatter import EmptyFormatter, StringFormatter
    from llamafactory.data.template import TEMPLATES, register_template
    from llamafactory.train.tuner import run_exp

    TEMPLATES.pop("no_line_break", None)
    register_template(
        name="no_line_break",
        format_user=StringFormatter(slots=[f"<|im_start|>user\n{{{{content}}}}{STOP}<|im_start|>assistant\n"]),
        format_assistant=StringFormatter(slots=[f"{{{{content}}}}{STOP}"]),
        format_prefix=EmptyFormatter(),
        stop_words=[STOP],
    )
    run_exp(json.loads(Path(config).read_text(encoding="utf-8")))


def train_axolotl(config: str) -> None:
    from axolotl.cli.train import do_cli

    do_cli(config)


if __name__ == "__main__":
    main()
