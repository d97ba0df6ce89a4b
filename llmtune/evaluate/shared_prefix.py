"""Score several continuations of one text in a single forward pass, and choose among a few answers by likelihood.

Shapes: B trees of a batch, T positions, C branches (continuations) of a tree, S predicted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from llmtune.data.collators import pad
from llmtune.data.example import AnyExample, Example, ImageExample
from llmtune.errors import DataError
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, over_processes, run_in_batches
from llmtune.model.causal_lm_loss import move_to, predicted_logits, unwrap
from llmtune.model.device import SuppressRefusal, computing_dtype
from llmtune.recipe.class_names import tidy_name
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch, Row

PREFIX, PADDING = 0, -1
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.02}
"""Relative tolerance between a tree's log-likelihoods and those of separate rows (root mean square)."""
FLOOR_NATS = 0.1
"""Added on both sides, since likelihoods near 1 have no size for a relative error. A wrong mask costs full nats."""


@dataclass(frozen=True)
class Tree:
    """A shared prefix and its continuations."""

    prefix: tuple[int, ...]
    """At least one token."""
    branches: tuple[tuple[int, ...], ...]
    """[C] the tokens after the prefix, at least one each."""
    unscored: tuple[int, ...]
    """[C] how many tokens at the start of each branch are not part of the answer."""
    examples: tuple[AnyExample, ...] = ()
    """[C] the complete texts, only for a model that reads pictures: each is scored as its own row."""

    @property
    def length(self) -> int:
        """Positions that the tree uses: the last token of a branch is predicted, but predicts nothing."""
        return len(self.prefix) + sum(len(branch) - 1 for branch in self.branches)

    @property
    def longest(self) -> int:
        """Tokens of the prefix plus the longest branch."""
        return len(self.prefix) + max(map(len, self.branches))


def make_tree(texts: Sequence[Sequence[int]], starts: Sequence[int]) -> Tree:
    """Join C encoded texts; `starts` has the first scored token of each (1 or later)."""
    shared = min(starts)
    first = texts[0]
    for text in texts[1:]:
        shared = next((i for i in range(min(shared, len(text))) if text[i] != first[i]), shared)
    assert shared >= 1, "continuations of one text begin with the same token"
    return Tree(
        prefix=tuple(first[:shared]),
        branches=tuple(tuple(text[shared:]) for text in texts),
        unscored=tuple(start - shared for start in starts),
    )


def score_trees(
    model: torch.nn.Module,
    trees: Sequence[Tree],
    *,
    device: str,
    advance: Callable[[int], None] = lambda rows: None,
    budget: int | None = None,
) -> list[list[float]]:
    """Return the log-likelihood in nats of each branch's scored tokens, [C] per tree, in batches of a token budget.

    Trees need a model that accepts any attention mask. The longest tree is scored both ways: if the results differ
    (recurrent layers, a sliding window, ALiBi) or the model refuses the mask, every branch is scored as its own row.
    Processes share the trees.
    """
    return over_processes(model, trees, lambda share: _score_here(model, share, device, advance, budget))


