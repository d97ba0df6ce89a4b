"""What translate, summarize and generative qa share: a text is read, another is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmtune.data.collators import causal_collator
from llmtune.data.data_report import pair_pieces
from llmtune.data.seq2seq_encoding import Pair, encode_by_prompt, encode_seq2seq, render_by_prompt
from llmtune.data.target_collators import seq2seq_collator
from llmtune.data.task_interface import Encoded
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.task_predictions import write_texts
from llmtune.evaluate.text_metrics import TEXT_MEASURES
from llmtune.model import causal_loss
from llmtune.model.decoder_start import check_decoder_start
from llmtune.model.task_losses import seq2seq_loss
from llmtune.records import Advance, Batch, Collate, Example, Loss
from llmtune.tasks.base import RowT, Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


class TextToText(Task[RowT, str]):
    """A task whose answer is a text made of a text."""

    def pair(self, row: RowT, recipe: Recipe) -> Pair:
        """Return what is read, as the model's kind wants it, and what is written."""
        raise NotImplementedError

    def compute_metric(
        self,
        metric: str,
        predictions: Sequence[str],
        references: Sequence[Any],
        recipe: Recipe,
        base: Sequence[str] | None = None,
    ) -> Measure | None:
        """Measure generated texts; metrics of tokens are not the task's own."""
        return TEXT_MEASURES[metric](predictions, references) if metric in TEXT_MEASURES else None


class EncoderDecoder(TextToText[RowT]):
    """What an encoder-decoder does: the encoder reads the source, the decoder writes the target."""

    auto_class = "AutoModelForSeq2SeqLM"
    peft_task_type = "SEQ_2_SEQ_LM"

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Refuse a decoder without a start token."""
        check_decoder_start(model, processor, recipe)

    def encode(self, rows: Sequence[RowT], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example a row: the source for the encoder, the target with its end for the decoder."""
        return encode_seq2seq(rows, processor, recipe, self.pair)

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what pads sources and targets."""
        return seq2seq_collator(processor, recipe)

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the target tokens that are learned."""
        return seq2seq_loss(model, batch, by_row)

    def highlighted_text(
        self, example: Example, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[tuple[str, bool]]:
        """Show what is read, and what of the written text is learned."""
        return pair_pieces(example, processor, recipe)

    def predict(
        self,
        model: torch.nn.Module,
        rows: Sequence[RowT],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        *,
        device: str,
        advance: Advance = lambda rows: None,
    ) -> list[str]:
        """Return what the decoder writes for each source."""
        return write_texts(model, rows, processor, recipe, self.pair, device=device, advance=advance)


class PromptedDecoder(TextToText[RowT]):
    """What a decoder does: it answers a prompt, in its chat template where it has one."""

    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    packs = True
    predicts = False
    continues_text = True

    def encode(self, rows: Sequence[RowT], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example a row: the prompt, and the target as the model's answer."""
        return encode_by_prompt(rows, processor, recipe, self.pair)

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what packs rows, or pads them."""
        return causal_collator(processor, recipe, packs)

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the answers' tokens."""
        return causal_loss(model, batch, by_row)

    def prompt_ids(self, row: RowT, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids to generate the target from."""
        return render_by_prompt(row, processor, recipe, self.pair)


def fill_template(template: str, **fields: str | None) -> str:
    """Put fields into a prompt; braces that are no field stay, and so do those within a field."""
    named = "|".join(map(re.escape, fields))
    return re.sub(f"{{({named})}}", lambda match: fields[match[1]] or "", template)
