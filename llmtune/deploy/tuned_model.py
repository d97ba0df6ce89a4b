"""The tuned model that exports are made from, and the questions that both are asked.

Shapes: T positions of a prompt and its answer, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, takewhile
from pathlib import Path
from typing import TypeVar, cast

import torch
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from llmtune.data.chat_messages import clean_messages
from llmtune.data.chat_template import ChatTemplate
from llmtune.data.pictures import open_picture, row_pictures
from llmtune.data.row_store import read_rows
from llmtune.data.template_facts import TemplateRefusal
from llmtune.data.template_text import check_length
from llmtune.deploy.parity import Certificate, Onto
from llmtune.errors import LlmtuneError
from llmtune.evaluate.calibration import RECORD as CALIBRATION
from llmtune.evaluate.decision import RECORD as DECISION
from llmtune.evaluate.generation import generate_batch, only_these_settings, read_media
from llmtune.model.config import keeps_float32, read_model_config
from llmtune.model.image_models import draw_probes
from llmtune.model.processor import open_processor
from llmtune.model.quantized_base import kept_quantization
from llmtune.plan import RunContext
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import AdaptedModel, Examples, ModelRef, Prompt, Row
from llmtune.run_models import Models
from llmtune.store.atomic_files import hash_folder, read_json
from llmtune.tasks.base import AnyTask

T = TypeVar("T")
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that adds two numbers.",
    "List three things to pack for a walk in the rain.",
    "Translate into German: The train leaves at nine o'clock.",
    "12 apples cost 6 euros. How much do 30 apples cost?",
    "Summarize: The committee met on Tuesday, talked for three hours and decided nothing.",
    "Once upon a time there was a small town by the sea, and",
)
TURNS = (
    *("My name is Ann.", "Hello Ann.", "I live in Rome.", "A fine city.", "I have two cats.", "How nice!"),
    "What is my name, and where do I live?",
)
"""A conversation, the user first: templates can treat earlier turns differently."""
SYSTEM = "Answer in one sentence."
CONTEXT = "Paris is the capital of France. The train to Berlin leaves at nine o'clock, and 30 apples cost 15 euros."
"""The context of the fixed prompts, for tasks that find answers in a text."""
QUESTION = "What does the picture show?"
ANSWER_TOKENS = 16
CERTIFIED_ROWS = 8
"""Rows of the run to ask after the fixed prompts."""
RANKED_ROWS = 64
"""Rows of a task that ranks passages: their scores are cheap, and an nDCG of a few queries says little."""
RULES = {CALIBRATION: ("temperature", "labels"), DECISION: ("threshold", "set_bounds", "lowest_score", "labels")}
"""By file of an evaluation, what programs read from it."""


@dataclass(frozen=True)
class TunedModel:
    """The model that products are made from and compared with, and the run's rows to ask it."""

    adapted: AdaptedModel
    recipe: Recipe
    task: AnyTask
    rows: Sequence[Row] = ()
    trained_sha256: str | None = None
    """Hash of the trained files in the run folder; None if they exist only in memory."""
    rules: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """The temperature and the decisions of the run's evaluation, by file."""
    examples: Examples | None = None
    """The run's encoded rows."""
    console: Console = field(default_factory=lambda: Console(quiet=True))
    """The console for progress."""

    @property
    def model(self) -> PreTrainedModel:
        """The model with its adapter."""
        return cast(PreTrainedModel, self.adapted.model)

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        """The tokenizer or processor used in training."""
        return self.adapted.selected.processor

    @property
    def model_ref(self) -> ModelRef:
        """The base model's files."""
        return self.adapted.selected.model_ref

    @property
    def device(self) -> str:
        """The device of the model."""
        return str(self.adapted.selected.model.device)

    @property
    def questions(self) -> list[Row]:
        """Return `PROMPTS` as rows of the task, a conversation, drawn pictures, and the run's rows without answers.

        Prompts have the first row's languages or pair.
        """
        row_inputs = self.task.stated_inputs(self.rows[0], self.recipe) if self.rows else {}
        fixed = [
            self.task.make_row({**row_inputs, "prompt": text, "context": CONTEXT, "passages": CONTEXT})
            for text in PROMPTS
        ]
        return [*fixed, *self._conversation(), *self._drawn(), *(self.task.split_answer(row)[0] for row in self.rows)]

    def _conversation(self) -> list[Row]:
        """Return `TURNS` as a row, with `SYSTEM` if the run's template takes it; empty if it takes no earlier turns."""
        if not self.task.is_conversational:
            return []
        roles = cycle(("user", "assistant"))
        turns = [{"role": role, "content": text} for role, text in zip(roles, TURNS, strict=False)]
        for head in ([{"role": "system", "content": SYSTEM}], []):
            row = {**self.task.make_row({"prompt": TURNS[-1]}), "messages": [*head, *turns]}
            try:
                self.task.prompt_ids(row, self.processor, self.recipe)
            except (LlmtuneError, TemplateRefusal):
                continue
            return [row]
        return []

    def _drawn(self) -> list[Row]:
        """Return a question about a picture and one about two, of different sizes; empty if the model reads none."""
        if not self.task.model_kind.takes_images:
            return []
        pictures = [picture["picture"] for picture in draw_probes()]
        groups = (pictures[:1], pictures[1:])
        return [self.task.make_row({"prompt": QUESTION, "image": json.dumps(group)}) for group in groups]

    def certificate(self, breaches: Sequence[str]) -> Certificate:
        """Return the first fields of every certificate."""
        return {
            "passed": not breaches,
            "breaches": list(breaches),
            "base": self.model_ref.name,
            "revision": self.model_ref.revision,
            "base_sha256": self.model_ref.content_hash,
            "trained_sha256": self.trained_sha256,
        }


