"""How likely a model finds sentences that differ in a group: decoders by likelihood, encoders by masking words in turn.

After Nangia et al., "CrowS-Pairs", EMNLP 2020, section 3, and Nadeem et al., "StereoSet", ACL 2021, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch

from llmtune.data.label_encoding import need_places
from llmtune.errors import DataError, EnvironmentProblem, Problem
from llmtune.evaluate.paired_sentences import MOST_SHOWN, Pair, word_at_blank
from llmtune.evaluate.shared_prefix import Tree, grow_tree, score_trees
from llmtune.evaluate.task_predictions import in_batches
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.memory_plan import context_length
from llmtune.records import Advance, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scores = list[float]
"""A number an option: the higher, the likelier."""
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
class Hidden:
    """A text with one token masked, and which token that was."""

    example: Example
    at: int
    target: int


@dataclass(frozen=True)
class Cloze:
    """What an encoder is asked about one option of a pair."""

    texts: tuple[Hidden, ...]
    how: str
    """`sum` or `mean` of log-probabilities, or `probability` for the mean of probabilities."""


Encoded = Tree | list[Cloze]
"""A pair as token ids: for a decoder, or for an encoder by option."""


def count_texts(encoded: Sequence[Encoded]) -> int:
    """Return how many texts a model reads, for a progress bar."""
    return sum(1 if isinstance(one, Tree) else sum(len(option.texts) for option in one) for one in encoded)


def encode_pairs(pairs: Sequence[Pair], processor: PreTrainedTokenizerBase, masked: bool) -> list[Encoded]:
    """Turn pairs into what a decoder, or with `masked` an encoder, is asked.

    Raises:
        DataError: pairs of which the tokenizer leaves nothing to compare.
        EnvironmentProblem: a tokenizer without what this needs: a start or end token, a mask token, places of tokens.
    """
    if masked:
        if processor.mask_token_id is None:
            raise EnvironmentProblem.of("the tokenizer has no mask token", str(processor.name_or_path))
        need_places(processor)
    encoded: list[Encoded] = []
    problems = []
    for pair in pairs:
        made = mask_pair(pair, processor) if masked else join_pair(pair, processor)
        if isinstance(made, str):
            problems.append(Problem(made, pair.origin, "Remove the pair, or mend it."))
        else:
            encoded.append(made)
    DataError.collect(problems[:MOST_SHOWN])
    return encoded


# Decoders


def start_token(processor: PreTrainedTokenizerBase) -> int:
    """Return the token that a sentence is begun with, so that its first word is predicted too."""
    for token in (processor.bos_token_id, processor.eos_token_id):
        if token is not None:
            return int(token)
    what = "the tokenizer has neither a start token nor an end token, so no sentence's first word can be predicted"
    raise EnvironmentProblem.of(what, str(processor.name_or_path), "Leave out evaluate.fairness.pairs (`pairs: []`).")


def join_pair(pair: Pair, processor: PreTrainedTokenizerBase) -> Tree | str:
    """Join the options to one tree behind a start token; the context of StereoSet's second form is not scored."""
    start = start_token(processor)

    def ids(text: str) -> list[int]:
        return [int(token) for token in processor(text, add_special_tokens=False)["input_ids"]]

    context = ids(pair.context) if pair.form == "between" else []
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
    return grow_tree(texts, starts)


def reach(tree: Tree) -> int:
    """Return the tokens of the longest option."""
    return len(tree.prefix) + max(map(len, tree.branches))


def score_by_decoder(
    model: torch.nn.Module, pairs: Sequence[Pair], trees: Sequence[Tree], device: str, advance: Advance
) -> list[Scores | None]:
    """Return a sum of log-probabilities an option, StereoSet's divided by their number; None where it is too long."""
    limit = context_length(unwrap(model).config) or 1 << 60
    fitting = [i for i, tree in enumerate(trees) if reach(tree) <= limit]
    budget = budget_for(device, TOKEN_BUDGET)
    found = score_trees(model, [trees[i] for i in fitting], device=device, budget=budget, advance=advance)
    scores: list[Scores | None] = [None] * len(trees)
    for i, sums in zip(fitting, found, strict=True):
        tree = trees[i]
        sizes = [len(branch) - unscored for branch, unscored in zip(tree.branches, tree.unscored, strict=True)]
        plain = pairs[i].form == "pair"
        scores[i] = list(sums) if plain else [total / size for total, size in zip(sums, sizes, strict=True)]
    advance(len(trees) - len(fitting))
    return scores


# Encoders


@dataclass(frozen=True)
class Read:
    """A text as an encoder reads it."""

    ids: list[int]
    kinds: list[int]
    special: list[int]
    places: list[tuple[int, int]]
    """Where in the text each token comes from."""
    parts: list[int | None]
    """Of a context and an option, which of them each token is from; None for special tokens."""