def score_choices(
    model: torch.nn.Module,
    trees: Sequence[Tree],
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[list[float]]:
    """Return what `score_trees` does for the trees of `choice_trees`, which may have pictures.

    With pictures each choice is its own row, and the task makes its batches.
    """
    if not trees or not trees[0].examples:
        return score_trees(model, trees, device=device, advance=advance)
    collate = task.collator(processor, recipe)

    def score(share: Sequence[Tree]) -> list[list[float]]:
        def work(batch: list[int]) -> list[list[float]]:
            examples = [example for i in batch for example in share[i].examples]
            sums = task.loss(model, move_to(device, collate(examples, 0)), True).row_sums
            assert sums is not None
            parts = torch.split(-sums.double().cpu(), [len(share[i].examples) for i in batch])
            return [part.tolist() for part in parts]

        lengths = [len(tree.branches) * tree.longest for tree in share]
        return run_in_batches(lengths, budget_for(device, TOKEN_BUDGET), work, advance)

    return over_processes(model, trees, score)


def _score_here(
    model: torch.nn.Module, trees: Sequence[Tree], device: str, advance: Callable[[int], None], budget: int | None
) -> list[list[float]]:
    if not trees:
        return []
    longest = max(trees, key=lambda tree: tree.length)
    score = score_as_trees if takes_trees(model, longest, device) else score_as_rows
    joint = score is score_as_trees
    lengths = [tree.length if joint else len(tree.branches) * tree.longest for tree in trees]
    budget = budget or budget_for(device, TOKEN_BUDGET)
    return run_in_batches(lengths, budget, lambda batch: score(model, [trees[i] for i in batch], device), advance)


def takes_trees(model: torch.nn.Module, tree: Tree, device: str) -> bool:
    """Score one tree both ways and compare; False if a sliding window is shorter than the tree."""
    window = getattr(unwrap(model).config.get_text_config(), "sliding_window", None)
    if window is not None and window < tree.length:
        return False
    separate = score_as_rows(model, [tree], device)[0]
    with SuppressRefusal():
        joint = score_as_trees(model, [tree], device)[0]
        share = TOLERANCE.get(computing_dtype(model, device), 0.02)
        apart = math.hypot(*(a - b for a, b in zip(joint, separate, strict=True)))
        return apart <= share * math.hypot(*separate) + share * FLOOR_NATS * len(separate)
    return False


def score_as_trees(model: torch.nn.Module, trees: Sequence[Tree], device: str) -> list[list[float]]:
    """Score trees in one batch, padded on the left so that branches share columns."""
    width = max(tree.length for tree in trees)
    ids_BT = torch.zeros((len(trees), width), dtype=torch.int64)
    positions_BT = torch.zeros((len(trees), width), dtype=torch.int64)
    branch_BT = torch.full((len(trees), width), PADDING, dtype=torch.int64)
    predict: list[int] = []
    for row, tree in enumerate(trees):
        at = width - tree.length
        size = len(tree.prefix)
        cells = (row, slice(at, at + size))
        ids_BT[cells], positions_BT[cells], branch_BT[cells] = torch.tensor(tree.prefix), torch.arange(size), PREFIX
        last = row * width + at + size - 1
        at += size
        for number, (branch, unscored) in enumerate(zip(tree.branches, tree.unscored, strict=True), start=1):
            inside = len(branch) - 1
            cells = (row, slice(at, at + inside))
            ids_BT[cells] = torch.tensor(branch[:-1], dtype=torch.int64)
            positions_BT[cells], branch_BT[cells] = torch.arange(size, size + inside), number
            predict += [last, *range(row * width + at, row * width + at + inside)][unscored:]
            at += inside
    mask = tree_mask(branch_BT.to(device), model)
    return score_branches(model, trees, ids_BT, positions_BT, mask, predict, device)


def tree_mask(branch_BT: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """Return the attention mask [B, 1, T, T]: a position attends to the prefix and to its own branch up to itself.

    For SDPA, True means "attends"; eager attention adds its mask to the scores. Padding attends only to itself: a
    softmax over nothing would be NaN.
    """
    query_BT1, key_B1T = branch_BT[:, :, None], branch_BT[:, None, :]
    eye_TT = torch.eye(branch_BT.shape[1], dtype=torch.bool, device=branch_BT.device)
    sees_BTT = (key_B1T == PREFIX) | ((key_B1T == query_BT1) & (key_B1T != PADDING))
    sees_BTT = torch.tril(sees_BTT & (query_BT1 != PADDING)) | eye_TT
    if unwrap(model).config._attn_implementation != "eager":
        return sees_BTT[:, None]
    dtype = next(model.parameters()).dtype
    return torch.zeros(sees_BTT.shape, dtype=dtype, device=branch_BT.device).masked_fill_(
        ~sees_BTT, torch.finfo(dtype).min
    )[:, None]


def score_as_rows(model: torch.nn.Module, trees: Sequence[Tree], device: str) -> list[list[float]]:
    """Score every branch as its own row, padded on the right: the reference for trees."""
    texts = [tree.prefix + branch[:-1] for tree in trees for branch in tree.branches]
    ids_BT, mask_BT = pad(texts, 0), pad([[1] * len(ids) for ids in texts], 0)
    width = ids_BT.shape[1]
    predict = [
        row * width + column
        for row, (tree, c) in enumerate((tree, c) for tree in trees for c in range(len(tree.branches)))
        for column in range(len(tree.prefix) - 1 + tree.unscored[c], len(tree.prefix) - 1 + len(tree.branches[c]))
    ]
    positions_BT = torch.arange(width).expand(len(texts), width)
    return score_branches(model, trees, ids_BT, positions_BT, mask_BT.to(device), predict, device)


def score_branches(
    model: torch.nn.Module,
    trees: Sequence[Tree],
    ids_BT: torch.Tensor,
    positions_BT: torch.Tensor,
    mask: torch.Tensor,
    predict: Sequence[int],
    device: str,
) -> list[list[float]]:
    """Add up the log-probabilities of each branch's scored tokens.

    `predict` are the positions that predict them, in the order of trees and branches, in the flattened batch.
    """
    batch: Batch = {
        "input_ids": ids_BT.to(device),
        "position_ids": positions_BT.to(device),
        "attention_mask": mask,
        "predict_S": torch.tensor(predict, device=device),
    }
    logits_SV = predicted_logits(model, batch)
    answers = [b[u:] for tree in trees for b, u in zip(tree.branches, tree.unscored, strict=True)]
    targets_S = torch.tensor([token for answer in answers for token in answer], device=logits_SV.device)
    logs_S = -torch.nn.functional.cross_entropy(logits_SV.float(), targets_S, reduction="none")
    parts = torch.split(logs_S.double().cpu(), [len(answer) for answer in answers])
    sums = iter([float(part.sum()) for part in parts])
    return [[next(sums) for _ in tree.branches] for tree in trees]


MOST_CHOICES = 20
LONGEST_CHOICE = 80
"""Longest answer, in characters, that can be a choice."""
ENCODED_CHARACTERS = 1_000_000
"""Characters encoded at once: the tokenizer's offsets take 50 times the size of the text."""
ROWS_A_CHOICE = 2
"""Minimum average number of rows per answer for the answers to count as choices."""
SIGNATURE = "the most likely of {count} answers: sum of log-probabilities, end-of-turn included, not divided by length"


def find_choices(answers: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct answers, sorted, if they are few, short and repeated; else stop reading and return none.

    Answers that differ only by blanks or Unicode composition are one choice, in its most frequent form.
    """
    forms = defaultdict[str, Counter[str]](Counter)
    rows = 0
    for answer in answers:
        rows += 1
        forms[tidy_name(answer)][answer] += 1
        if len(forms) > MOST_CHOICES or not answer.strip() or len(answer) > LONGEST_CHOICE:
            return ()
    distinct = [min(counts, key=lambda form: (-counts[form], form)) for counts in forms.values()]
    return tuple(sorted(distinct)) if 2 <= len(distinct) <= rows / ROWS_A_CHOICE else ()


def find_choice(answer: str, choices: Sequence[str]) -> str:
    """Return the choice that an answer is, up to blanks and Unicode composition; the answer itself if it is none."""
    return next((choice for choice in choices if tidy_name(choice) == tidy_name(answer)), answer)


def check_choices(choices: Sequence[str], references: Sequence[str]) -> None:
    """Refuse a list of choices without any of the reference answers.

    Raises DataError.
    """
    if references and not {*map(tidy_name, choices)} & {*map(tidy_name, references)}:
        raise DataError.of(
            f"no reference answer is one of the choices; the first reference is {references[0]!r}",
            "evaluate.choices",
            f"List the answers as in the data, or set it to auto; given: {', '.join(map(repr, choices))}.",
        )


def append_choice(prompt: Row, answer: str) -> Row:
    """Append an answer to a row without one."""
    if "messages" in prompt:
        return {**prompt, "messages": [*prompt["messages"], {"role": "assistant", "content": answer}]}
    return {**prompt, "completion": answer}


def choice_trees(
    prompts: Sequence[Row],
    choices: Sequence[str],
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> list[Tree | None]:
    """Encode each prompt with each choice as the task encodes its rows; None for a prompt with one that is too long.

    The scored tokens are those of the last supervised span: with `train_on: last`, exactly the answer.
    """
    last = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_on": "last"})})
    width, longest = len(choices), max((len(str(prompt)) for prompt in prompts), default=1)
    step = max(1, ENCODED_CHARACTERS // (width * longest))
    trees: list[Tree | None] = []
    for start in range(0, len(prompts), step):
        rows = [append_choice(prompt, choice) for prompt in prompts[start : start + step] for choice in choices]
        encoded = task.encode(rows, processor, last)
        assert len(encoded) == len(rows)
        trees += [join_choices(encoded[first : first + width]) for first in range(0, len(rows), width)]
    return trees


def join_choices(encoded: Sequence[list[Example] | str]) -> Tree | None:
    """Join the encodings of one prompt with each of its choices."""
    examples: list[Example] = []
    for parts in encoded:
        if isinstance(parts, str) or not parts:
            return None
        examples.append(parts[-1])
    starts = [max(1, example.spans[-2]) for example in examples]
    texts = [example.input_ids[: example.spans[-1]] for example in examples]
    if len({text[0] for text in texts}) > 1:
        return None
    tree = make_tree([[int(token) for token in text] for text in texts], starts)
    if not isinstance(examples[0], ImageExample):
        return tree
    return replace(tree, examples=tuple(replace(example, spans=example.spans[-2:]) for example in examples))