def load_tuned(context: RunContext) -> TunedModel:
    """Load the model of a finished run, and a few rows: test rows if there are any.

    Weights that training kept in float32 are not rounded, so that products are not either.
    """
    rows, plan = context.rows, context.plan
    if keeps_float32(plan.recipe, plan.task, read_model_config(plan.model_ref, plan.recipe.model)):
        model = plan.recipe.model.model_copy(update={"dtype": "float32"})
        recipe = plan.recipe.model_copy(update={"model": model})
        context = replace(context, resolved=replace(plan, recipe=recipe))
    split = next((name for name in ("test", "validation", "train") if rows.counts[name]), "test")
    most = RANKED_ROWS if TASK_FACTS[plan.task.name].loader else CERTIFIED_ROWS
    return TunedModel(
        Models(context).adapted,
        context.plan.recipe,
        context.plan.task,
        read_rows(rows, split, range(min(most, rows.counts[split]))),
        hash_folder(context.trained_folder),
        rules_of_run(context),
        context.examples,
        context.console,
    )


def rules_of_run(context: RunContext) -> dict[str, dict[str, object]]:
    """Return the temperature and the decisions of a run's evaluation, by file."""
    folder = context.folder.path / "evaluation"
    rules_by_file = {name: read_json(folder / name) for name in RULES} if context.folder.is_done("evaluate") else {}
    return {name: {key: rules.get(key) for key in RULES[name]} for name, rules in rules_by_file.items() if rules}


def training_base(recipe: Recipe, model_ref: ModelRef) -> Onto:
    """Return the `--onto` name of the weights used in training: on them both models agree best."""
    quantized = recipe.adapter.method == "qlora" or kept_quantization(read_model_config(model_ref, recipe.model))
    return "dequantized" if quantized else "original"


class TransformersReader:
    """A transformers or PEFT model that continues a text."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def logits(self, text: Prompt) -> torch.Tensor:
        """Return the logits [T, V] of every position, on the CPU in float32."""
        ids_BT = torch.tensor([list(text.ids)], device=self.model.device)
        media = read_media(self.model, [text], len(text), str(self.model.device))
        logits_BTV: torch.Tensor = self.model(input_ids=ids_BT, use_cache=False, **media).logits
        return logits_BTV[0, -len(text) :].float().cpu()  # prefix vectors have logits too

    def answer(self, prompt: Prompt, stops: Sequence[int], tokens: int = ANSWER_TOKENS) -> list[int]:
        """Return the first `tokens` ids of the greedy answer, up to one of `stops`, which is included.

        An answer ends before the token of a picture, which no picture belongs to.
        """
        settings = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=[*stops, 0][0]
        )
        with only_these_settings(self.model):
            ids = generate_batch(self.model, [prompt], settings, str(self.model.device))[0]
        return list(takewhile(lambda token: token != getattr(self.model.config, "image_token_id", None), ids))


def render_prompts(tuned: TunedModel, processor: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of the questions, encoded by the task."""
    return [tuned.task.prompt_ids(row, processor, tuned.recipe) for row in tuned.questions]


def read_prompts(tuned: TunedModel, processor: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the questions as the task encodes them with a product's processor, with their pictures."""
    return [tuned.task.prompt(row, processor, tuned.recipe) for row in tuned.questions]


def render_chats(tuned: TunedModel, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """Return the prompts as a server renders them from the saved tokenizer alone, without template options.

    A template of somebody else's file has the limits of training. Return None if the client writes the prompt.
    """
    if not tuned.task.is_conversational or not tokenizer.chat_template:
        return None
    template = tokenizer.get_chat_template()
    check_length(template, tokenizer.name_or_path)
    chats = ChatTemplate(tokenizer, {}, tokenizer.name_or_path)
    return [
        chats.render(clean_messages(conversation["messages"]), conversation.get("tools"), answer_next=True)
        for conversation in tuned.questions
    ]


def served_by_folder(folder: Path, tuned: TunedModel) -> list[list[int]]:
    """Return the prompts' ids as a server makes them from a model folder alone."""
    trust = tuned.recipe.model.trust_remote_code
    saved = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust)
    if tuned.task.model_kind.takes_images:
        return _served_with_pictures(open_processor(folder, trust), saved, tuned)
    texts = render_chats(tuned, saved)
    if texts is None:
        return render_prompts(tuned, saved)
    return [cast(list[int], saved(text, add_special_tokens=False)["input_ids"]) for text in texts]


def _served_with_pictures(
    processor: ProcessorMixin, saved: PreTrainedTokenizerBase, tuned: TunedModel
) -> list[list[int]]:
    """Return the prompts' ids as `AutoProcessor` makes them, with its own chat template."""
    saved.chat_template = processor.chat_template
    texts = render_chats(tuned, saved) or []
    ids = []
    for text, question in zip(texts, tuned.questions, strict=True):
        pictures = [open_picture(picture) for picture in row_pictures(question)]
        encoded = processor(text=[text], images=[pictures] if pictures else None, add_special_tokens=False)
        ids.append(cast(list[int], [*encoded["input_ids"][0]]))
    return ids
