"""What models say of rows when it is no continuation of a prompt: classes, tags, places of answers, translations.

Each function takes prompt rows and gives one JSON value a row, in their order. Shapes: B rows, T positions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from llmtune.data.collate_targets import pad, read_text
from llmtune.data.encode_labelled import Window, cut_context, place_words, tag_names
from llmtune.data.encode_pairs import ToPair, first_token, source_ids
from llmtune.evaluate.batches import GENERATION_BUDGET, TOKEN_BUDGET, budget_for, run_in_batches
from llmtune.evaluate.generation import generation_settings, only_these_settings
from llmtune.model.loss import unwrap
from llmtune.model.losses import read_inputs
from llmtune.model.plan import context_of
from llmtune.records import Advance, Example, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

CANDIDATES = 20
"""Ends of answers that are looked at on either side, as in the SQuAD scripts."""


def in_batches(
    model: torch.nn.Module,
    examples: Sequence[Example],
    pad_id: int | None,
    device: str,
    take: Callable[[int, Any, int], None],
    advance: Advance = lambda rows: None,
) -> None:
    """Run encoded texts through a model without gradient; `take(i, output, row of the batch)` gets each one's part."""

    def work(batch: list[int]) -> None:
        tensors = read_text([examples[i] for i in batch], pad_id)
        moved = {key: part.to(device) for key, part in tensors.items() if isinstance(part, torch.Tensor)}
        found = model(**read_inputs(model, moved))
        for row, i in enumerate(batch):
            take(i, found, row)
        advance(len(batch))

    run_in_batches([len(example.input_ids) for example in examples], budget_for(device, TOKEN_BUDGET), work)


# Classes


