"""Task speech: write down what is said, with Whisper or with a model of letters (wav2vec2 and its relatives)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from llmtune.data.data_report import pair_pieces
from llmtune.data.speech_encoding import encode_ctc, encode_whisper, set_speech
from llmtune.data.target_collators import ctc_collator, whisper_collator
from llmtune.data.task_interface import Encoded
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.transcription import transcribe_ctc, transcribe_whisper
from llmtune.evaluate.wer import find_spellings, measure_cer, measure_wer
from llmtune.model.decoder_start import check_decoder_start
from llmtune.model.task_losses import ctc_loss, seq2seq_loss
from llmtune.recipe import SpeechSection
from llmtune.records import Advance, Batch, Collate, Example, Loss
from llmtune.tasks.base import Task

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

MEASURES = {"wer": measure_wer, "cer": measure_cer}


class SpeechRow(TypedDict):
    """A recording and what is said in it."""

    audio: str
    """The file."""
    content: str
    """Its hash."""
    text: str


class Speech(Task[SpeechRow, str]):
    """The rows of speech."""

    name = "speech"
    required_inputs = ("audio",)
    takes_audio = True

    def make_row(self, given: Mapping[str, str | None]) -> SpeechRow:
        """Return the row of a recording."""
        return {"audio": str(Path(given["audio"] or "").absolute()), "content": "", "text": ""}

    def split_answer(self, row: SpeechRow) -> tuple[SpeechRow, str]:
        """Return the row without its transcript, and the transcript."""
        return {**row, "text": ""}, row["text"]

    def highlighted_text(
        self, example: Example, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[tuple[str, bool]]:
        """Show how long a recording is, and what of its transcript is learned."""
        return pair_pieces(example, processor, recipe)

    def compute_metric(
        self,
        metric: str,
        predictions: Sequence[str],
        references: Sequence[str],
        recipe: Recipe,
        base: Sequence[str] | None = None,
    ) -> Measure | None:
        """Measure transcripts after the recipe's normaliser."""
        if metric not in MEASURES:
            return None
        section = recipe.speech or SpeechSection()
        language = section.language if section.task == "transcribe" and section.language else "en"
        spellings = find_spellings(recipe.model) if section.normalizer == "whisper" else None
        return MEASURES[metric](predictions, references, section.normalizer, language, spellings)


class Whisper(Speech):
    """A model whose decoder begins with tokens of language and task."""

    auto_class = "AutoModelForSpeechSeq2Seq"

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether the model is a Whisper."""
        return bool(config.model_type == "whisper")

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Set language and task, which are saved with the tokenizer; hold the tokens against those of the model.

        Raises EnvironmentProblem where model and tokenizer do not belong together.
        """
        check_decoder_start(model, processor, recipe)
        set_speech(processor, recipe)
        start = processor.prefix_tokens[0]
        if start != model.config.decoder_start_token_id:
            what = (
                f"the decoder starts with token {model.config.decoder_start_token_id}, and the tokenizer's is {start}"
            )
            raise EnvironmentProblem.of(what, str(processor.name_or_path), "The tokenizer is another model's.")

    def encode(self, rows: Sequence[SpeechRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example a row: the samples, and the transcript behind the tokens of language and task."""
        return encode_whisper(rows, processor, recipe)

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what makes log-mel spectrograms of samples."""
        return whisper_collator(processor, recipe)

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the transcripts' tokens."""
        return seq2seq_loss(model, batch, by_row)

    def predict(
        self,
        model: torch.nn.Module,
        rows: Sequence[SpeechRow],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        *,
        device: str,
        advance: Advance = lambda rows: None,
    ) -> list[str]:
        """Return the transcripts."""
        return transcribe_whisper(model, rows, processor, recipe, device=device, advance=advance)


class Ctc(Speech):
    """A model that gives each frame of a recording a letter, or none."""

    auto_class = "AutoModelForCTC"
    loss_unit = "letters"
    predicts_tokens = False
    trains_head = True

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether the model makes its frames out of samples by convolutions; others want spectrograms."""
        return hasattr(config, "conv_kernel")

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Hold the letters of a model against its tokenizer's.

        Layers are no longer dropped whole, set in place: one without a gradient would stop training in several
        processes. Raises EnvironmentProblem where model and tokenizer do not belong together.
        """
        config, where = model.config, str(processor.name_or_path)
        config.layerdrop = 0.0
        if recipe.model.add_tokens:
            raise RecipeError.of("this model writes letters alone", "model.add_tokens", "Remove it.")
        if processor.vocab_size > config.vocab_size:
            what = f"the tokenizer has {processor.vocab_size} letters, and the model tells {config.vocab_size} apart"
            fix = "Set vocab_size in config.json to the tokenizer's, for a new head."
            raise EnvironmentProblem.of(what, where, fix)
        if config.pad_token_id != processor.pad_token_id:
            ours, own = processor.pad_token_id, config.pad_token_id
            what = f"the blank is token {own} in config.json, and {ours} in the tokenizer"
            fix = "Set pad_token_id in config.json to what the model was trained with."
            raise EnvironmentProblem.of(what, where, fix)

    def encode(self, rows: Sequence[SpeechRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example a row: the samples, and the letters of the transcript."""
        return encode_ctc(rows, processor, recipe)

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what norms and pads waves."""
        return ctc_collator(processor, recipe)

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the negative log-likelihood of the transcripts over all alignments."""
        return ctc_loss(model, batch, by_row)

    def predict(
        self,
        model: torch.nn.Module,
        rows: Sequence[SpeechRow],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        *,
        device: str,
        advance: Advance = lambda rows: None,
    ) -> list[str]:
        """Return the likeliest letter of each frame, repeats and blanks taken out."""
        return transcribe_ctc(model, rows, processor, recipe, device=device, advance=advance)

    def baseline(
        self, references: Sequence[str], prompts: Sequence[SpeechRow], recipe: Recipe
    ) -> tuple[str, list[str]]:
        """Write nothing down."""
        return "an empty transcript", [""] * len(prompts)


VARIANTS = (Whisper(), Ctc())
