"""Try every PEFT method on a tiny model of every task; unsupported ones must be refused with a reason."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from llmtune.adapter.injection import inject
from llmtune.adapter.merging import merge_adapter
from llmtune.adapter.saving import load_adapter, save_adapter
from llmtune.data.examples import load_examples
from llmtune.data.row_store import load_rows
from llmtune.errors import LlmtuneError
from llmtune.model.causal_lm_loss import decoder_inputs, model_inputs, virtual_logits
from llmtune.model.config import read_model_config
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.peft_options import peft_methods
from llmtune.store.run_request import RunRequest
from llmtune.tasks.registry import choose_variant
from llmtune.train.accumulation import step_gradients
from llmtune.train.checkpoint import Checkpoint, TrainState, read_checkpoint, trainable_weights
from llmtune.train.resume import restore_checkpoint, save
from llmtune.train.setup import TrainContext, set_up
from support import families, models
from support.adapting import quiet
from support.audio import write_tone
from support.pairs import COLOURS, DOCUMENTS, LIKED, PAIRS, THINGS, recipe_of

COLUMNS = ("starts as the base", "gradient everywhere", "switches off", "saves", "plain PEFT", "merges", "resumes")
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "qlora": {"r": 4},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "adamss": {"r": 8, "num_subspaces": 2},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 16},
    "deft": {"r": 4},
    "delora": {"r": 4},
    "fourierft": {"n_frequency": 50},
    "frod": {"progressbar": False},
    "glora": {"r": 4},
    "gralora": {"r": 4},
    "hira": {"r": 4},
    "hra": {"r": 4},
    "loha": {"r": 4},
    "lokr": {"r": 4},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 8},
    "peanut": {"r": 4},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "psoft": {"r": 8},
    "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "pvera": {"r": 8},
    "randlora": {"r": 4},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "trainable_tokens": {"token_indices": [*range(4, 200)]},
    "vblora": {"vector_length": 16, "num_vectors": 16},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 48},
}
"""Sizes for models of width 64; other methods use PEFT's defaults."""
METHODS = sorted({*peft_methods(), "qlora"})
SAME = {"rtol": 1e-3, "atol": 1e-3}
PAGE = Path(__file__).parents[2] / "docs/adapter-methods.md"
MARKS = ("<!-- table: made by `cd tests; python -m support.method_table` -->", "<!-- end of table -->")
WORDS = [(f"The quick {thing} is {colour}", thing, colour) for thing in THINGS for colour in COLOURS]
CHATS = [{"prompt": f"Which colour has the {t} {i}?", "completion": f"It is {c}"} for i, (_, t, c) in enumerate(WORDS)]
TEXTS = [{"text": f"{text}."} for text, _, _ in WORDS]
SINGLE = [{"text": text, "label": c} for text, _, c in WORDS]
TAGS = [{"tokens": text.split(), "tags": ["O", "O", "B-THING", "O", "B-COLOUR"]} for text, _, _ in WORDS]
ANSWERS = [{"question": f"Which colour has the {t}?", "context": text, "answer": c} for text, t, c in WORDS]
QUIET: dict[str, Any] = {"generation": {"max_new_tokens": None}}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPEECH = {"speech": {"window_seconds": 2}}
CASES: dict[str, tuple[str, Callable[..., Path], Any, dict[str, Any], dict[str, Any]]] = {
    "chat": ("chat", models.build_llama, CHATS, {}, {}),
    "completion": ("completion", models.build_gpt2, CHATS, {}, {}),
    "completion, masked": ("completion", families.build_bert, TEXTS, {"completion": {"objective": "masked"}}, STILL),
    "translate": ("translate", families.build_t5, PAIRS, {}, {"dropout_rate": 0.0}),
    "summarize": ("summarize", families.build_bart, DOCUMENTS, {}, {"dropout": 0.0}),
    "qa": ("qa", families.build_bert, ANSWERS, {"qa": {"stride": 4}, "data": {"max_length": 64}}, STILL),
    "classify": ("classify", families.build_bert, SINGLE, {}, STILL),
    "token-classify": ("token-classify", families.build_modernbert, TAGS, {}, {}),
    "speech": ("speech", families.build_whisper, [], {"speech": {"window_seconds": 2, "language": "fr"}}, {}),
    "speech, letters": ("speech", families.build_wav2vec2, [], SPEECH, {}),
    "preference": ("preference", models.build_llama, LIKED, {"preference": {"loss": "dpo"}}, {}),
}
"""Task, model, rows, sections and the model's configuration: a kind of model for each task, and Conv1D with GPT-2."""


