"""How likely a model finds sentences that differ in a group: decoders by likelihood, encoders by masking words in turn.

After Nangia et al., "CrowS-Pairs", EMNLP 2020, section 3, and Nadeem et al., "StereoSet", ACL 2021, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from tokenizers import Encoding
from transformers.utils import ModelOutput

from llmtune.data.encoder_batches import require_offsets
from llmtune.errors import DataError, EnvironmentProblem, Problem
from llmtune.evaluate.inference import context_limit
from llmtune.evaluate.paired_sentences import Pair, word_at_blank
from llmtune.evaluate.shared_prefix import Tree, make_tree, score_trees
from llmtune.evaluate.suite_files import MOST_SHOWN
from llmtune.evaluate.token_batches import run_encoder
from llmtune.records import Advance, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scores = list[float]
"""A number per option: the higher, the likelier."""
DECODER = "log-likelihood of the whole sentence, in nats, after the tokenizer's start token (or its end token)"
ENCODER = (
    "pseudo-log-likelihood as in CrowS-Pairs: the tokens that both sentences have, each masked alone, the words that "
    "differ left as they are"
)
DECODER_STEREOSET = "mean log-likelihood a token: of the sentence, or of what follows the context given the context"
ENCODER_STEREOSET = (
    "mean probability of the tokens of the word at the blank, unmasked from left to right; of sentences that follow a "
    "context, mean pseudo-log-likelihood a token given the context, where the paper trains a head of its own"
)


@dataclass(frozen=True)
class Masked:
    """A text with one token masked, and which token that was."""

    example: Example
    at: int
    target: int


@dataclass(frozen=True)
class Cloze:
    """The masked texts that an encoder scores one option of a pair by."""

    texts: tuple[Masked, ...]
    reduction: str
    """`sum` or `mean` of log-probabilities, or `probability` for the mean of probabilities."""


EncodedPair = Tree | list[Cloze]
"""A pair as token ids: for a decoder, or for an encoder by option."""


def count_texts(encoded: Sequence[EncodedPair]) -> int:
    """Return how many texts a model reads, for a progress bar."""
    return sum(1 if isinstance(one, Tree) else sum(len(option.texts) for option in one) for one in encoded)


def encode_pairs(pairs: Sequence[Pair], processor: PreTrainedTokenizerBase, masked: bool) -> list[EncodedPair]:
    """Turn pairs into what a decoder, or with `masked` an encoder, reads.

    Raises:
        DataError: pairs of which the tokenizer leaves nothing to compare.
        EnvironmentProblem: a tokenizer without what this needs: a start or end token, a mask token, token offsets.
    """
    if masked:
        if processor.mask_token_id is None:
            raise EnvironmentProblem.of("the tokenizer has no mask token", str(processor.name_or_path))
        require_offsets(processor)
    encoded: list[EncodedPair] = []
    problems = []
    for pair in pairs:
        one = mask_pair(pair, processor) if masked else join_pair(pair, processor)
        if isinstance(one, str):
            problems.append(Problem(one, pair.origin, "Remove the pair, or mend it."))
        else:
            encoded.append(one)
    DataError.collect(problems[:MOST_SHOWN])
    return encoded


# Decoders


def start_token(processor: PreTrainedTokenizerBase) -> int:
    """Return the token that a sentence is begun with, so that its first word is predicted too."""
    for token in (processor.bos_token_id, processor.eos_token_id):
        if token is not None:
            return int(token)
    what = "the tokenizer has neither a start token nor an end token, so no sentence's first word can be predicted"
    raise EnvironmentProblem.of(what, str(processor.name_or_path), "Set evaluate.fairness.pairs to [].")


def join_pair(pair: Pair, processor: PreTrainedTokenizerBase) -> Tree | str:
    """Join the options to one tree behind a start token; the context of StereoSet's second form is not scored."""
    start = start_token(processor)

    def ids(text: str) -> list[int]:
        return [int(token) for token in processor(text, add_special_tokens=False)["input_ids"]]

    context = ids(pair.context) if pair.layout == "between" else []
    texts, starts = [], []
    for option in pair.options:
        text = ids(f"{pair.context} {option}" if context else option)
        shared = next((i for i, (a, b) in enumerate(zip(text, context, strict=False)) if a != b), len(context))
        texts.append([start, *text])
        starts.append(1 + min(shared, len(text)))
        if starts[-1] >= len(texts[-1]):
            return f"the tokenizer makes nothing of {option!r:.60}"
    if len({tuple(text) for text in texts}) < len(texts):
        return "the tokenizer makes the same of two sentences"
    return make_tree(texts, starts)


