"""Task qa: find the answer in a text; an encoder points at it, a decoder or an encoder-decoder writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llmtune.data import iterate_rows
from llmtune.data.data_report import ends_pieces
from llmtune.data.label_encoding import encode_windows
from llmtune.data.seq2seq_encoding import Pair, encode_by_prompt, encode_seq2seq, render_by_prompt
from llmtune.data.target_collators import ends_collator
from llmtune.evaluate.metrics import Measure
from llmtune.evaluate.task_predictions import predict_ends, write_texts
from llmtune.evaluate.text_metrics import measure_squad
from llmtune.model.config import is_encoder
from llmtune.model.task_losses import ends_loss
from llmtune.recipe import QaSection
from llmtune.records import Row, Rows, Task
from llmtune.tasks import translate
from llmtune.tasks.translate import fill

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

METRICS = ("exact_match", "f1")
ASKS = {"prompt": True, "context": True}
READ = "question: {question} context: {context}"
PROMPT = (
    "{context}\n\nAnswer with words from the text above, or say {no_answer} if it holds no answer.\n"
    "Question: {question}"
)
"""The text comes first: where it is cut to `data.max_length`, its start goes, and the question stays."""


def section(recipe: Recipe) -> QaSection:
    """Return the recipe's section, or its defaults."""
    return recipe.qa or QaSection()


def written(row: Row, recipe: Recipe, otherwise: str) -> Pair:
    """Return question and context in one text, and the first answer."""
    about = section(recipe)
    text = fill(about.prompt or otherwise, question=row["question"], no_answer=about.no_answer, context=row["context"])
    return Pair(text, answer_text(row, about.no_answer))


def answer_text(row: Row, no_answer: str) -> str:
    """Return the first answer; what is said where there is none; nothing for a row whose answers were taken away."""
    if row["answers"] is None:
        return ""
    return str(row["answers"][0]["text"]) if row["answers"] else no_answer


def for_encoder(row: Row, recipe: Recipe) -> Pair:
    """Return what an encoder-decoder reads, as T5 was trained on SQuAD."""
    return written(row, recipe, READ)


def for_decoder(row: Row, recipe: Recipe) -> Pair:
    """Return a prompt."""
    return written(row, recipe, PROMPT)


def prompt(row: Row) -> tuple[Row, str]:
    """Return the row without its answers, and the first of them as text."""
    return {**row, "answers": None}, row["answers"][0]["text"] if row["answers"] else "(no answer)"


def reference(row: Row) -> list[str]:
    """Return all answers; none is an empty list."""
    return [answer["text"] for answer in row["answers"]]


def ask(given: Mapping[str, str | None]) -> Row:
    """Return the row of a question on a context."""
    return {"question": given["prompt"] or "", "context": given["context"] or "", "answers": None}


def write(said: Any) -> str:
    """Say an answer with its place."""
    if not said["text"]:
        return "(no answer)"
    return str(said["text"])


def tell(said: Any, row: Row) -> str:
    """Say an answer with its place in the context."""
    if not said["text"]:
        return write(said)
    return f"{said['text']}\n(characters {said['start']} to {said['end']} of the context)"


def measure(
    metric: str, said: Sequence[Any], wanted: Sequence[list[str]], recipe: Recipe, base: Sequence[Any] | None = None
) -> Measure | None:
    """Measure answers as the SQuAD 2 script counts; the words for `no answer` are the empty answer."""
    if metric not in METRICS:
        return None
    empty = section(recipe).no_answer.strip().lower().rstrip(".")
    texts = [answer["text"] if isinstance(answer, dict) else answer for answer in said]
    texts = ["" if text.strip().lower().rstrip(".") == empty else text for text in texts]
    return measure_squad(metric, texts, wanted)


def baseline(learned: Sequence[list[str]], questions: Sequence[Row], recipe: Recipe) -> tuple[str, list[Any]]:
    """Say `no answer` to every question."""
    nothing = {"text": "", "start": None, "end": None, "score": None, "null_score": None}
    return "no answer to every question", [dict(nothing) for _ in questions]


def settle(recipe: Recipe, rows: Rows, config: Any) -> Recipe:
    """Say when `no answer` is said, unless the recipe does: never, where every training row has an answer."""
    if section(recipe).null_score_diff_threshold is not None:
        return recipe
    always = all(row["answers"] for _, row in iterate_rows(rows, "train"))
    threshold = math.inf if always else 0.0
    return recipe.model_copy(update={"qa": section(recipe).model_copy(update={"null_score_diff_threshold": threshold})})


def extracts(recipe: Recipe) -> bool:
    """Whether the recipe lets the model point."""
    return section(recipe).style in ("auto", "extractive")


def generates(recipe: Recipe) -> bool:
    """Whether the recipe lets the model write."""
    return section(recipe).style in ("auto", "generative")


EXTRACTIVE = Task(
    name="qa",
    auto_class="AutoModelForQuestionAnswering",
    peft_task_type="QUESTION_ANS",
    encode=encode_windows,
    collator=ends_collator,
    loss=ends_loss,
    prompt=prompt,
    predict=predict_ends,
    measure=measure,
    reference=reference,
    write=write,
    tell=tell,
    baseline=baseline,
    ask=ask,
    asks=ASKS,
    settle=settle,
    pieces=ends_pieces,
    admits=extracts,
    fits=is_encoder,
    packs=True,
    unit="windows",
    by_token=False,
    headed=True,
)
SEQ2SEQ = replace(
    translate.SEQ2SEQ,
    name="qa",
    encode=partial(encode_seq2seq, to_pair=for_encoder),
    prompt=prompt,
    predict=partial(write_texts, to_pair=for_encoder),
    measure=measure,
    reference=reference,
    ask=ask,
    asks=ASKS,
    admits=generates,
)
DECODER = replace(
    translate.DECODER,
    name="qa",
    encode=partial(encode_by_prompt, to_pair=for_decoder),
    prompt=prompt,
    render=partial(render_by_prompt, to_pair=for_decoder),
    measure=measure,
    reference=reference,
    ask=ask,
    asks=ASKS,
    admits=generates,
)
FORMS = (EXTRACTIVE, SEQ2SEQ, DECODER)
