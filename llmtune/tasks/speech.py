"""Task speech: write down what is said, with Whisper or with a model of letters (wav2vec2 and its relatives)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.collate_targets import ctc_collator, whisper_collator
from llmtune.data.encode_pairs import encode_ctc, encode_whisper
from llmtune.data.report import pair_pieces
from llmtune.evaluate.metrics import Measure
from llmtune.evaluate.transcribe import transcribe_ctc, transcribe_whisper
from llmtune.evaluate.transcripts import measure_cer, measure_wer
from llmtune.model.losses import ctc_loss, seq2seq_loss
from llmtune.model.seq2seq import check_decoder_start
from llmtune.recipe import SpeechSection
from llmtune.records import Row, Task

if TYPE_CHECKING:
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
    return MEASURES[metric](said, wanted, section.normalizer, language)


def baseline(learned: Sequence[str], questions: Sequence[Row], recipe: Recipe) -> tuple[str, list[Any]]:
    """Write nothing down."""
    return "an empty transcript", [""] * len(questions)


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
    pieces=pair_pieces,
    check=check_decoder_start,
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
    pieces=pair_pieces,
    by_token=False,
    headed=True,
)
FORMS = (WHISPER, CTC)