def build_bench(case: str, folder: Path) -> Bench:
    """Build the bench of one of CASES."""
    task, build, rows, sections, config = CASES[case]
    model = build(folder / "model", **config)
    generates = task in ("chat", "translate", "summarize", "preference") or case in ("completion", "speech")
    sections = {**({} if generates else QUIET), **sections}
    recipe = recipe_of(folder, model, rows, task, **sections)
    if task == "speech":
        lines = ["file_name,text"]
        for i in range(24):
            write_tone(folder / f"{i}.wav", 0.4 + 0.02 * i, pitch_hz=200.0 * (1 + i % 6), seed=i)
            lines.append(f"{i}.wav,It's {('one', 'two', 'three', 'four', 'five', 'six')[i % 6]}.")
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
        recipe = recipe_of(folder, model, [], task, **sections, data={"train": str(folder)})
    return Bench(recipe, folder / "run")


def describe(cells: list[str], reasons: list[str]) -> str:
    """Return one cell of the page: how many of the seven checks hold, and which fail; or the number of the reason."""

    def refused(cell: str) -> str:
        reason = re.sub(r"/\S+/model", "the model", cell.removeprefix("refused: "))
        if reason not in reasons:
            reasons.append(reason)
        return f"refused [{reasons.index(reason) + 1}]"

    if len(cells) == 1:
        return refused(cells[0])
    told = dict(zip(COLUMNS, cells, strict=True))
    wrong = [name for name, cell in told.items() if cell.startswith("no")]
    merges = f", merging {refused(told['merges'])}" if told["merges"].startswith("refused") else ""
    return (f"not: {', '.join(wrong)}" if wrong else "all") + merges


def write_page(found: dict[str, dict[str, list[str]]]) -> str:
    """Return the table as Markdown; `found` has the cells of each case and method."""
    reasons: list[str] = []
    lines = [f"| method | {' | '.join(f'`{case}`' for case in found)} |", "|---" * (len(found) + 1) + "|"]
    for method in METHODS:
        cells = [describe(found[case][method], reasons) for case in found]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines)


