"""How likely a model finds sentences that differ in a group: decoders by likelihood, encoders by masking words in turn.

After Nangia et al., "CrowS-Pairs", EMNLP 2020, section 3, and Nadeem et al., "StereoSet", ACL 2021, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from llmtune.data.collators import require_offsets
from llmtune.data.tokenization import first_context
from llmtune.errors import DataError, EnvironmentProblem, Problem
from llmtune.evaluate.eval_suite import MOST_SHOWN
from llmtune.evaluate.sentence_pairs import Layout, Pair, word_at_blank
from llmtune.evaluate.shared_prefix import Tree, make_tree, score_trees
from llmtune.evaluate.token_batches import run_encoder
from llmtune.records import Advance, Example

Scores = list[float]
"""A number per option: the higher, the likelier."""
DECODER = "log-likelihood of the whole sentence, in nats, after the tokenizer's start token (or its end token)"
ENCODER = (
    "pseudo-log-likelihood as in CrowS-Pairs: the tokens that both sentences have, each masked alone, the words that "
    "differ left as they are"
)
DECODER_STEREOSET = "mean log-likelihood per token: of the sentence, or of what follows the context given the context"
ENCODER_STEREOSET = (
    "mean probability of the tokens of the word at the blank, unmasked from left to right; of sentences that follow a "
    "context, mean pseudo-log-likelihood per token given the context, where the paper trains a head of its own"
)


EncodedPair = Tree | list[list[Example]]
"""A pair as token ids: for a decoder; or for an encoder, by option, texts with one token masked each.

Of a masked text the span says where, and the target which token that was."""


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
            problems.append(Problem(one, pair.origin, "Remove the pair, or fix it."))
        else:
            encoded.append(one)
    DataError.collect(problems[:MOST_SHOWN])
    return encoded


def text_lengths(encoded: EncodedPair) -> list[int]:
    """Return the tokens of each text that a model reads for a pair."""
    if isinstance(encoded, Tree):
        return [encoded.longest]
    return [len(text.input_ids) for option in encoded for text in option]


def score_pairs(
    model: torch.nn.Module,
    pairs: Sequence[Pair],
    encoded: Sequence[EncodedPair],
    pad_id: int | None,
    device: str,
    advance: Advance,
) -> list[Scores]:
    """Return the scores of the options of each pair."""
    trees = [one for one in encoded if isinstance(one, Tree)]
    if trees:
        sums = score_trees(model, trees, device=device, advance=advance)
        return [by_token(*one) for one in zip(pairs, trees, sums, strict=True)]
    options = [option for one in encoded if not isinstance(one, Tree) for option in one]
    texts = [text for option in options for text in option]
    logs = [0.0] * len(texts)

    def take(i: int, output: ModelOutput, row: int) -> None:
        logs[i] = float(output.logits[row, texts[i].spans[0]].float().log_softmax(-1)[texts[i].target_ids[0]])

    run_encoder(model, texts, pad_id, device, take, advance)
    log, option = iter(logs), iter(options)
    return [[reduce_logs([next(log) for _ in next(option)], pair.layout) for _ in pair.options] for pair in pairs]


def by_token(pair: Pair, tree: Tree, sums: Scores) -> Scores:
    """Return sums of log-probabilities as they are, StereoSet's divided by the number of tokens."""
    if pair.layout == "pair":
        return sums
    sizes = [len(branch) - skipped for branch, skipped in zip(tree.branches, tree.unscored, strict=True)]
    return [total / size for total, size in zip(sums, sizes, strict=True)]


def reduce_logs(logs: Sequence[float], layout: Layout) -> float:
    """Return the score of an option from the log-probabilities of its masked tokens."""
    values = torch.tensor(logs, dtype=torch.float64)
    if layout == "pair":
        return float(values.sum())
    return float(values.exp().mean() if layout == "within" else values.mean())


# Decoders


