"""The tuned model as reference for products: the questions it is asked, and its outputs.

Shapes: T positions of a prompt and its answer, V vocabulary; N distributions over K outputs: one per row for classes,
one per token for tags and words, two for an answer's ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapter.reference_model import switches_off
from llmtune.data.chat_messages import clean_messages
from llmtune.data.chat_template import stop_ids
from llmtune.data.row_store import read_rows
from llmtune.deploy.parity import Certificate, Distance, Onto, Parity, measure_distance, measure_share
from llmtune.errors import DataError, LlmtuneError
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.generation import answer_ends, generate_batch, only_these_settings
from llmtune.model.causal_lm_loss import accepted_arguments, decoder_inputs, model_inputs, move_to, unwrap
from llmtune.model.config import read_model_config
from llmtune.model.device import compute_context, resolve_dtype
from llmtune.model.quantized_base import kept_quantization
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel, Batch, ModelRef, Row
from llmtune.report.render_terminal import track_items
from llmtune.session import Models, RunContext
from llmtune.store.atomic_files import hash_folder
from llmtune.tasks.base import AnyTask
from llmtune.tasks.speech import heard_at_once

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
CONTEXT = "Paris is the capital of France. The train to Berlin leaves at nine o'clock, and 30 apples cost 15 euros."
"""The context of the fixed prompts, for tasks that find answers in a text."""
ANSWER_TOKENS = 16
CERTIFIED_ROWS = 8
"""Rows of the run to ask after the fixed prompts."""


@dataclass(frozen=True)
class TunedModel:
    """The model that products are made from and compared with, and the run's rows to ask it."""

    adapted: AdaptedModel
    recipe: Recipe
    task: AnyTask
    rows: Sequence[Row] = ()
    trained_sha256: str | None = None
    """Hash of the trained files in the run folder; None if they exist only in memory."""
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
    def questions(self) -> list[Row]:
        """`PROMPTS` as rows of the task, with the first row's languages or pair, and the run's rows without answers."""
        own = {name: self.rows[0].get(name) for name in self.task.optional_inputs} if self.rows else {}
        fixed = [
            self.task.make_row({**own, "prompt": text, "context": CONTEXT, "passages": CONTEXT}) for text in PROMPTS
        ]
        return [*fixed, *(self.task.split_answer(row)[0] for row in self.rows)]

    def certificate(self, breaches: Sequence[str]) -> Certificate:
        """Return the first fields of every certificate."""
        ref = self.adapted.selected.model_ref
        return {
            "passed": not breaches,
            "breaches": list(breaches),
            "base": ref.name,
            "revision": ref.revision,
            "base_sha256": ref.content_hash,
            "trained_sha256": self.trained_sha256,
        }


ServedPrompts = Callable[[TunedModel], list[list[int]]]
"""Returns the ids of a model's questions as the program makes them that serves a product."""


def load_tuned(context: RunContext, splits: Sequence[str] = ("test",)) -> TunedModel:
    """Load the model of a finished run, and a few rows of the first non-empty split."""
    rows = context.rows
    split = next((name for name in splits if rows.counts[name]), splits[0])
    return TunedModel(
        Models(context).adapted,
        context.plan.recipe,
        context.plan.task,
        read_rows(rows, split, range(min(CERTIFIED_ROWS, rows.counts[split]))),
        hash_folder(context.trained_folder),
        context.console,
    )


def training_base(recipe: Recipe, model_ref: ModelRef) -> Onto:
    """Return the `--onto` name of the weights used in training: on them both models agree best."""
    quantized = recipe.adapter.method == "qlora" or kept_quantization(read_model_config(model_ref, recipe.model))
    return "dequantized" if quantized else "original"


