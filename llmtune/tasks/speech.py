"""Task speech: write down what is said, with Whisper or with a model of letters (wav2vec2 and its relatives)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.data_report import pair_pieces
from llmtune.data.speech_encoding import encode_ctc, encode_whisper, set_speech
from llmtune.data.target_collators import ctc_collator, whisper_collator
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.metrics import Measure
from llmtune.evaluate.transcription import transcribe_ctc, transcribe_whisper
from llmtune.evaluate.wer import find_spellings, measure_cer, measure_wer
from llmtune.model.decoder_start import check_decoder_start
from llmtune.model.task_losses import ctc_loss, seq2seq_loss
from llmtune.recipe import SpeechSection
from llmtune.records import Row, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

MEASURES = {"wer": measure_wer, "cer": measure_cer}


def prompt(row: Row) -> tuple[Row, str]:
    """Return the row without its transcript, and the transcript."""
    return {**row, "text": ""}, row["text"]


def ask(given: Mapping[str, str | None]) -> Row:
    """Return the row of a recording."""
    return {"audio": str(Path(given["audio"] or "").absolute()), "content": "", "text": ""}


def measure(
    metric: str, said: Sequence[str], wanted: Sequence[str], recipe: Recipe, base: Sequence[Any] | None = None
) -> Measure | None:
    """Measure transcripts after the recipe's normaliser."""
    if metric not in MEASURES:
        return None
    section = recipe.speech or SpeechSection()
    language = section.language if section.task == "transcribe" and section.language else "en"
    spellings = find_spellings(recipe.model) if section.normalizer == "whisper" else None
    return MEASURES[metric](said, wanted, section.normalizer, language, spellings)


def baseline(learned: Sequence[str], questions: Sequence[Row], recipe: Recipe) -> tuple[str, list[Any]]:
    """Write nothing down."""
    return "an empty transcript", [""] * len(questions)


def is_whisper(config: Any) -> bool:
    """Whether a model's decoder begins with tokens of language and task."""
    return bool(config.model_type == "whisper")


def hears_waves(config: Any) -> bool:
    """Whether a model of letters makes its frames out of samples by convolutions; others want spectrograms."""
    return hasattr(config, "conv_kernel")


def check_whisper(model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Set language and task, which are saved with the tokenizer; hold the tokens against those of the model.

    Raises EnvironmentProblem where model and tokenizer do not belong together.
    """
    check_decoder_start(model, processor, recipe)
    set_speech(processor, recipe)
    start = processor.prefix_tokens[0]
    if start != model.config.decoder_start_token_id:
        what = f"the decoder starts with token {model.config.decoder_start_token_id}, and the tokenizer's is {start}"
        raise EnvironmentProblem.of(what, str(processor.name_or_path), "The tokenizer is another model's.")


def check_letters(model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Hold the letters of a model against its tokenizer's.

    Layers are no longer dropped whole, set in place: one without a gradient would stop training in several processes.
    Raises EnvironmentProblem where model and tokenizer do not belong together.
    """
    config, where = model.config, str(processor.name_or_path)
    config.layerdrop = 0.0
    if recipe.model.add_tokens:
        raise RecipeError.of("this model writes letters alone", "model.add_tokens", "Remove it.")
    if processor.vocab_size > config.vocab_size:
        what = f"the tokenizer has {processor.vocab_size} letters, and the model tells {config.vocab_size} apart"
        raise EnvironmentProblem.of(what, where, "Set vocab_size in config.json to the tokenizer's, for a new head.")
    if config.pad_token_id != processor.pad_token_id:
        what = f"the blank is token {config.pad_token_id} in config.json, and {processor.pad_token_id} in the tokenizer"
        raise EnvironmentProblem.of(what, where, "Set pad_token_id in config.json to what the model was trained with.")


WHISPER = Task(
    name="speech",
    auto_class="AutoModelForSpeechSeq2Seq",
    peft_task_type=None,
    encode=encode_whisper,
    collator=whisper_collator,
    loss=seq2seq_loss,
    prompt=prompt,
    predict=transcribe_whisper,
    measure=measure,
    ask=ask,
    asks={"audio": True},
    pieces=pair_pieces,
    check=check_whisper,
    fits=is_whisper,
)
CTC = Task(
    name="speech",
    auto_class="AutoModelForCTC",
    peft_task_type=None,
    encode=encode_ctc,
    collator=ctc_collator,
    loss=ctc_loss,
    prompt=prompt,
    predict=transcribe_ctc,
    measure=measure,
    baseline=baseline,
    ask=ask,
    asks={"audio": True},
    pieces=pair_pieces,
    check=check_letters,
    fits=hears_waves,
    unit="letters",
    by_token=False,
    headed=True,
)
FORMS = (WHISPER, CTC)
