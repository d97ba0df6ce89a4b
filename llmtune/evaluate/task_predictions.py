"""What models say of rows when it is no continuation of a prompt: classes, tags, places of answers, translations.

Each function takes prompt rows and gives one JSON value a row, in their order. Shapes: B rows, T positions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from llmtune.data.label_encoding import Window, cut_context, need_places, place_words, read_texts, tag_names
from llmtune.data.seq2seq_encoding import ToPair, first_token, source_ids, starts_with_language
from llmtune.data.target_collators import pad, read_text
from llmtune.evaluate.generation import generation_settings, only_these_settings
from llmtune.evaluate.token_batches import GENERATION_BUDGET, TOKEN_BUDGET, budget_for, run_in_batches
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.memory_plan import context_length
from llmtune.model.task_losses import read_inputs
from llmtune.records import Advance, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


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
    rows: Sequence[Any],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[Any]:
    """Return `{label, scores}`: probabilities by class (`label` is a list where there are many), or one number."""
    section = recipe.classify
    assert section is not None
    examples = read_texts(rows, processor, recipe.data.max_length)
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
    rows: Sequence[Any],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[str]:
    """Return each text with its mask tokens replaced by the likeliest ones, all at once; others come back as they are.

    Of a text longer than `data.max_length` tokens, what lies beyond them comes back as it is, its masks too.
    """
    texts = [row["prompt"] + row["completion"] for row in rows]
    masked = [i for i, text in enumerate(texts) if str(processor.mask_token) in text]
    cut = [_cut_text(texts[i], processor, recipe.data.max_length) for i in masked]
    said = list(texts)

    def take(at: int, output: Any, row: int) -> None:
        (ids, rest), best = cut[at], output.logits[row].argmax(-1).tolist()
        filled = [best[place] if token == processor.mask_token_id else token for place, token in enumerate(ids)]
        said[masked[at]] = str(processor.decode(filled, skip_special_tokens=True)) + rest

    in_batches(model, [Example(ids, [], 0) for ids, _ in cut], processor.pad_token_id, device, take)
    advance(len(rows))
    return said


def _cut_text(text: str, processor: PreTrainedTokenizerBase, room: int) -> tuple[list[int], str]:
    """Return the ids of the first `room` tokens of a text, and the text behind them."""
    ids: list[int] = processor(text)["input_ids"]
    if len(ids) <= room:
        return ids, ""
    need_places(processor)
    found = processor(text, truncation=True, max_length=room, return_offsets_mapping=True)
    return found["input_ids"], text[max(right for _, right in found["offset_mapping"]) :]


# Tags


def predict_tags(
    model: torch.nn.Module,
    rows: Sequence[Any],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[list[str]]:
    """Return the tag of each word, by its first token; a word that the tokenizer makes nothing of is outside.

    A text longer than the model's positions is read in parts.
    """
    names = tag_names((recipe.token_classify.labels if recipe.token_classify else None) or ())
    limit = context_length(unwrap(model).config)
    parts = [(i, words) for i, row in enumerate(rows) for words in _cut_words(row["tokens"], processor, limit)]
    placed = place_words([{"tokens": words} for _, words in parts], processor)
    tags: list[list[str]] = [[] for _ in parts]

    def take(at: int, output: Any, row: int) -> None:
        best = output.logits[row].argmax(-1).tolist()
        seen = [place if place is not None and place < len(best) else None for place in placed[at][1]]
        tags[at] = [names[0] if place is None else names[best[place]] for place in seen]

    examples = [Example(ids[:limit], [], 0) for ids, _ in placed]
    in_batches(model, examples, processor.pad_token_id, device, take)
    said: list[list[str]] = [[] for _ in rows]
    for (i, _), found in zip(parts, tags, strict=True):
        said[i] += found
    advance(len(rows))
    return said


def _cut_words(words: list[str], processor: PreTrainedTokenizerBase, limit: int | None) -> list[list[str]]:
    """Halve a text until each part is within `limit` tokens, or one word."""
    if limit is None or len(words) < 2 or len(processor(" ".join(words))["input_ids"]) <= limit:
        return [words]
    half = len(words) // 2
    return [*_cut_words(words[:half], processor, limit), *_cut_words(words[half:], processor, limit)]


# Answers in a context


def predict_ends(
    model: torch.nn.Module,
    rows: Sequence[Any],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[Any]:
    """Return `{text, start, end, score, null_score}`: the best stretch of the context over all windows.

    An empty text is `no answer`: where its score is above the best answer's by more than
    `qa.null_score_diff_threshold`. Scores are sums of two logits. A question without room for windows gets no answer.
    """
    longest = recipe.qa.max_answer_length if recipe.qa else 30
    threshold = (recipe.qa.null_score_diff_threshold if recipe.qa else None) or 0.0
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
    """Return the best answer of one window as its score and its first character in the context and the one behind it.

    Of all pairs of tokens in the context that are in order and no more than `longest` tokens apart, the one whose
    logits have the highest sum; the SQuAD scripts look at the 20 likeliest of either end alone.
    """
    inside_T = torch.tensor([place is not None and place[1] > place[0] for place in window.places])
    if not inside_T.any():
        return None
    firsts_T, lasts_T = (part.cpu().masked_fill(~inside_T, -torch.inf) for part in (starts_T, ends_T))
    reach = min(longest, len(firsts_T))
    padded = torch.cat([lasts_T, lasts_T.new_full((reach - 1,), -torch.inf)])
    scores_TL = firsts_T[:, None] + padded.unfold(0, reach, 1)  # [first, tokens from it to the last]
    first, further = divmod(int(scores_TL.argmax()), reach)
    left, right = window.places[first], window.places[first + further]
    assert left is not None
    assert right is not None
    return float(scores_TL[first, further]), left[0], right[1]


# Texts that an encoder-decoder writes


def write_texts(
    model: torch.nn.Module,
    rows: Sequence[Any],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    to_pair: ToPair,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[str]:
    """Return what the decoder writes for each source, begun in the row's target language where the model wants that.

    A source is cut as for training; one that is longer than the model's positions even so, at its end.
    """
    limit = context_length(unwrap(model).config)
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
    written are kept. `first` is the language that an answer begins with.
    """
    config = unwrap(model).config
    settings = generation_settings(model, processor, recipe)
    never = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")  # Marian must not write its own start
    for name in ("decoder_start_token_id", "forced_bos_token_id", *never):
        value = getattr(own, name, None)
        setattr(settings, name, value if value is not None else getattr(config, name, None))
    if first is not None and starts_with_language(processor):
        settings.decoder_start_token_id, settings.forced_bos_token_id = first, None
    elif first is not None:
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
