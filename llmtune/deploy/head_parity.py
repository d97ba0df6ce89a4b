"""The reference for models that do not continue a text: classes, tags, answer spans, translations, transcripts.

Shapes: N distributions over K outputs: one per row for classes, one per token for tags and words, two for an answer's
ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmtune.deploy.parity import Distance, Parity, TextReference, TunedModel, compare_outputs, tuning_effect
from llmtune.errors import DataError
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.model.causal_lm_loss import accepted_arguments, unwrap
from llmtune.model.device import compute_context, resolve_dtype
from llmtune.model.model_inputs import decoder_inputs, read_inputs
from llmtune.records import Batch, Row
from llmtune.tasks.base import AnyTask
from llmtune.tasks.speech import heard_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


class HeadReference:
    """Outputs and predictions of a model with a head, an encoder-decoder or a speech model, on rows of the run."""

    def __init__(self, tuned: TunedModel) -> None:
        self.tuned = tuned
        with _evaluation_context(tuned.recipe, str(tuned.model.device)):
            self.predictions = self._predict(tuned.model, tuned.processor)
            self.batches = list(self._make_batches(tuned.processor))
            if not self.batches:
                what = "none of the run's rows can be asked: there is nothing to compare two models by"
                raise DataError.of(what, "data.test", "Give test rows that fit into data.max_length.")
            self.logits = [read_outputs(tuned.model, batch) for batch in self.batches]
            self.effect = tuning_effect(tuned.adapted.model, self.compare)

    def compare(self, model: PreTrainedModel) -> Distance:
        """Compare the logits of `model` with those of the tuned model."""
        kind = self.tuned.task.output_kind(self.tuned.recipe)
        return compare_outputs(self.logits, [read_outputs(model, batch) for batch in self.batches], kind)

    def parity(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, folder: Path) -> Parity:
        """Compare a product: its logits, its predictions, and the inputs that its processor makes."""
        write = self.tuned.task.format_prediction
        pairs = zip(self._predict(model, processor), self.predictions, strict=True)
        same = [write(actual) == write(expected) for actual, expected in pairs]
        made = list(self._make_batches(processor))
        return Parity(
            **asdict(self.compare(model)),
            prompts=len(same),
            positions=sum(map(len, self.logits)),
            answer_agreement=sum(same) / len(same),
            same_ids=len(made) == len(self.batches) and all(map(_same_batch, made, self.batches)),
            effect_kl=self.effect,
        )

    def _predict(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> Sequence[object]:
        task = self.tuned.task
        questions = [task.split_answer(row)[0] for row in self.tuned.rows]
        with torch.inference_mode():
            return task.predict(questions, LoadedModel(model, processor, self.tuned.recipe, str(model.device)))

    def _make_batches(self, processor: PreTrainedTokenizerBase) -> Iterator[Batch]:
        """Yield a batch per example, so that nothing is padded; rows that cannot be encoded are left out.

        An encoder-decoder is compared at each token of what it predicted.
        """
        task, recipe = self.tuned.task, self.tuned.recipe
        collate = task.collator(processor, recipe, False)
        for row, prediction in zip(self.tuned.rows, self.predictions, strict=True):
            for candidate in (with_answer(task, row, prediction), row):
                (examples,) = task.encode([candidate], processor, recipe)
                if not isinstance(examples, str):  # a text is why the row has none
                    yield from (collate([example], 0) for example in examples)
                    break


def _evaluation_context(recipe: Recipe, device: str) -> AbstractContextManager[object]:
    """Compute as evaluation does: a head is in float32 on top of a body in 16 bits."""
    return compute_context(resolve_dtype(recipe.model.dtype, device.split(":")[0]), device)


def with_answer(task: AnyTask, row: Row, prediction: object) -> Row:
    """Return a row whose answer, where it is one text, is what a model predicted."""
    question, answer = task.split_answer(row)
    if not isinstance(prediction, str) or task.trains_head:
        return row
    if "answers" in row:
        return {**row, "answers": [{"text": prediction, "start": None}] if prediction else []}
    changed = [key for key, value in row.items() if value == answer and question.get(key) != value]
    return {**row, **dict.fromkeys(changed, prediction)}


@torch.inference_mode()
def read_outputs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits [N, K] that `model` has for one batch, on the CPU in float32."""
    inner = unwrap(model)
    moved = {key: part.to(inner.device) if isinstance(part, torch.Tensor) else part for key, part in batch.items()}
    if "samples_R" in moved:
        pieces = [model(**inputs).logits for inputs, _ in heard_at_once(model, moved)]
        return torch.cat([part.flatten(0, -2) for part in pieces]).float().cpu()
    inputs = read_inputs(model, moved)
    if inner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = decoder_inputs(model, moved["labels"])
    if "use_cache" in accepted_arguments(type(inner)):  # type: ignore[arg-type]
        inputs["use_cache"] = False
    output = model(**inputs)
    if hasattr(output, "start_logits"):
        return torch.cat([output.start_logits, output.end_logits]).float().cpu()
    logits: torch.Tensor = output.logits
    return logits.reshape(-1, logits.shape[-1]).float().cpu()


def _same_batch(one: Batch, other: Batch) -> bool:
    if one.keys() != other.keys():
        return False
    return all(
        torch.equal(part, other[key]) if isinstance(part, torch.Tensor) else part == other[key]
        for key, part in one.items()
    )


Reference = TextReference | HeadReference


def make_reference(tuned: TunedModel) -> Reference:
    """Ask the tuned model the fixed prompts and its rows; the rows alone if it does not continue a text."""
    return TextReference(tuned) if tuned.task.continues_text else HeadReference(tuned)
