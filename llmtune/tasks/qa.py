"""Task qa: find the answer in a text; an encoder points at it, a decoder or encoder-decoder writes it.

Shapes: T positions of a window of a long context, L lengths of answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from llmtune.data.collators import encoder_batch, require_offsets
from llmtune.data.example import Example
from llmtune.data.overlong import too_long
from llmtune.data.row_store import iterate_rows
from llmtune.data.task_interface import Encoded
from llmtune.data.task_rows import QaRow
from llmtune.data.text_pairs import TextPair
from llmtune.data.tokenization import Segment, highlight
from llmtune.evaluate.evaluated_task import EvalPrediction, LoadedModel, PredictionT
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.text_metrics import measure_squad
from llmtune.evaluate.token_batches import run_encoder
from llmtune.model.causal_lm_loss import model_inputs
from llmtune.model.config import is_encoder
from llmtune.recipe.model_kind import SPANS
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import QaSection
from llmtune.records import Batch, Loss, Rows
from llmtune.tasks.base import Endpoint, Task, loss_of_rows
from llmtune.tasks.text_to_text import EncoderDecoder, PromptedDecoder, fill_template

Characters = tuple[int, int]
"""The first character and the one after the last."""


@dataclass(frozen=True)
class Window:
    """A window of a context after its question, as the model reads it."""

    ids: list[int]
    kinds: list[int]
    characters: list[Characters | None]
    """By token, its characters in the context without surrounding spaces; None for question and special tokens."""
    null: int
    """The token for `no answer`: the sequence token at the start."""
    opens: bool
    """Whether it contains the start of the context."""
    closes: bool
    """Whether it contains the end of the context."""


def cut_context(
    question: str, context: str, processor: PreTrainedTokenizerBase, stride: int, max_length: int
) -> list[Window] | str:
    """Return the windows of a question's context, each with the complete question; or why there are none."""
    question = question.strip()
    alone = len(processor(question, "")["input_ids"])
    if alone + stride >= max_length:
        limit = f"{max_length} tokens (data.max_length)"
        return f"too long: the question takes {alone} of {limit}, and leaves no room for windows"
    tokenized = processor(
        question,
        context,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows: list[Window] = []
    count = len(tokenized["input_ids"])
    for i, ids in enumerate(tokenized["input_ids"]):
        texts, offsets = tokenized.sequence_ids(i), tokenized["offset_mapping"][i]
        characters = [
            trim(context, *offset) if text == 1 else None for offset, text in zip(offsets, texts, strict=True)
        ]
        kinds = tokenized["token_type_ids"][i] if "token_type_ids" in tokenized else []
        null = ids.index(processor.cls_token_id) if processor.cls_token_id in ids else 0
        windows.append(Window(ids, kinds, characters, null, opens=i == 0, closes=i == count - 1))
    return windows


def trim(text: str, start: int, end: int) -> Characters:
    """Strip spaces from both ends of a range: byte-level and sentencepiece tokens begin with one."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def answer_tokens(window: Window, start: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token of an answer, given by its characters, if a window contains it completely.

    If the tokenizer drops a letter, the answer is only missed at the edge of a window: the next window may have it.
    """
    seen = _context_tokens(window)
    inside = [token for token, (left, right) in seen if left < end and right > start]
    if not inside:
        return None
    (first, (reach_left, _)), (last, (_, reach_right)) = seen[0], seen[-1]
    begins = window.opens or inside[0] != first or reach_left <= start
    ends = window.closes or inside[-1] != last or reach_right >= end
    return (inside[0], inside[-1]) if begins and ends else None


def _context_tokens(window: Window) -> list[tuple[int, Characters]]:
    """Return the tokens of the context that have characters, with these characters."""
    return [(token, at) for token, at in enumerate(window.characters) if at is not None and at[1] > at[0]]


def find_span(
    starts_T: torch.Tensor, ends_T: torch.Tensor, window: Window, longest: int
) -> tuple[float, int, int] | None:
    """Return the best answer of one window: its score, its first character in the context and the one after its last.

    Of all ordered pairs of context tokens at most `longest` tokens apart, it is the pair with the highest sum of
    logits. The SQuAD scripts consider only the 20 most likely tokens for each end.
    """
    inside_T = torch.tensor([at is not None and at[1] > at[0] for at in window.characters])
    if not inside_T.any():
        return None
    firsts_T, lasts_T = (part.cpu().masked_fill(~inside_T, -torch.inf) for part in (starts_T, ends_T))
    reach = min(longest, len(firsts_T))
    padded = torch.cat([lasts_T, lasts_T.new_full((reach - 1,), -torch.inf)])
    scores_TL = firsts_T[:, None] + padded.unfold(0, reach, 1)  # [first, tokens from it to the last]
    first, further = divmod(int(scores_TL.argmax()), reach)
    left, right = window.characters[first], window.characters[first + further]
    assert left is not None
    assert right is not None
    return float(scores_TL[first, further]), left[0], right[1]


METRICS = ("exact_match", "f1")
SOURCE = "question: {question} context: {context}"
"""The encoder-decoder's input, the format of T5's training on SQuAD."""
PROMPT = (
    "{context}\n\nAnswer with words from the text above, or say {no_answer} if it holds no answer.\n"
    "Question: {question}"
)
"""The text comes first: truncation to `data.max_length` removes its start and keeps the question."""


class Span(TypedDict):
    """A predicted answer: a range of the context, with its score and that of `no answer`."""

    text: str
    start: int | None
    end: int | None
    score: float | None
    null_score: float | None


NO_SPAN: Span = {"text": "", "start": None, "end": None, "score": None, "null_score": None}


class Qa(Task[QaRow, PredictionT]):
    """The rows of qa, and the text that a model reads to write its answers."""

    name = "qa"
    endpoint = Endpoint(
        "/v1/qa",
        "`text` (empty if the context has no answer), `start` and `end` in characters of the context, and scores; if "
        "the model generates its answers, the answer as text",
        prompt_field="question",
    )
    required_inputs = ("prompt", "context")
    style = "generative"
    default_prompt = SOURCE

    def make_row(self, given: Mapping[str, str | None]) -> QaRow:
        """Return the row of a question about a context."""
        return {"question": given["prompt"] or "", "context": given["context"] or "", "answers": None}

    def split_answer(self, row: QaRow) -> tuple[QaRow, str]:
        """Return the row without its answers, and the first answer as text."""
        return {**row, "answers": None}, row["answers"][0]["text"] if row["answers"] else "(no answer)"

    def fill_answer(self, row: QaRow, answer: str) -> QaRow:
        """Return the row with one answer, or with none if it is empty."""
        return {**row, "answers": [{"text": answer, "start": None}] if answer else []}

    def reference(self, row: QaRow) -> list[str]:
        """Return all answers; an empty list if the context has none."""
        return [answer["text"] for answer in row["answers"] or ()]

    def compute_metric(self, metric: str, output: EvalPrediction[PredictionT], recipe: Recipe) -> Measure | None:
        """Measure answers as the SQuAD 2 script does; the words for `no answer` are the empty answer."""
        if metric not in METRICS:
            return None
        empty = qa_section(recipe).no_answer.strip().lower().rstrip(".")
        texts = [str(answer["text"] if isinstance(answer, dict) else answer) for answer in output.predictions]
        texts = ["" if text.strip().lower().rstrip(".") == empty else text for text in texts]
        return measure_squad(metric, texts, output.references)

    def matches(self, recipe: Recipe) -> bool:
        """Whether the recipe selects generation."""
        return qa_section(recipe).style in ("auto", "generative")

    def pair(self, row: QaRow, recipe: Recipe) -> TextPair:
        """Return question and context as one text, and the first answer; an empty one if the answers were removed."""
        section = qa_section(recipe)
        template = section.prompt or self.default_prompt
        text = fill_template(template, question=row["question"], no_answer=section.no_answer, context=row["context"])
        answers = row["answers"]
        first = answers[0]["text"] if answers else section.no_answer
        return TextPair(text, "" if answers is None else first)


@dataclass(frozen=True)
class QaExample(Example):
    """A window of a context."""

    answer: Sequence[int] = ()
    """First and last token of the answer."""


class ExtractiveQa(Qa[Span]):
    """An encoder that points at the first and last token of an answer."""

    model_kind = SPANS
    example_type = QaExample
    style = "extractive"
    loss_unit = "windows"

    def matches(self, recipe: Recipe) -> bool:
        """Whether the recipe selects extraction."""
        return qa_section(recipe).style in ("auto", "extractive")

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether the model is an encoder."""
        return is_encoder(config)

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Set the threshold of `no answer` unless the recipe does; to never if every training row has an answer."""
        section = qa_section(recipe)
        if section.null_score_diff_threshold is not None:
            return recipe
        always = all(row["answers"] for _, row in iterate_rows(rows, "train"))
        threshold = math.inf if always else 0.0
        return recipe.model_copy(update={"qa": section.model_copy(update={"null_score_diff_threshold": threshold})})

    def encode(self, rows: Sequence[QaRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return an example for each window of a row; windows without the answer point at `no answer`."""
        require_offsets(processor)
        return super().encode(rows, processor, recipe)

    def encode_row(self, row: QaRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Encoded:
        """Return the windows of one row."""
        windows = windows_of(row, processor, recipe)
        if isinstance(windows, str):
            return windows
        if len(windows) > 1 and recipe.data.on_overlong == "drop":
            return too_long(sum(len(window.ids) for window in windows), recipe.data.max_length)
        if not row["answers"]:
            return [window_example(window, None) for window in windows]
        answer = row["answers"][0]
        assert answer["start"] is not None
        characters = trim(row["context"], answer["start"], answer["start"] + len(answer["text"]))
        ends = [answer_tokens(window, *characters) for window in windows]
        if not any(ends):
            start, end = characters
            offsets = [pair for window in windows for _, pair in _context_tokens(window)]
            if any(left < end and right > start for left, right in offsets):
                return "no window contains the complete answer: raise qa.stride or data.max_length"
            return "the tokenizer makes no token of the answer"
        return [window_example(window, tokens) for window, tokens in zip(windows, ends, strict=True)]

    def answer_limit(self, recipe: Recipe) -> tuple[str, int]:
        """Return `qa.max_answer_length`: `predict` gives no longer answer."""
        return "qa.max_answer_length", qa_section(recipe).max_answer_length

    def answer_size(self, example: QaExample) -> int:
        """Return the tokens of the answer in a window; `no answer` is one."""
        return example.answer[1] - example.answer[0] + 1

    def collate(
        self, examples: Sequence[QaExample], processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool, draw: int
    ) -> Batch:
        """Add the first and last token of the answers, `first_R` and `last_R` [R], counted within the window."""
        first_R, last_R = torch.tensor([list(example.answer) for example in examples], dtype=torch.int64).T
        return encoder_batch(examples, processor.pad_token_id, packs)[0] | {"first_R": first_R, "last_R": last_R}

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum over windows the mean cross entropy of the answer's first and last token; padding is excluded."""
        output = model(**model_inputs(model, batch))
        starts_RT, ends_RT = (by_window(part.float(), batch) for part in (output.start_logits, output.end_logits))
        first_R, last_R = batch["first_R"], batch["last_R"]
        losses_R = (
            functional.cross_entropy(starts_RT, first_R, reduction="none")
            + functional.cross_entropy(ends_RT, last_R, reduction="none")
        ) / 2
        correct_R = (starts_RT.argmax(-1) == first_R) & (ends_RT.argmax(-1) == last_R)
        return loss_of_rows(losses_R, correct_R, by_row)

    def highlighted_text(self, example: QaExample, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Segment]:
        """Show a window with its answer; without an answer, show the token for `no answer`."""
        first, last = example.answer
        return highlight(example.input_ids, [first, last + 1], processor)

    def export_constants(self, recipe: Recipe, processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the longest answer in tokens and the threshold of `no answer`, None for never."""
        section = qa_section(recipe)
        threshold = section.null_score_diff_threshold or 0.0
        limit = threshold if math.isfinite(threshold) else None
        return {"longest_answer": section.max_answer_length, "threshold": limit}

    def predict(self, rows: Sequence[QaRow], loaded: LoadedModel) -> list[Span]:
        """Return the best span of each context over all windows; scores are sums of two logits.

        An empty text means `no answer`: its score exceeds the best answer's by more than
        `qa.null_score_diff_threshold`. A question that leaves no room for windows gets no answer.
        """
        processor, section = loaded.processor, qa_section(loaded.recipe)
        windows: list[tuple[int, Window]] = []
        for i, row in enumerate(rows):
            cut = windows_of(row, processor, loaded.recipe)
            windows += [] if isinstance(cut, str) else [(i, window) for window in cut]
        spans = [NO_SPAN.copy() for _ in rows]

        def take(at: int, output: QuestionAnsweringModelOutput, row: int) -> None:
            i, window = windows[at]
            span, size = spans[i], len(window.ids)
            starts_T, ends_T = (part[row, :size].float() for part in (output.start_logits, output.end_logits))
            null = float(starts_T[window.null] + ends_T[window.null])
            span["null_score"] = null if span["null_score"] is None else min(span["null_score"], null)
            best = find_span(starts_T, ends_T, window, section.max_answer_length)
            if best is not None and (span["score"] is None or best[0] > span["score"]):
                span["score"], start, end = best
                span["text"], span["start"], span["end"] = rows[i]["context"][start:end], start, end

        examples = [window_example(window, None) for _, window in windows]
        run_encoder(loaded.model, examples, processor.pad_token_id, loaded.device, take)
        for span in spans:
            score, null = span["score"], span["null_score"]
            if score is None or null is None or null - score > (section.null_score_diff_threshold or 0.0):
                span["text"], span["start"], span["end"] = "", None, None
        loaded.advance(len(rows))
        return spans

    def format_prediction(self, prediction: Span) -> str:
        """Write the text of an answer."""
        return prediction["text"] or "(no answer)"

    def format_answer(self, prediction: Span, row: QaRow) -> str:
        """Write an answer with its position in the context."""
        place = f"\n(characters {prediction['start']} to {prediction['end']} of the context)"
        return self.format_prediction(prediction) + (place if prediction["text"] else "")

    def baseline(
        self, references: Sequence[list[str]], prompts: Sequence[QaRow], recipe: Recipe
    ) -> tuple[str, list[Span]]:
        """Predict no answer to every question."""
        return "no answer to every question", [NO_SPAN.copy() for _ in prompts]


def windows_of(row: QaRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Window] | str:
    """Return the windows of a row, or why there are none."""
    stride = min(qa_section(recipe).stride, recipe.data.max_length // 2 - 1)  # the default may be longer
    return cut_context(row["question"], row["context"], processor, stride, recipe.data.max_length)


def window_example(window: Window, ends: tuple[int, int] | None) -> QaExample:
    """Return the example of a window with the first and last token of its answer, or of `no answer`."""
    types, answer = window.kinds if any(window.kinds) else [], list(ends or (window.null, window.null))
    return QaExample(window.ids, [], 0, token_type_ids=types, counted=1, answer=answer)


def by_window(logits_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the logits of each window as a row of [R, T], with the lowest number at missing tokens."""
    lowest = torch.finfo(logits_BT.dtype).min
    if "document_lengths" not in batch:
        return logits_BT.masked_fill(~batch["attention_mask"].bool(), lowest)
    return pad_sequence([*torch.split(logits_BT[0], batch["document_lengths"])], batch_first=True, padding_value=lowest)


class QaEncoderDecoder(Qa[str], EncoderDecoder[QaRow]):
    """An encoder-decoder that writes its answers."""


class QaDecoder(Qa[str], PromptedDecoder[QaRow]):
    """A decoder that answers a prompt."""

    default_prompt = PROMPT


def qa_section(recipe: Recipe) -> QaSection:
    """Return the recipe's section, or its defaults."""
    return recipe.qa or QaSection()


VARIANTS = (ExtractiveQa(), QaEncoderDecoder(), QaDecoder())
