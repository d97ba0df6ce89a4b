"""The tuned model's outputs on its questions, with which its exports are compared and certified.

Shapes: T positions of a prompt and its answer, V vocabulary; N distributions over K outputs: one per row for classes,
one per token for tags and words, two for an answer's ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TypeVar, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapter.reference_model import switches_off, without_adapter
from llmtune.data.chat_template import stop_ids
from llmtune.data.pictures import row_pictures
from llmtune.data.template_facts import TemplateRefusal
from llmtune.deploy.base_checkpoint import BaseCheckpoint
from llmtune.deploy.exported_model import ExportedModel
from llmtune.deploy.failure_causes import find_lost_steps, record_steps
from llmtune.deploy.folder_settings import expected_settings, find_changed_settings
from llmtune.deploy.parity import (
    Certificate,
    Distance,
    Limits,
    Parity,
    find_breaches,
    measure_distance,
    measure_step,
)
from llmtune.deploy.tuned_model import ANSWER_TOKENS, TransformersReader, TunedModel, read_prompts
from llmtune.display.console import track_items
from llmtune.errors import DataError, LlmtuneError, first_line
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.generation import answer_ends, extend_prompt
from llmtune.model.audio_models import heard_at_once
from llmtune.model.causal_lm_loss import accepted_arguments, decoder_inputs, model_inputs, move_to, unwrap
from llmtune.model.device import compute_context
from llmtune.records import Batch, Prompt

T = TypeVar("T")


class TunedReference(ABC):
    """The tuned model's outputs on its questions, to compare products with."""

    kind = "choice"
    """The task's `output_kind`."""

    def __init__(self, tuned: TunedModel) -> None:
        self.tuned = tuned
        self.checkpoint = BaseCheckpoint.find(tuned)
        """The base with its towers; None for a model of text alone."""
        self.settings, self.steps = expected_settings(tuned), record_steps(tuned.model)
        self.logits = self.read_logits(tuned.model)
        self.base_logits = self.read_base_logits()
        """The base model's logits; None if no adapter can be disabled."""
        self.effect = None if self.base_logits is None else self.measure_effect(self.base_logits)
        """Mean KL from the tuned model to its own base, or another mean difference."""

    def follow(self, items: Sequence[T], what: str) -> Iterator[T]:
        """Yield items with a bar on the terminal."""
        return track_items(self.tuned.console, items, what)

    @abstractmethod
    def read_logits(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Return the logits [N, K] of `model` for each question, on the CPU in float32."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens of the longest text that an export reads and writes."""

    @abstractmethod
    def parity(self, exported: ExportedModel) -> Parity:
        """Compare an export: its logits, its answers, and the inputs that its own tokenizer makes."""

    def certify(self, exported: ExportedModel, limits: Limits | None = None) -> Certificate:
        """Return the fields of an export's certificate; `limits` override its own."""
        limits, parity = limits or exported.limits, self.parity(exported)
        breaches = [*find_breaches(parity, limits), *self.find_causes(exported)]
        return {
            **self.tuned.certificate(breaches),
            "reader": exported.runtime,
            "limits": limits.applied(parity.effect_kl),
            "measured": asdict(parity),
        }

    def find_causes(self, exported: ExportedModel) -> list[str]:
        """Describe weights without a part of the adapter, and settings of the files that differ from the run's."""
        lost = find_lost_steps(self.steps, exported.model.state_dict()) if exported.is_folder else []
        return [*lost, *find_changed_settings(self.settings, exported, self.tuned)]

    def missing_ends(self, exported: ExportedModel, turns: Sequence[int]) -> tuple[str, ...]:
        """Return tokens that end the tuned model's turns, or texts without turns, and do not end the product's.

        transformers ends answers at the tokens of the generation settings alone.
        """
        processor = self.tuned.processor
        stated = getattr(exported.model.generation_config, "eos_token_id", None) if exported.is_folder else None
        ends = stated if isinstance(stated, list) else None if stated is None else [stated]
        product_ends = exported.ends or ends or answer_ends(exported.model, exported.processor)
        required = turns or [token for token in (processor.eos_token_id,) if token is not None]
        return tuple(processor.convert_ids_to_tokens([token for token in required if token not in product_ends]))

    def read_base_logits(self) -> list[torch.Tensor] | None:
        """Return the base model's logits, with the trained head; None if no adapter can be disabled."""
        model = self.tuned.adapted.model
        if not switches_off(model):  # trained biases stay
            return None
        with without_adapter(cast(PeftModel, model), keeps_head=self.tuned.task.model_kind.has_head):
            return self.read_logits(cast(PreTrainedModel, model))

    def measure_effect(self, base_logits: Sequence[torch.Tensor]) -> float:
        """Return the mean difference between the tuned model and its base."""
        return self.compare(base_logits).kl_mean

    def compare(self, logits: Sequence[torch.Tensor]) -> Distance:
        """Compare logits of the same questions with those of the tuned model."""
        return measure_distance(self.logits, logits, self.kind)

    def judge(self, logits: Sequence[torch.Tensor], same_answers: Sequence[bool], same_ids: bool) -> Parity:
        """Return a product's parity from its logits, equal answers, and whether all inputs are equal."""
        base = self.base_logits
        share, noise = (None, 0.0) if base is None else measure_step(base, self.logits, logits, self.kind)
        return Parity(
            **asdict(self.compare(logits)),
            prompts=len(same_answers),
            positions=sum(map(len, self.logits)),
            answer_agreement=sum(same_answers) / max(len(same_answers), 1),
            same_ids=same_ids,
            effect_kl=self.effect,
            kl_from_base=None if base is None else measure_distance(base, logits, self.kind).kl_mean,
            effect_share=share,
            share_noise=noise,
        )


def are_finite(outputs: Sequence[torch.Tensor]) -> bool:
    """Whether all outputs are finite numbers; a model with others has no answers."""
    return all(bool(part.isfinite().all()) for part in outputs)


# Models that continue a text


class TextReference(TunedReference):
    """Prompts, the tuned model's greedy answers to them, and its logits [T, V] over both."""

    def __init__(self, tuned: TunedModel) -> None:
        reader = TransformersReader(tuned.model)
        self.stops = answer_ends(tuned.model, tuned.processor)
        self.inputs = read_prompts(tuned, tuned.processor)
        self.prompts = [[*prompt.ids] for prompt in self.inputs]
        self.tuned = tuned
        self.answers = [reader.answer(prompt, self.stops) for prompt in self.follow(self.inputs, "answers")]
        super().__init__(tuned)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with an answer."""
        return max(map(len, self.prompts)) + ANSWER_TOKENS

    def read_logits(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Return the logits over each prompt with the tuned model's answer."""
        reader, pairs = TransformersReader(model), list(zip(self.inputs, self.answers, strict=True))
        return [reader.logits(extend_prompt(*pair)) for pair in self.follow(pairs, "likelihoods")]

    def parity(self, exported: ExportedModel) -> Parity:
        """Compare an export, with prompts made as in training and as by a server."""
        tuned, reader = self.tuned, TransformersReader(exported.model)
        prompts, reason = self.inputs, None
        try:
            prompts = read_prompts(tuned, exported.processor)
            same_ids = exported.served_prompts(tuned) == self.prompts == [[*prompt.ids] for prompt in prompts]
        except (LlmtuneError, TemplateRefusal) as error:  # its template cannot render them
            same_ids, reason = False, first_line(error)
        pairs = list(zip(self.inputs, self.answers, strict=True))
        logits = self.read_logits(exported.model)
        answers = pairs if are_finite(logits) else []
        same = [reader.answer(prompt, self.stops) == expected for prompt, expected in self.follow(answers, "answers")]
        turns = stop_ids(tuned.processor, tuned.recipe) if tuned.recipe.variant.facts.templated else []
        compared = self.judge(logits, same, same_ids)
        pictures = sum(len(row_pictures(row)) for row in tuned.questions)
        other = tuple(_find_other_media(self.inputs, prompts))
        missing = self.missing_ends(exported, turns)
        return replace(compared, ids_error=reason, missing_ends=missing, pictures=pictures, other_inputs=other)


def _find_other_media(expected: Sequence[Prompt], actual: Sequence[Prompt]) -> list[str]:
    """Return the names of inputs that two processors make differently of the same pictures."""
    names = set[str]()
    for one, other in zip(expected, actual, strict=True):
        ours, theirs = ({} if prompt.media is None else prompt.media() for prompt in (one, other))
        shared = ours.keys() & theirs.keys()
        names |= (ours.keys() ^ theirs.keys()) | {name for name in shared if not torch.equal(ours[name], theirs[name])}
    return sorted(names)


# Classes, tags, answer spans, translations, transcripts


class HeadReference(TunedReference):
    """Outputs and predictions on the run's rows, for models with a head, encoder-decoders and speech models."""

    def __init__(self, tuned: TunedModel) -> None:
        self.tuned = tuned
        self.kind = tuned.task.output_kind(tuned.recipe)
        with compute_context(unwrap(tuned.model).dtype, tuned.device):  # a float32 head on a 16-bit body
            self.predictions = self._predict(tuned.model, tuned.processor)
            self.batches = list(self._make_batches(tuned.processor))
            if not self.batches:
                what = "none of the run's test rows can be encoded, so the models cannot be compared"
                raise DataError.of(what, "data.test", "Give test rows that fit into data.max_length.")
            super().__init__(tuned)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(cast(torch.Tensor, batch["input_ids"]).shape[1] for batch in self.batches)

    def read_logits(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Return the logits for each example."""
        return [read_head_outputs(model, batch) for batch in self.follow(self.batches, "outputs")]

    def parity(self, exported: ExportedModel) -> Parity:
        """Compare an export; predictions are compared in their written form."""
        model, task = exported.model, self.tuned.task
        write = task.format_prediction
        logits = self.read_logits(model)
        given = self._predict(model, exported.processor) if are_finite(logits) else []
        same = [write(actual) == write(expected) for actual, expected in zip(given, self.predictions, strict=False)]
        labels = unwrap(self.tuned.model).config.id2label if task.model_kind.has_head else model.config.id2label
        compared = self.judge(logits, same, self._same_ids(exported))
        writes = model.can_generate() and not task.model_kind.has_head
        missing = self.missing_ends(exported, []) if writes else ()
        return replace(compared, same_labels=model.config.id2label == labels, missing_ends=missing)

    def _same_ids(self, exported: ExportedModel) -> bool:
        made = list(self._make_batches(exported.processor))
        if len(made) != len(self.batches) or not all(map(_is_same_batch, made, self.batches)):
            return False
        if exported.encode is None:
            return True
        batch_ids = [cast(torch.Tensor, batch["input_ids"])[0].tolist() for batch in self.batches]
        texts = [exported.encode(row["text"]) for row in self.tuned.rows]
        return all(ids in texts for ids in batch_ids if len(ids) < self.tuned.recipe.data.max_length)  # not truncated

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
        collate, writes = task.collator(processor, recipe, False), not task.model_kind.has_head
        for row, prediction in zip(self.tuned.rows, self.predictions, strict=True):
            filled = [task.fill_answer(row, prediction)] if writes and isinstance(prediction, str) else []
            for candidate in (*filled, row):
                (examples,) = task.encode([candidate], processor, recipe)
                if not isinstance(examples, str):  # a string is the reason why the row has none
                    yield from (collate([example], 0) for example in examples)
                    break


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