def join_pair(pair: Pair, processor: PreTrainedTokenizerBase) -> Tree | str:
    """Join the options to one tree after a start token; the context of StereoSet's second form is not scored.

    Raises EnvironmentProblem for a tokenizer with no token to predict a first word from.
    """
    start = first_context(processor)
    if not start:
        what = "the tokenizer has neither a start token nor an end token, so no sentence's first word can be predicted"
        raise EnvironmentProblem.of(what, str(processor.name_or_path), "Set evaluate.fairness.pairs to [].")

    def ids(text: str) -> list[int]:
        return [int(token) for token in processor(text, add_special_tokens=False)["input_ids"]]

    context = ids(pair.context) if pair.layout == "between" else []
    texts, starts = [], []
    for option in pair.options:
        text = ids(f"{pair.context} {option}" if context else option)
        shared = next((i for i, (a, b) in enumerate(zip(text, context, strict=False)) if a != b), len(context))
        texts.append([*start, *text])
        starts.append(len(start) + min(shared, len(text)))
        if starts[-1] >= len(texts[-1]):
            return f"the tokenizer makes nothing of {option!r:.60}"
    if len({tuple(text) for text in texts}) < len(texts):
        return "the tokenizer makes the same of two sentences"
    return make_tree(texts, starts)


# Encoders


def mask_pair(pair: Pair, processor: PreTrainedTokenizerBase) -> list[list[Example]] | str:
    """Return the masked texts that the options of a pair are scored by."""
    if pair.layout == "within":
        filled = [fill_blank(pair, option, processor) for option in pair.options]
        return filled if all(filled) else "the tokenizer makes nothing of the word at the blank"
    before = [pair.context] if pair.layout == "between" else []
    encodings: list[Encoding] = [processor(*before, option).encodings[0] for option in pair.options]
    if before:
        scored = [[i for i, part in enumerate(one.sequence_ids) if part == 1] for one in encodings]
    else:
        scored = in_common(*encodings)
    if not all(scored):
        return "the tokenizer leaves no token to compare the sentences by"
    return [
        [mask_token(encoding, at, processor) for at in positions]
        for encoding, positions in zip(encodings, scored, strict=True)
    ]


def in_common(more: Encoding, less: Encoding) -> list[list[int]]:
    """Return the positions of the tokens that both sentences have in the same order, special ones left out."""
    matcher = SequenceMatcher(None, more.ids, less.ids, autojunk=False)
    shared = [(a + step, b + step) for a, b, size in matcher.get_matching_blocks() for step in range(size)]
    kept = [(a, b) for a, b in shared if not more.special_tokens_mask[a]]
    return [[a for a, _ in kept], [b for _, b in kept]]


def fill_blank(pair: Pair, option: str, processor: PreTrainedTokenizerBase) -> list[Example]:
    """Mask the tokens of the word at the blank in turn: those before it stand, those behind it are left out."""
    encoding: Encoding = processor(option).encodings[0]
    first, end = word_at_blank(pair.context, option) or (0, len(option))
    inside = [i for i, (left, right) in enumerate(encoding.offsets) if left < end and right > first and right > left]
    every = range(len(encoding.ids))
    return [mask_token(encoding, at, processor, [i for i in every if i <= at or i > inside[-1]]) for at in inside]


def mask_token(encoding: Encoding, at: int, processor: PreTrainedTokenizerBase, kept: Sequence[int] = ()) -> Example:
    """Mask the token at one position; with `kept`, of the positions there are those alone."""
    positions = kept or range(len(encoding.ids))
    ids = [int(processor.mask_token_id) if i == at else encoding.ids[i] for i in positions]
    kinds = [encoding.type_ids[i] for i in positions] if "token_type_ids" in processor.model_input_names else []
    target = [encoding.ids[at]]
    return Example(ids, [at, at + 1], 0, target_ids=target, third_ids=kinds if any(kinds) else ())