class Bench:
    """A task's rows, encoded once, for trying each method."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        self.file, self.folder = recipe, folder
        run_pipeline(load_recipe(recipe), RunRequest(out=folder, until="prepare"), quiet())
        self.examples, self.rows = load_examples(folder / "data" / "examples"), load_rows(folder / "data" / "rows")

    def start(self, method: str) -> TrainContext:
        """Set up a training with `method`, before its first step; raises LlmtuneError if it is refused."""
        options = {"method": method, "lora_alpha": None, "r": None, **SMALL.get(method, {})}
        sets = [f"adapter.{name}={value if value is not None else 'null'}" for name, value in options.items()]
        recipe = load_recipe(self.file, sets).recipe
        place = resolve_model(str(recipe.model.name), recipe.model, quiet(), True)
        config = read_model_config(place, recipe.model)
        self.task = choose_variant(recipe, config, place.name)
        self.recipe = self.task.infer_labels(recipe, self.rows, config)
        processor = load_processor(place, recipe.model)
        selected = load_model(place, self.recipe, self.task, processor, device="cpu", training=True)
        self.selected = selected
        self.base = self.scores(selected.model)
        adapted = inject(selected, self.recipe, quiet())
        return set_up(adapted, self.examples, self.task, self.recipe, self.folder, quiet(), "inputs")

    def scores(self, model: torch.nn.Module) -> torch.Tensor:
        """Return the head's output for one row, at the row's own tokens."""
        from llmtune.data.examples import ExampleReader

        collate = self.task.collator(self.selected.processor, self.recipe, False)
        batch = collate([ExampleReader(self.examples, "train", self.task.example_type)[0]], 0)
        inputs = model_inputs(model, batch)
        if self.selected.model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
        training = model.training
        with torch.no_grad():
            output = model.eval()(**inputs)
        model.train(training)
        found = output["logits"] if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)
        return found[:, virtual_logits(model) :].float() if found.dim() > 2 else found.float()

    def cells(self, method: str) -> list[str]:
        """Return `yes` or the failing check for each cell; one cell with the reason if the method is refused."""
        try:
            training = self.start(method)
        except LlmtuneError as error:
            return [f"refused: {error.problems[0].what}"]
        model = training.adapted.model
        head = [name for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
        found = {"starts as the base": "yes" if torch.allclose(self.scores(model), self.base, **SAME) else "no"}
        self.step(training, 1)
        dead = [
            name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
        ]
        found["gradient everywhere"] = f"no: {dead[0]}" if dead else "yes"
        self.update(training)
        off = self.switched_off(model) if not head else "yes"
        tuned = self.scores(model)
        assert not torch.allclose(tuned, self.base, rtol=0, atol=1e-7), "it learned nothing"
        found["switches off"] = off
        found |= self.saved(training, tuned)
        found["resumes"] = self.resumed(training, method)
        found["merges"] = self.merged(training, method)
        return [found[name] for name in COLUMNS]

    def switched_off(self, model: torch.nn.Module) -> str:
        with model.disable_adapter():  # type: ignore[operator]
            return "yes" if torch.allclose(self.scores(model), self.base, **SAME) else "no"

    def step(self, training: TrainContext, step: int) -> None:
        training.optimizer.zero_grad(set_to_none=True)
        step_gradients(training, step, 512, 1.0)

    def update(self, training: TrainContext) -> None:
        training.optimizer.step()
        training.schedule.step()

    def saved(self, training: TrainContext, tuned: torch.Tensor) -> dict[str, str]:
        folder = self.folder / "adapter"
        save_adapter(training.adapted, folder)
        task, recipe = self.task, self.recipe
        fresh, ours = (
            load_model(self.selected.model_ref, recipe, task, self.selected.processor, device="cpu", training=False)
            for _ in range(2)
        )
        with warnings.catch_warnings(action="ignore"):
            plain = PeftModel.from_pretrained(fresh.model, str(folder)).eval()
        loaded = self.scores(load_adapter(ours, folder).model)
        same = torch.allclose(self.scores(plain), tuned, **SAME) and torch.allclose(loaded, tuned, **SAME)
        return {"saves": "yes", "plain PEFT": "yes" if same else "no"}

    def resumed(self, training: TrainContext, method: str) -> str:
        save(training, TrainState(step=1, budget=512), self.folder / "checkpoints" / "step-1")
        self.step(training, 2)
        self.update(training)
        straight = trainable_weights(training.adapted.model)
        again = self.start(method)
        checkpoint = read_checkpoint(self.folder / "checkpoints" / "step-1")
        assert isinstance(checkpoint, Checkpoint), checkpoint
        restore_checkpoint(again, checkpoint)
        self.step(again, 2)
        self.update(again)
        found = trainable_weights(again.adapted.model)
        return "yes" if all(torch.equal(found[name], weight) for name, weight in straight.items()) else "no"

    def merged(self, training: TrainContext, method: str) -> str:
        tuned = self.scores(training.adapted.model)
        try:
            merged = merge_adapter(replace(training.adapted, method=method), "dequantized")
        except LlmtuneError as error:
            return f"refused: {error.problems[0].what}"
        return "yes" if torch.allclose(self.scores(merged), tuned, rtol=1e-2, atol=1e-2) else "no"


def main() -> None:
    """Try everything and write the table into the page."""
    with tempfile.TemporaryDirectory() as place:
        found = {}
        for case in CASES:
            bench = build_bench(case, Path(place) / case)
            found[case] = {method: bench.cells(method) for method in METHODS}
            print(case, {method: cells for method, cells in found[case].items() if set(cells) != {"yes"}}, flush=True)
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{write_page(found)}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main()