def predict_classes(
    model: torch.nn.Module,
    rows: Sequence[Row],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[dict[str, Any]]:
    """Return `{label, scores}`: probabilities by class (`label` is a list where there are many), or one number."""
    section = recipe.classify
    assert section is not None
    texts = [row["text"] for row in rows]
    pairs = [row["pair"] or "" for row in rows] if any(row["pair"] for row in rows) else None
    limit = recipe.data.max_length
    found = processor(texts, pairs, truncation=True, max_length=limit, return_attention_mask=False)
    kinds = found.get("token_type_ids") or [()] * len(rows)
    examples = [
        Example(ids, [], 0, third_ids=third if any(third) else ())
        for ids, third in zip(found["input_ids"], kinds, strict=True)
    ]
    said: list[dict[str, Any]] = [{} for _ in rows]

    def take(i: int, output: Any, row: int) -> None:
        said[i] = name_classes(output.logits[row].float(), section.kind, section.labels or ())

    in_batches(model, examples, processor.pad_token_id, device, take, advance)
    return said


def name_classes(logits_K: torch.Tensor, kind: str, labels: Sequence[str]) -> dict[str, Any]:
    """Turn a row's logits [K] into its label and scores."""
    scores_K = logits_K if kind == "regression" else logits_K.sigmoid() if kind == "multi" else logits_K.softmax(-1)
    return {"label": name_of(scores_K, kind, labels), "scores": scores_K.tolist()}


def name_of(scores_K: Any, kind: str, labels: Sequence[str]) -> str | float | list[str]:
    """Return the label of scores [K]: the likeliest class, all above one half, or the number itself."""
    if kind == "regression":
        return float(scores_K[0])
    if kind == "multi":
        return [name for name, share in zip(labels, scores_K.tolist(), strict=True) if share > 0.5]
    return labels[int(scores_K.argmax())]


# Masked tokens


def fill_masks(
    model: torch.nn.Module,
    rows: Sequence[Row],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[str]:
    """Return each text with its mask tokens replaced by the likeliest ones, all at once; others come back as they are."""
    texts = [row["prompt"] + row["completion"] for row in rows]
    found = processor(texts, truncation=True, max_length=recipe.data.max_length)["input_ids"]
    said = list(texts)

    def take(i: int, output: Any, row: int) -> None:
        best = output.logits[row].argmax(-1).tolist()
        ids = [best[at] if token == processor.mask_token_id else token for at, token in enumerate(found[i])]
        if ids != found[i]:
            said[i] = str(processor.decode(ids, skip_special_tokens=True))

    masked = [i for i, ids in enumerate(found) if processor.mask_token_id in ids]
    examples = [Example(found[i], [], 0) for i in masked]
    in_batches(model, examples, processor.pad_token_id, device, lambda at, out, row: take(masked[at], out, row))
    advance(len(rows))
    return said


# Tags


def predict_tags(
    model: torch.nn.Module,
    rows: Sequence[Row],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[list[str]]:
    """Return the tag of each word, by its first token; a word that the tokenizer makes nothing of is outside."""
    names = tag_names((recipe.token_classify.labels if recipe.token_classify else None) or ())
    placed = place_words(rows, processor)
    said: list[list[str]] = [[] for _ in rows]

    def take(i: int, output: Any, row: int) -> None:
        best = output.logits[row].argmax(-1).tolist()
        said[i] = [names[best[place]] if place is not None else names[0] for place in placed[i][1]]

    examples = [Example(ids, [], 0) for ids, _ in placed]
    in_batches(model, examples, processor.pad_token_id, device, take, advance)
    return said


# Answers in a context


def predict_ends(
    model: torch.nn.Module,
    rows: Sequence[Row],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[dict[str, Any]]:
    """Return `{text, start, end, score, null_score}`: the best stretch of the context over all windows.

    An empty text is `no answer`: where its score is above the best answer's by more than
    `qa.null_score_diff_threshold`. Scores are sums of two logits. A question without room for windows gets no answer.
    """
    longest = recipe.qa.max_answer_length if recipe.qa else 30
    threshold = recipe.qa.null_score_diff_threshold if recipe.qa else 0.0
    windows: list[tuple[int, Window]] = []
    for i, row in enumerate(rows):
        cut = cut_context(row, processor, recipe)
        windows += [] if isinstance(cut, str) else [(i, window) for window in cut]
    best: list[dict[str, Any]] = [{"text": "", "start": None, "end": None, "score": None} for _ in rows]
    null = [float("inf")] * len(rows)

    def take(at: int, output: Any, row: int) -> None:
        i, window = windows[at]
        size = len(window.ids)
        starts_T, ends_T = (part[row, :size].float() for part in (output.start_logits, output.end_logits))
        null[i] = min(null[i], float(starts_T[window.null] + ends_T[window.null]))
        found = find_span(starts_T, ends_T, window, longest)
        if found is not None and (best[i]["score"] is None or found[0] > best[i]["score"]):
            score, start, end = found
            best[i] = {"text": rows[i]["context"][start:end], "start": start, "end": end, "score": score}

    examples = [Example(w.ids, [], 0, third_ids=w.kinds if any(w.kinds) else ()) for _, w in windows]
    in_batches(model, examples, processor.pad_token_id, device, take)
    for i, found in enumerate(best):
        found["null_score"] = None if null[i] == float("inf") else null[i]
        if found["score"] is None or null[i] - found["score"] > threshold:
            found |= {"text": "", "start": None, "end": None}
    advance(len(rows))
    return best


def find_span(
    starts_T: torch.Tensor, ends_T: torch.Tensor, window: Window, longest: int
) -> tuple[float, int, int] | None:
    """Return the best answer of one window as its score and its first and last character in the context.

    Among the likeliest first and last tokens in the context, the pair of the highest sum that is in order and no longer
    than `longest` tokens.
    """
    inside = torch.tensor([place is not None and place[1] > place[0] for place in window.places])
    if not inside.any():
        return None
    lowest = torch.finfo(torch.float32).min
    firsts_T, lasts_T = (part.cpu().masked_fill(~inside, lowest) for part in (starts_T, ends_T))
    few = min(CANDIDATES, int(inside.sum()))
    found: tuple[float, int, int] | None = None
    for first in firsts_T.topk(few).indices.tolist():
        for last in lasts_T.topk(few).indices.tolist():
            score = float(firsts_T[first] + lasts_T[last])
            if first <= last < first + longest and (found is None or score > found[0]):
                left, right = window.places[first], window.places[last]
                assert left is not None
                assert right is not None
                found = (score, left[0], right[1])
    if found is None:  # the likeliest ends are out of order: the best single token
        only = int((firsts_T + lasts_T).argmax())
        place = window.places[only]
        assert place is not None
        found = (float(firsts_T[only] + lasts_T[only]), place[0], place[1])
    return found


# Texts that an encoder-decoder writes


def write_texts(
    model: torch.nn.Module,
    rows: Sequence[Row],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    to_pair: ToPair,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[str]:
    """Return what the decoder writes for each source, begun in the row's target language where the model wants that.

    A source longer than the model's positions is cut at its end.
    """
    limit = context_of(unwrap(model).config)
    pairs = [to_pair(row, recipe) for row in rows]
    sources = [_fit(source_ids(pair, processor, recipe), limit) for pair in pairs]
    firsts = [first_token(pair, processor) for pair in pairs]
    texts = [""] * len(rows)
    new = recipe.generation.max_new_tokens
    with torch.random.fork_rng(), only_these_settings(model) as own:
        torch.manual_seed(recipe.seed)
        for first in sorted(set(firsts), key=str):
            group = [i for i, wanted in enumerate(firsts) if wanted == first]
            settings = decoder_settings(own, model, processor, recipe, first)

            def work(batch: list[int], group: list[int] = group, settings: GenerationConfig = settings) -> None:
                ids = [sources[group[i]] for i in batch]
                read = {"input_ids": pad(ids, processor.pad_token_id or 0)}
                read["attention_mask"] = pad([[1] * len(row) for row in ids], 0)
                written_BT = generate(model, {key: part.to(device) for key, part in read.items()}, settings)
                for i, text in zip(batch, processor.batch_decode(written_BT, skip_special_tokens=True), strict=True):
                    texts[group[i]] = text.strip()
                advance(len(batch))

            budget = budget_for(device, GENERATION_BUDGET) // recipe.generation.num_beams
            run_in_batches([len(sources[i]) + new for i in group], budget, work)
    return texts


def _fit(ids: list[int], limit: int | None) -> list[int]:
    return ids if limit is None or len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def decoder_settings(
    own: GenerationConfig | None,
    model: torch.nn.Module,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    first: int | None = None,
) -> GenerationConfig:
    """Return the recipe's generation settings with what the model cannot write without: how its decoder starts.

    `own` are the model's settings; of them the start token, a first token that is forced, and tokens that are never
    written are kept.
    """
    config = unwrap(model).config
    settings = generation_settings(model, processor, recipe)
    kept = ("decoder_start_token_id", "forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens")
    for name in kept:
        value = getattr(own, name, None)
        setattr(settings, name, value if value is not None else getattr(config, name, None))
    if first is not None:
        settings.forced_bos_token_id = first
    ends = getattr(own, "eos_token_id", None) or config.eos_token_id
    named = ends if isinstance(ends, list) else [ends]
    settings.eos_token_id = sorted({int(i) for i in (*named, processor.eos_token_id) if i is not None})
    return settings


def generate(model: torch.nn.Module, inputs: dict[str, torch.Tensor], settings: GenerationConfig) -> torch.Tensor:
    """Generate by transformers' own loop, also for Whisper, whose class would put its own settings on top."""
    inner = unwrap(model)
    floating = {key: part.to(inner.dtype) if part.is_floating_point() else part for key, part in inputs.items()}
    return cast(torch.Tensor, GenerationMixin.generate(inner, **floating, generation_config=settings))