class TunedReference(ABC):
    """The tuned model's outputs on its questions, to compare products with."""

    kind = "choice"
    """The task's `output_kind`."""

    def __init__(self, tuned: TunedModel) -> None:
        self.tuned = tuned
        self.logits = self.read_logits(tuned.model)
        self.base_logits = self.read_base_logits()
        """The base model's logits; None if no adapter can be disabled."""
        self.effect = None if self.base_logits is None else self.compare(self.base_logits).kl_mean
        """Mean KL from the tuned model to its own base."""

    def follow(self, items: Sequence[T], what: str) -> Iterator[T]:
        """Yield items with a bar on the terminal."""
        return track_items(self.tuned.console, items, what)

    @abstractmethod
    def read_logits(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Return the logits [N, K] of `model` for each question, on the CPU in float32."""

    @abstractmethod
    def parity(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase,
        served: ServedPrompts,
        ends: Collection[int] | None = None,
    ) -> Parity:
        """Compare a product: its logits, its answers, and the inputs from its saved `processor` and its server.

        `ends` are the tokens that end its answers; None: those of the model's settings and of the processor.
        """

    def read_base_logits(self) -> list[torch.Tensor] | None:
        """Return the base model's logits; None if no adapter can be disabled."""
        model = self.tuned.adapted.model
        if not switches_off(model):  # trained biases stay
            return None
        with cast(PeftModel, model).disable_adapter():
            return self.read_logits(cast(PreTrainedModel, model))

    def compare(self, logits: Sequence[torch.Tensor]) -> Distance:
        """Compare logits of the same questions with those of the tuned model."""
        return measure_distance(self.logits, logits, self.kind)

    def judge(self, logits: Sequence[torch.Tensor], same_answers: Sequence[bool], same_ids: bool) -> Parity:
        """Return a product's parity from its logits, equal answers, and whether all inputs are equal."""
        base = self.base_logits
        return Parity(
            **asdict(self.compare(logits)),
            prompts=len(same_answers),
            positions=sum(map(len, self.logits)),
            answer_agreement=sum(same_answers) / len(same_answers),
            same_ids=same_ids,
            effect_kl=self.effect,
            kl_from_base=None if base is None else measure_distance(base, logits, self.kind).kl_mean,
            effect_share=None if base is None else measure_share(base, self.logits, logits, self.kind),
        )


def make_reference(tuned: TunedModel) -> TunedReference:
    """Ask the tuned model the fixed prompts and its rows; only the rows if it does not continue a text."""
    return TextReference(tuned) if tuned.task.continues_text else HeadReference(tuned)


# Models that continue a text


class TransformersReader:
    """A transformers or PEFT model that continues a text."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits [T, V] of every position, on the CPU in float32."""
        ids_BT = torch.tensor([list(ids)], device=self.model.device)
        logits_BTV: torch.Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV[0, -len(ids) :].float().cpu()  # prefix vectors have logits too

    def answer(self, prompt: Sequence[int], stops: Sequence[int], tokens: int = ANSWER_TOKENS) -> list[int]:
        """Return the first `tokens` ids of the greedy answer, up to one of `stops`, which is included."""
        settings = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=[*stops, 0][0]
        )
        with only_these_settings(self.model):
            return generate_batch(self.model, [prompt], settings, str(self.model.device))[0]


