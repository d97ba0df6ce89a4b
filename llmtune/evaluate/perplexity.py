"""General text in windows of one model's tokens, and the nats of each of its paragraphs.

Shapes: S scored tokens of a batch, U paragraphs of all texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llmtune.data.collators import collate_padded
from llmtune.data.example import Example
from llmtune.data.tokenization import encode_texts, start_ids
from llmtune.evaluate.eval_suite import OWN_FILES, read_sources, read_utf8
from llmtune.evaluate.paired_statistics import Floats
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, over_processes, run_in_batches
from llmtune.model.causal_lm_loss import causal_loss, move_to
from llmtune.recipe.eval_suites_section import OWN
from llmtune.records import Advance

WINDOW = 512
"""Tokens that are read together, where the model's context holds as many."""
LONGEST_PARAGRAPH = 2000
"""Characters; a longer one is cut at white space."""
BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
FIX = "Name a plain text file in UTF-8."


@dataclass(frozen=True)
class Text:
    """One text in paragraphs; put together they are the text."""

    name: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Passages:
    """Texts as one model's tokens."""

    windows: tuple[Example, ...]
    """Tokens that are read together, of which those in the span are scored."""
    paragraphs: tuple[tuple[int, ...], ...]
    """By window, the number of the paragraph of each scored token, over all texts."""
    tokens: Floats
    """[U] scored tokens."""
    sizes: Floats
    """[U] UTF-8 bytes of what is scored."""
    text_of: tuple[int, ...]
    """[U] which text each paragraph is from."""


def read_texts(sources: Sequence[str]) -> tuple[Text, ...]:
    """Read text files, and for `own` those that come with llmtune; paths are absolute.

    Raises DataError for files that are missing, empty or not UTF-8: all of them at once.
    """
    return tuple(read_sources(sources, read_source, "text", FIX))


def read_source(source: str) -> list[Text]:
    """Read one text file, or for `own` those that come with llmtune, whose origin stands beside them."""
    if source != OWN:
        text = make_text(Path(source).name, read_utf8(Path(source), FIX))
        return [text] if text.paragraphs else []
    files = [file for file in OWN_FILES.joinpath("general").iterdir() if file.name.endswith(".txt")]
    files.sort(key=lambda file: file.name)
    return [make_text(file.name.removesuffix(".txt"), file.read_text("utf-8")) for file in files]


def make_text(name: str, text: str) -> Text:
    """Cut a text into paragraphs, each with the blank lines behind it."""
    text = text.replace("\r\n", "\n").strip()
    cuts = [0, *(match.end() for match in BLANK_LINES.finditer(text)), len(text)]
    blocks = [text[left:right] for left, right in pairwise(cuts) if right > left]
    return Text(name, tuple(part for block in blocks for part in cut_long(block)))


def cut_long(block: str) -> list[str]:
    """Cut what is too long for a paragraph at white space, or anywhere if there is none."""
    parts = []
    while len(block) > LONGEST_PARAGRAPH:
        at = block.rfind(" ", 1, LONGEST_PARAGRAPH)
        at = LONGEST_PARAGRAPH if at < 0 else at
        parts.append(block[:at])
        block = block[at:]
    return [*parts, block]


def make_passages(texts: Sequence[Text], processor: PreTrainedTokenizerBase, context: int | None) -> Passages:
    """Read texts as tokens and lay windows over them, so that each token is scored once.

    As in the guide "Perplexity of fixed-length models" of transformers, a window is as long as the context, but no
    longer than 512 tokens, and the next begins half a window later and scores what is new in it. It begins with the
    start token where the tokenizer puts one before every text; without one, a text's first token is not scored.
    """
    start = start_ids(processor)
    room = min(context or WINDOW, WINDOW) - len(start)
    windows: list[Example] = []
    paragraphs: list[tuple[int, ...]] = []
    sizes: list[int] = []
    text_of: list[int] = []
    for number, text in enumerate(texts):
        ids, paragraph_of = to_tokens(text, processor)
        begin, done = 0, 0 if start else 1
        while done < len(ids):
            end = min(len(ids), begin + room)
            window = [*start, *ids[begin:end]]
            windows.append(Example(window, (len(start) + done - begin, len(window)), 0))
            paragraphs.append(tuple(len(sizes) + paragraph for paragraph in paragraph_of[done:end]))
            begin, done = begin + max(1, room // 2), end
        sizes += [len(paragraph.encode()) for paragraph in text.paragraphs]
        if not start:
            sizes[-len(text.paragraphs)] -= len(str(processor.decode(ids[:1])).encode())
        text_of += [number] * len(text.paragraphs)
    tokens = np.bincount([one for window in paragraphs for one in window], minlength=len(sizes)).astype(np.float64)
    return Passages(tuple(windows), tuple(paragraphs), tokens, np.asarray(sizes, dtype=np.float64), tuple(text_of))


def to_tokens(text: Text, processor: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids of a text, and the number of the paragraph that each begins in.

    A tokenizer without offsets reads each paragraph by itself.
    """
    if not processor.is_fast:
        apart = encode_texts(processor, text.paragraphs)["input_ids"]
        return [i for ids in apart for i in ids], [number for number, ids in enumerate(apart) for _ in ids]
    whole = encode_texts(processor, ["".join(text.paragraphs)])
    ends = np.cumsum([len(paragraph) for paragraph in text.paragraphs])
    begins = [left for left, _ in whole.encodings[0].offsets]
    paragraphs = np.minimum(np.searchsorted(ends, begins, side="right"), len(ends) - 1)
    return list(whole["input_ids"][0]), paragraphs.tolist()


def score_passages(model: torch.nn.Module, passages: Passages, device: str, advance: Advance) -> Floats:
    """Return the nats of each paragraph [U]; several processes share the windows."""
    windows, nothing = passages.windows, np.zeros(len(passages.tokens))

    def share(own: Sequence[int]) -> list[Floats]:
        found: dict[int, Floats] = {}

        def work(batch: list[int]) -> None:
            chosen = [own[i] for i in batch]
            rows_S = torch.tensor([paragraph for i in chosen for paragraph in passages.paragraphs[i]])
            collated = collate_padded([windows[i] for i in chosen], None) | {"rows_S": rows_S, "n_rows": len(nothing)}
            loss = causal_loss(model, move_to(device, collated), True)
            assert loss.row_sums is not None
            found[batch[0]] = loss.row_sums.double().cpu().numpy()
            advance(len(batch))

        run_in_batches([len(windows[i].input_ids) for i in own], budget_for(device, TOKEN_BUDGET), work)
        return [found.get(i, nothing) for i in range(len(own))]

    return np.asarray(np.sum([nothing, *over_processes(range(len(windows)), share)], axis=0))