def score_by_decoder(
    model: torch.nn.Module, pairs: Sequence[Pair], trees: Sequence[Tree], device: str, advance: Advance
) -> list[Scores | None]:
    """Return a sum of log-probabilities per option, StereoSet's divided by their number; None where it is too long."""
    limit = context_limit(model)
    fitting = [i for i, tree in enumerate(trees) if tree.longest <= limit]
    totals = score_trees(model, [trees[i] for i in fitting], device=device, advance=advance)
    scores: list[Scores | None] = [None] * len(trees)
    for i, sums in zip(fitting, totals, strict=True):
        sizes = [len(branch) - skipped for branch, skipped in zip(trees[i].branches, trees[i].unscored, strict=True)]
        plain = pairs[i].layout == "pair"
        scores[i] = list(sums) if plain else [total / size for total, size in zip(sums, sizes, strict=True)]
    advance(len(trees) - len(fitting))
    return scores


# Encoders


def tokenize(processor: PreTrainedTokenizerBase, *texts: str) -> Encoding:
    """Encode a text, or a context with what follows it, as an encoder reads it."""
    encoding: Encoding = processor(*texts).encodings[0]
    return encoding


def mask_token(encoding: Encoding, at: int, processor: PreTrainedTokenizerBase, kept: Sequence[int] = ()) -> Masked:
    """Mask the token at one position; with `kept`, of the positions there are those alone."""
    positions = kept or range(len(encoding.ids))
    ids = [int(processor.mask_token_id) if i == at else encoding.ids[i] for i in positions]
    kinds = [encoding.type_ids[i] for i in positions] if "token_type_ids" in processor.model_input_names else []
    return Masked(Example(ids, [], 0, third_ids=kinds if any(kinds) else ()), at, encoding.ids[at])


def mask_pair(pair: Pair, processor: PreTrainedTokenizerBase) -> list[Cloze] | str:
    """Return the masked texts that the options of a pair are scored by."""
    if pair.layout == "within":
        filled = [fill_blank(pair, option, processor) for option in pair.options]
        return filled if all(one.texts for one in filled) else "the tokenizer makes nothing of the word at the blank"
    if pair.layout == "between":
        encodings = [tokenize(processor, pair.context, option) for option in pair.options]
        scored = [[i for i, part in enumerate(one.sequence_ids) if part == 1] for one in encodings]
    else:
        encodings = [tokenize(processor, option) for option in pair.options]
        scored = [*map(list, in_common(*encodings))]
    if not all(scored):
        return "the tokenizer leaves no token to compare the sentences by"
    reduction = "sum" if pair.layout == "pair" else "mean"
    return [
        Cloze(tuple(mask_token(encoding, at, processor) for at in positions), reduction)
        for encoding, positions in zip(encodings, scored, strict=True)
    ]


def in_common(more: Encoding, less: Encoding) -> tuple[list[int], list[int]]:
    """Return the positions of the tokens that both sentences have in the same order, special ones left out."""
    matcher = SequenceMatcher(None, more.ids, less.ids, autojunk=False)
    shared = [(a + step, b + step) for a, b, size in matcher.get_matching_blocks() for step in range(size)]
    kept = [(a, b) for a, b in shared if not more.special_tokens_mask[a]]
    return [a for a, _ in kept], [b for _, b in kept]


def fill_blank(pair: Pair, option: str, processor: PreTrainedTokenizerBase) -> Cloze:
    """Mask the tokens of the word at the blank in turn: those before it stand, those behind it are left out."""
    encoding = tokenize(processor, option)
    first, end = word_at_blank(pair.context, option) or (0, len(option))
    inside = [i for i, (left, right) in enumerate(encoding.offsets) if left < end and right > first and right > left]
    every = range(len(encoding.ids))
    texts = (mask_token(encoding, at, processor, [i for i in every if i <= at or i > inside[-1]]) for at in inside)
    return Cloze(tuple(texts), "probability")


def score_by_encoder(
    model: torch.nn.Module,
    options: Sequence[list[Cloze]],
    processor: PreTrainedTokenizerBase,
    device: str,
    advance: Advance,
) -> list[Scores | None]:
    """Return a score per option; None where a text is longer than the model's positions."""
    limit = context_limit(model)
    longest = [max(len(text.example.input_ids) for option in pair for text in option.texts) for pair in options]
    fitting = [i for i, length in enumerate(longest) if length <= limit]
    texts = [text for i in fitting for option in options[i] for text in option.texts]
    logs = [0.0] * len(texts)

    def take(i: int, output: ModelOutput, row: int) -> None:
        logs[i] = float(output.logits[row, texts[i].at].float().log_softmax(-1)[texts[i].target])

    run_encoder(model, [text.example for text in texts], processor.pad_token_id, device, take, advance)
    ends = list(accumulate((len(option.texts) for i in fitting for option in options[i]), initial=0))
    parts = iter([logs[start:end] for start, end in pairwise(ends)])
    scores: list[Scores | None] = [None] * len(options)
    for i in fitting:
        scores[i] = [reduce_logs(next(parts), option.reduction) for option in options[i]]
    return scores


def reduce_logs(logs: Sequence[float], reduction: str) -> float:
    """Return the score of an option from the log-probabilities of its tokens."""
    values = torch.tensor(logs, dtype=torch.float64)
    if reduction == "sum":
        return float(values.sum())
    return float(values.exp().mean() if reduction == "probability" else values.mean())
