"""Whether two models that write no continuation say the same: classes, tags, places, translations, letters.

Shapes: N distributions over K outputs: one a row for classes, one a token for tags and words, two for an answer's ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid

from llmtune.deploy.parity import Distance, divergence
from llmtune.errors import DataError
from llmtune.model.causal_lm_loss import accepted_arguments, unwrap
from llmtune.model.task_losses import decoder_inputs, read_inputs, sound_pieces
from llmtune.records import Batch, Row
from llmtune.tasks import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

Kind = str
"""choice: one of K. yes-no: K questions of their own. number: K = 1, on a scale."""
SAME_NUMBER = 0.1
"""Two numbers count as the same first choice up to this share of how far the numbers of all rows are spread."""


@dataclass(frozen=True)
class Heard:
    """What one model made of the rows: distributions [N, K] in float32 on the CPU a batch, and its predictions."""

    batches: tuple[Batch, ...]
    logits: tuple[torch.Tensor, ...]
    said: tuple[str, ...]
    """A row's prediction as a person reads it."""


@dataclass(frozen=True)
class Asker:
    """Asks models of one task about the same rows."""

    task: AnyTask
    recipe: Recipe
    rows: Sequence[Row]

    @property
    def kind(self) -> Kind:
        """What the outputs are."""
        return self.task.output_kind(self.recipe)

    def listen(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, said: Sequence[Any]) -> Heard:
        """Ask the tuned model for its outputs; an encoder-decoder for those at each token of what it `said`.

        Raises DataError where no row can be asked.
        """
        batches = tuple(self.make_batches(processor, said))
        if not batches:
            what = "none of the run's rows can be asked: there is nothing to compare two models by"
            raise DataError.of(what, "data.test", "Give test rows that fit into data.max_length.")
        logits = tuple(read_outputs(model, batch) for batch in batches)
        return Heard(batches, logits, tuple(map(self.task.format_prediction, said)))

    def predict(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> list[Any]:
        """Return what the task predicts of each row."""
        questions = [self.task.split_answer(row)[0] for row in self.rows]
        with torch.inference_mode():
            return self.task.predict(model, questions, processor, self.recipe, device=str(model.device))

    def make_batches(self, processor: PreTrainedTokenizerBase, said: Sequence[Any]) -> Iterator[Batch]:
        """Yield a batch an example, so that nothing is padded; rows that do not become examples are left out."""
        collate = self.task.collator(processor, self.recipe, False)
        for row, answer in zip(self.rows, said, strict=True):
            found: Any = None
            for asked in (with_answer(self.task, row, answer), row):
                (found,) = self.task.encode([asked], processor, self.recipe)
                if not isinstance(found, str):
                    break
            if not isinstance(found, str):
                yield from (collate([example], 0) for example in found)

    def compare(self, heard: Heard, model: PreTrainedModel) -> Distance:
        """Hold the outputs of `model` against those of the other one."""
        got = [read_outputs(model, batch) for batch in heard.batches]
        return measure(heard.logits, got, self.kind)

    def measure_effect(self, heard: Heard, model: torch.nn.Module) -> float | None:
        """Return the mean KL from the tuned model to its own base; None if no adapter can be switched off."""
        if not isinstance(model, PeftModel) or any(config.bias != "none" for config in model.peft_config.values()):
            return None
        with model.disable_adapter():
            return float(self.compare(heard, cast(Any, model)).kls.mean())

    def same_answers(self, heard: Heard, model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> float:
        """Return the share of rows with the same prediction."""
        said = [self.task.format_prediction(one) for one in self.predict(model, processor)]
        return sum(one == other for one, other in zip(said, heard.said, strict=True)) / len(said)

    def same_inputs(self, heard: Heard, processor: PreTrainedTokenizerBase, said: Sequence[Any]) -> bool:
        """Whether another processor makes the same of the rows."""
        made = list(self.make_batches(processor, said))
        return len(made) == len(heard.batches) and all(map(_same_batch, made, heard.batches))


def with_answer(task: AnyTask, row: Row, said: Any) -> Row:
    """Return a row whose answer, where it is one text, is what a model said."""
    question, answer = task.split_answer(row)
    if not isinstance(said, str) or task.trains_head:
        return row
    if "answers" in row:
        return {**row, "answers": [{"text": said, "start": None}] if said else []}
    changed = [key for key, value in row.items() if value == answer and question.get(key) != value]
    return {**row, **dict.fromkeys(changed, said)}


@torch.inference_mode()
def read_outputs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the distributions [N, K] that `model` has for one batch, on the CPU in float32."""
    device = cast(Any, unwrap(model)).device
    moved = {key: part.to(device) if isinstance(part, torch.Tensor) else part for key, part in batch.items()}
    if "samples_R" in moved:
        found = [model(**inputs).logits for inputs, _ in sound_pieces(model, moved)]
        return torch.cat([part.flatten(0, -2) for part in found]).float().cpu()
    inputs = read_inputs(model, moved)
    if cast(Any, unwrap(model)).config.is_encoder_decoder:
        inputs["decoder_input_ids"] = decoder_inputs(model, moved["labels"])
    if "use_cache" in accepted_arguments(type(unwrap(model))):  # type: ignore[arg-type]
        inputs["use_cache"] = False
    output = model(**inputs)
    if hasattr(output, "start_logits"):
        return torch.cat([output.start_logits, output.end_logits]).float().cpu()
    logits: torch.Tensor = output.logits
    return logits.reshape(-1, logits.shape[-1]).float().cpu()


def measure(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor], kind: Kind) -> Distance:
    """Hold outputs against outputs.

    The KL of numbers is that of two normal distributions around them, as wide as the numbers of all rows are spread.
    """
    largest = max(float((one - other).abs().max()) for one, other in zip(wanted, got, strict=True))
    if kind == "choice":
        kls = [divergence(one_NK, other_NK) for one_NK, other_NK in zip(wanted, got, strict=True)]
        agreed = [one.argmax(-1) == other.argmax(-1) for one, other in zip(wanted, got, strict=True)]
        return Distance(torch.cat(kls), torch.cat(agreed), largest)
    one_NK, other_NK = torch.cat(tuple(wanted)), torch.cat(tuple(got))
    if kind == "yes-no":
        yes, no = one_NK.sigmoid(), (-one_NK).sigmoid()
        kl_NK = yes * (logsigmoid(one_NK) - logsigmoid(other_NK)) + no * (logsigmoid(-one_NK) - logsigmoid(-other_NK))
        return Distance(kl_NK.clamp_min(0).mean(-1), ((one_NK > 0) == (other_NK > 0)).all(-1), largest)
    size = one_NK.square().mean().sqrt()
    spread = (
        max(float(one_NK.std(correction=0)), 1e-3 * float(size), 1e-6) if len(one_NK) > 1 else max(float(size), 1e-6)
    )
    apart_N = (one_NK - other_NK).abs()[:, 0] / spread
    return Distance(apart_N.square() / 2, apart_N <= SAME_NUMBER, largest)


def _same_batch(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    return all(
        torch.equal(part, other[key]) if isinstance(part, torch.Tensor) else part == other[key]
        for key, part in one.items()
    )