class TextReference(TunedReference):
    """Prompts, the tuned model's greedy answers to them, and its logits [T, V] over both."""

    def __init__(self, tuned: TunedModel) -> None:
        reader = TransformersReader(tuned.model)
        self.stops = answer_ends(tuned.model, tuned.processor)
        self.prompts = render_prompts(tuned, tuned.processor)
        self.tuned = tuned
        self.answers = [reader.answer(prompt, self.stops) for prompt in self.follow(self.prompts, "answers")]
        super().__init__(tuned)

    def read_logits(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Return the logits over each prompt with the tuned model's answer."""
        return self.read_by(TransformersReader(model).logits)

    def read_by(self, logits_of: Callable[[Sequence[int]], torch.Tensor]) -> list[torch.Tensor]:
        """Return a reader's logits over each prompt with the tuned model's answer."""
        pairs = list(zip(self.prompts, self.answers, strict=True))
        return [logits_of([*prompt, *answer]) for prompt, answer in self.follow(pairs, "likelihoods")]

    def same_answers(self, answer: Callable[[Sequence[int], Sequence[int]], list[int]]) -> list[bool]:
        """Return whether a reader's `answer` to each prompt equals the tuned model's."""
        pairs = list(zip(self.prompts, self.answers, strict=True))
        return [answer(prompt, self.stops) == expected for prompt, expected in self.follow(pairs, "answers")]

    def parity(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase,
        served: ServedPrompts,
        ends: Collection[int] | None = None,
    ) -> Parity:
        """Compare a product, with prompts made as in training and as by a server."""
        try:
            same_ids = served(self.tuned) == self.prompts and render_prompts(self.tuned, processor) == self.prompts
        except LlmtuneError:  # its template cannot render them
            same_ids = False
        reader, known = TransformersReader(model), answer_ends(model, processor) if ends is None else ends
        compared = self.judge(self.read_by(reader.logits), self.same_answers(reader.answer), same_ids)
        turns = stop_ids(self.tuned.processor, self.tuned.recipe) if self.tuned.recipe.variant.facts.templated else []
        missing = self.tuned.processor.convert_ids_to_tokens([token for token in turns if token not in known])
        return replace(compared, missing_ends=tuple(missing))


def render_prompts(tuned: TunedModel, processor: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of the questions, encoded by the task."""
    return [tuned.task.prompt_ids(row, processor, tuned.recipe) for row in tuned.questions]


def render_chats(tuned: TunedModel, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """Return the prompts as a server renders them from the saved tokenizer alone, without template options.

    Return None if the client writes the prompt.
    """
    if not tuned.task.is_conversational or not tokenizer.chat_template:
        return None
    options = {"add_generation_prompt": True, "tokenize": False}
    return [
        cast(str, tokenizer.apply_chat_template(clean_messages(row["messages"]), tools=row.get("tools"), **options))
        for row in tuned.questions
    ]


def served_by_folder(folder: Path, tuned: TunedModel) -> list[list[int]]:
    """Return the prompts' ids as a server makes them from a model folder alone."""
    trust = tuned.recipe.model.trust_remote_code
    saved = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust)
    texts = render_chats(tuned, saved)
    if texts is None:
        return render_prompts(tuned, saved)
    return [cast(list[int], saved(text, add_special_tokens=False)["input_ids"]) for text in texts]


# Classes, tags, answer spans, translations, transcripts


class HeadReference(TunedReference):
    """Outputs and predictions on the run's rows, for models with a head, encoder-decoders and speech models."""

    def __init__(self, tuned: TunedModel) -> None:
        self.tuned = tuned
        self.kind = tuned.task.output_kind(tuned.recipe)
        device = str(tuned.model.device)
        dtype = resolve_dtype(tuned.recipe.model.dtype, device.split(":")[0])
        with compute_context(dtype, device):  # as in evaluation: a float32 head on a 16-bit body
            self.predictions = self._predict(tuned.model, tuned.processor)
            self.batches = list(self._make_batches(tuned.processor))
            if not self.batches:
                what = "none of the run's test rows can be encoded, so the models cannot be compared"
                raise DataError.of(what, "data.test", "Give test rows that fit into data.max_length.")
            super().__init__(tuned)

    def read_logits(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Return the logits for each example."""
        return [read_head_outputs(model, batch) for batch in self.follow(self.batches, "outputs")]

    def parity(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase,
        served: ServedPrompts,
        ends: Collection[int] | None = None,
    ) -> Parity:
        """Compare a product; predictions are compared in their written form."""
        write = self.tuned.task.format_prediction
        pairs = zip(self._predict(model, processor), self.predictions, strict=True)
        same = [write(actual) == write(expected) for actual, expected in pairs]
        made = list(self._make_batches(processor))
        same_ids = len(made) == len(self.batches) and all(map(_is_same_batch, made, self.batches))
        labels = unwrap(self.tuned.model).config.id2label if self.tuned.task.trains_head else model.config.id2label
        return replace(self.judge(self.read_logits(model), same, same_ids), same_labels=model.config.id2label == labels)

    def _predict(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> Sequence[object]:
        task = self.tuned.task
        questions = [task.split_answer(row)[0] for row in self.tuned.rows]
        with torch.inference_mode():
            return task.predict(questions, LoadedModel(model, processor, self.tuned.recipe, str(model.device)))

    def _make_batches(self, processor: PreTrainedTokenizerBase) -> Iterator[Batch]:
        """Yield one batch per example, to avoid padding; rows that cannot be encoded are skipped.

        An encoder-decoder is compared at each token of its prediction.
        """
        task, recipe = self.tuned.task, self.tuned.recipe
        collate = task.collator(processor, recipe, False)
        for row, prediction in zip(self.tuned.rows, self.predictions, strict=True):
            for candidate in (fill_answer(task, row, prediction), row):
                (examples,) = task.encode([candidate], processor, recipe)
                if not isinstance(examples, str):  # a string is the reason why the row has none
                    yield from (collate([example], 0) for example in examples)
                    break


def fill_answer(task: AnyTask, row: Row, prediction: object) -> Row:
    """Return the row with a model's prediction as its answer, if answers are single texts."""
    question, answer = task.split_answer(row)
    if not isinstance(prediction, str) or task.trains_head:
        return row
    if "answers" in row:
        return {**row, "answers": [{"text": prediction, "start": None}] if prediction else []}
    changed = [key for key, value in row.items() if value == answer and question.get(key) != value]
    return {**row, **dict.fromkeys(changed, prediction)}


@torch.inference_mode()
def read_head_outputs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the model's logits [N, K] for one batch, on the CPU in float32."""
    inner = unwrap(model)
    moved = move_to(inner.device, batch)
    if "samples_R" in moved:
        pieces = [model(**inputs).logits for inputs, _ in heard_at_once(model, moved)]
        return torch.cat([part.flatten(0, -2) for part in pieces]).float().cpu()
    inputs = model_inputs(model, moved)
    if inner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = decoder_inputs(model, moved["labels"])
    if "use_cache" in accepted_arguments(type(inner)):  # type: ignore[arg-type]
        inputs["use_cache"] = False
    output = model(**inputs)
    if hasattr(output, "start_logits"):
        return torch.cat([output.start_logits, output.end_logits]).float().cpu()
    logits: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
    return logits.reshape(-1, logits.shape[-1]).float().cpu()


def _is_same_batch(one: Batch, other: Batch) -> bool:
    if one.keys() != other.keys():
        return False
    return all(
        torch.equal(part, other[key]) if isinstance(part, torch.Tensor) else part == other[key]
        for key, part in one.items()
    )