def hide(ids: Sequence[int], kinds: Sequence[int], at: int, mask: int, target: int) -> Hidden:
    """Return `ids` with a mask at one place."""
    masked = [*ids[:at], mask, *ids[at + 1 :]]
    return Hidden(Example(masked, [], 0, third_ids=kinds if any(kinds) else ()), at, target)


def read_as_encoder(processor: PreTrainedTokenizerBase, *texts: str) -> Read:
    """Read a text, or a context with what follows it."""
    found = processor(*texts, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids = [int(token) for token in found["input_ids"]]
    kinds = list(found.get("token_type_ids") or [0] * len(ids))
    return Read(ids, kinds, list(found["special_tokens_mask"]), list(found["offset_mapping"]), found.sequence_ids(0))


def mask_pair(pair: Pair, processor: PreTrainedTokenizerBase) -> list[Cloze] | str:
    """Return the texts with masks that the options of a pair are scored by."""
    mask = int(processor.mask_token_id)
    if pair.form == "between":
        reads = [read_as_encoder(processor, pair.context, option) for option in pair.options]
        chosen = [[i for i, part in enumerate(read.parts) if part == 1] for read in reads]
        how = "mean"
    elif pair.form == "within":
        filled = [fill_blank(pair, option, processor, mask) for option in pair.options]
        return filled if all(one.texts for one in filled) else "the tokenizer makes nothing of the word at the blank"
    else:
        reads = [read_as_encoder(processor, option) for option in pair.options]
        chosen = [list(places) for places in in_common(*reads)]
        how = "sum"
    if not all(chosen):
        return "the tokenizer leaves no token to compare the sentences by"
    return [
        Cloze(tuple(hide(read.ids, read.kinds, at, mask, read.ids[at]) for at in places), how)
        for read, places in zip(reads, chosen, strict=True)
    ]


def in_common(more: Read, less: Read) -> tuple[list[int], list[int]]:
    """Return where the tokens stand that both sentences have in the same order, special ones left out."""
    first: list[int] = []
    second: list[int] = []
    matcher = SequenceMatcher(None, more.ids, less.ids, autojunk=False)
    for a, b, size in matcher.get_matching_blocks():
        for step in range(size):
            if not more.special[a + step]:
                first.append(a + step)
                second.append(b + step)
    return first, second


def fill_blank(pair: Pair, option: str, processor: PreTrainedTokenizerBase, mask: int) -> Cloze:
    """Mask the tokens of the word at the blank in turn: those before it stand, those behind it are left out."""
    read = read_as_encoder(processor, option)
    word = word_at_blank(pair.context, option) or (0, len(option))
    inside = [i for i, (left, right) in enumerate(read.places) if left < word[1] and right > word[0] and right > left]
    found = []
    for at in inside:
        ids, kinds = ([*part[: at + 1], *part[inside[-1] + 1 :]] for part in (read.ids, read.kinds))
        found.append(hide(ids, kinds, at, mask, read.ids[at]))
    return Cloze(tuple(found), "probability")


def score_by_encoder(
    model: torch.nn.Module,
    asked: Sequence[list[Cloze]],
    processor: PreTrainedTokenizerBase,
    device: str,
    advance: Advance,
) -> list[Scores | None]:
    """Return a score an option; None where a text is longer than the model's positions."""
    limit = context_length(unwrap(model).config) or 1 << 60
    fitting = [
        i
        for i, options in enumerate(asked)
        if all(len(hidden.example.input_ids) <= limit for option in options for hidden in option.texts)
    ]
    hidden_texts = [hidden for i in fitting for option in asked[i] for hidden in option.texts]
    logs = [0.0] * len(hidden_texts)

    def take(i: int, output: Any, row: int) -> None:
        logs[i] = float(output.logits[row, hidden_texts[i].at].float().log_softmax(-1)[hidden_texts[i].target])

    in_batches(model, [hidden.example for hidden in hidden_texts], processor.pad_token_id, device, take, advance)
    ends = list(accumulate((len(option.texts) for i in fitting for option in asked[i]), initial=0))
    parts = iter([logs[start:end] for start, end in pairwise(ends)])
    scores: list[Scores | None] = [None] * len(asked)
    for i in fitting:
        scores[i] = [put_together(next(parts), option.how) for option in asked[i]]
    return scores


def put_together(logs: Sequence[float], how: str) -> float:
    """Return the score of an option from the log-probabilities of its tokens."""
    values = torch.tensor(logs, dtype=torch.float64)
    if how == "sum":
        return float(values.sum())
    return float(values.exp().mean() if how == "probability" else values.mean())
