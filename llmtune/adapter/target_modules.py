"""Resolve the recipe's target modules to the module names of this model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from transformers.pytorch_utils import Conv1D

from llmtune.errors import Problem, RecipeError, nearest
from llmtune.model.config import expert_parameters, head_names, in_heads, linear_shape, linear_shapes
from llmtune.model.towers import tower_modules
from llmtune.recipe.adapter_section import AdapterSection
from llmtune.store.resource_limits import LimitExceeded, limited

_ADAPTABLE = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, Conv1D)
PATTERN_SECONDS = 2.0
"""Time limit for matching an expression with a model's names."""
_LAYER = re.compile(r"(?:^|.*?\.)[^.]*\.(\d+)\.")
"""The first number between dots: the layer, even if experts inside it have numbers too."""


def resolve_targets(model: torch.nn.Module, adapter: AdapterSection) -> list[str]:
    """Return the full names of all modules that get an adapter, in the model's order.

    `all-linear` means every linear module that PEFT can adapt, except heads (with `ln_tuning`, every norm). A text is a
    regular expression over complete names; a list has name endings. `exclude_modules`, `modules_to_save` and
    `layers_to_transform` remove names.

    Raises one RecipeError for all entries that match nothing, listing the model's linear modules.
    """
    heads, towers = set(head_names(model)), tower_modules(model)
    modules = {name: module for name, module in model.named_modules() if name not in set(towers)}
    linears = [name for name in linear_shapes(model) if name in modules]
    linear_names = set(linears)
    names = [name for name, module in modules.items() if isinstance(module, _ADAPTABLE) or name in linear_names]
    if adapter.method == "ln_tuning":
        norms = [(name, one) for name, one in modules.items() if "norm" in type(one).__name__.lower()]
        names = linears = [name for name, one in norms if [*one.parameters()]]
    patterns = adapter.target_modules
    problems: list[Problem] = []
    if patterns == "all-linear":
        targets = [name for name in linears if not in_heads(name, heads) and _is_adaptable(model, name)]
    else:
        targets, problems = _match("adapter.target_modules", patterns, names, linears, towers)
    excluded: list[str] = []
    if adapter.exclude_modules:
        excluded, more = _match("adapter.exclude_modules", adapter.exclude_modules, [*names, *towers], linears)
        problems += more
    every = [name for name in modules if name]
    if adapter.modules_to_save:
        whole, more = _match("adapter.modules_to_save", adapter.modules_to_save, every, every, towers)
        excluded += [name for name in names if in_heads(name, whole)]
        problems += more
    if adapter.layers_to_transform is not None:
        targets, more = _keep_layers(targets, adapter.layers_to_transform)
        problems += more
    problems += [*_check_patterns(adapter, targets), *_check_bias(model, adapter, targets)]
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    output = getattr(model, "get_output_embeddings", None)
    if tied and (output is None or output() is not None):  # a classifier's head is not tied
        problems += [
            Problem(
                f"{name!r} shares its weight with the embedding; an adapter on it alone would untie them",
                "adapter.target_modules",
                "Omit the head.",
            )
            for name in targets
            if in_heads(name, heads)
        ]
    RecipeError.collect(problems)
    kept = [name for name in targets if name not in set(excluded)]
    if not kept:
        raise RecipeError.of("no module is left for the adapter", "adapter", f"{_list_linears(linears)} Exclude fewer.")
    return kept


def find_unmatched_parameters(model: torch.nn.Module, patterns: Sequence[str]) -> list[Problem]:
    """Find entries of `target_parameters` that match no parameter; PEFT only warns about them."""
    names = [name for name, _ in model.named_parameters()]
    experts = group_by_ending(expert_parameters(model))
    there = f"Fused experts here: {', '.join(experts)}." if experts else "This model has no fused experts."
    return [
        Problem(f"{entry!r} matches no parameter.{nearest(entry, [*experts])}", "adapter.target_parameters", there)
        for entry in map(str, patterns)
        if not ends_with(names, entry)
    ]


def count_adapted(model: torch.nn.Module) -> int:
    """Return how many weights of the base have an adapter."""
    total = 0
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            total += module.get_param().numel()
        elif isinstance(module, TrainableTokensLayer):  # some rows of an embedding, counted once if a head shares them
            rows = () if module.tied_adapter else module.trainable_tokens_delta.values()
            total += sum(row.numel() for row in rows)
        elif isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            weight = getattr(base, "weight", None)  # in 4 bits its shape differs from the module's
            total += math.prod(linear_shape(base) or (() if weight is None else weight.shape) or (0,))
    return total


def shorten_targets(targets: Sequence[str], model: torch.nn.Module) -> list[str] | str:
    """Return name endings that match exactly `targets` in `model` and its towers, if any, else the full names; sorted.

    If the model has towers, an expression takes the place of full names: PEFT would shorten those to endings, which
    also match in the towers.
    """
    endings = sorted({name.rpartition(".")[2] for name in targets})
    towers = tower_modules(model)
    every = [*(name for name, _ in model.named_modules()), *towers]
    if {name for name in every if name.rpartition(".")[2] in endings} == set(targets):
        return endings
    if not towers:
        return sorted(targets)
    parts = [name.split(".") for name in targets]
    shared = [names[0] for names in zip(*parts, strict=False) if len(set(names)) == 1]
    short = rf"{re.escape('.'.join(shared))}\.(?:.*\.)?(?:{'|'.join(map(re.escape, endings))})"
    return short if _selects(short, every, targets) else "|".join(map(re.escape, sorted(targets)))


def _selects(pattern: str, names: Iterable[str], targets: Sequence[str]) -> bool:
    return {name for name in names if re.fullmatch(pattern, name)} == set(targets)


def group_by_ending(names: Iterable[str]) -> dict[str, int]:
    """Count names by their last part, in order of appearance."""
    return dict(Counter(name.rpartition(".")[2] for name in names))


def ends_with(names: Iterable[str], ending: str) -> list[str]:
    """Return the names that are `ending` or end with it after a dot, as PEFT reads a list entry."""
    return [name for name in names if name == ending or name.endswith(f".{ending}")]


def are_transposed(model: torch.nn.Module) -> bool:
    """Whether projections store their weights as [inputs, outputs], as GPT-2's Conv1D does."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def _is_adaptable(model: torch.nn.Module, name: str) -> bool:
    """Whether PEFT can put a LoRA on this module; not if Mamba's kernels read its weights directly."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return False
    return True


def _match(
    key: str,
    patterns: str | Sequence[str],
    names: Sequence[str],
    suggestions: Sequence[str],
    towers: Sequence[str] = (),
) -> tuple[list[str], list[Problem]]:
    """Return the names that `patterns` match, and a problem for each pattern without a match.

    `towers` are the modules of towers, which get no adapter.
    """
    if isinstance(patterns, str):
        try:
            with limited(PATTERN_SECONDS):
                matches, inside = ([name for name in some if re.fullmatch(patterns, name)] for some in (names, towers))
        except (re.error, LimitExceeded) as error:
            return [], [Problem(f"{patterns!r} cannot be matched as a regular expression: {error}", key)]
        if inside and not matches:
            return [], [_in_tower(patterns, key, inside[0])]
        what = f"{patterns!r} matches no complete module name"
        fix = f"For name endings, write a list: [{patterns}]. {_list_linears(suggestions)}"
        return matches, [] if matches else [Problem(what, key, fix)]
    matched = {entry: ends_with(names, entry) for entry in patterns}
    hits = {name for matches in matched.values() for name in matches}
    return [name for name in names if name in hits], [
        _in_tower(e, key, inside[0]) if (inside := ends_with(towers, e)) else _unmatched(e, key, suggestions)
        for e, matches in matched.items()
        if not matches
    ]


def _in_tower(entry: str, key: str, name: str) -> Problem:
    what = f"{entry!r} matches only modules that read images or sound, such as {name}, which stay frozen"
    return Problem(what, key, "Name modules of the language model, or use all-linear.")


def _unmatched(entry: str, key: str, suggestions: Sequence[str]) -> Problem:
    endings = list(group_by_ending(suggestions))
    what = f"{entry!r} matches no module of this model.{nearest(entry, endings) or nearest(entry, suggestions)}"
    return Problem(what, key, _list_linears(suggestions))


def _list_linears(linears: Sequence[str]) -> str:
    groups = [f"{ending} ({count})" for ending, count in group_by_ending(linears).items()]
    more = f" and {len(groups) - 20} more" if len(groups) > 20 else ""
    return f"Modules here: {', '.join(groups[:20])}{more}."


def _keep_layers(targets: list[str], layers: int | Sequence[int]) -> tuple[list[str], list[Problem]]:
    chosen = {layers} if isinstance(layers, int) else set(layers)
    numbers = {name: int(match.group(1)) for name in targets if (match := _LAYER.match(name))}
    absent = sorted(chosen - set(numbers.values()))
    kept = [name for name in targets if numbers.get(name) in chosen]
    if not absent:
        return kept, []
    there = f"Layers here: 0 to {max(numbers.values())}." if numbers else "This model has no numbered layers."
    return kept, [Problem(f"layer {absent[0]} does not exist", "adapter.layers_to_transform", there)]


def _check_patterns(adapter: AdapterSection, targets: Sequence[str]) -> list[Problem]:
    """Find keys of rank and alpha patterns without a matching target; PEFT matches them as endings or expressions."""
    problems = []
    for key, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            try:
                with limited(PATTERN_SECONDS):
                    matches = any(_ends_with_pattern(pattern, name) for name in targets)
            except LimitExceeded as error:
                what = f"{pattern!r} cannot be matched as a regular expression: {error}"
                return [Problem(what, f"adapter.{key}", "Write a simpler expression.")]
            if not matches:
                problems.append(_unmatched(pattern, f"adapter.{key}.{pattern}", targets))
    return problems


def _check_bias(model: torch.nn.Module, adapter: AdapterSection, targets: Sequence[str]) -> list[Problem]:
    """Find a bias setting without biases to train; for PEFT every weight with `bias` in its name is one."""
    if adapter.bias == "none":
        return []
    every = [name.rpartition(".")[0] for name, _ in model.named_parameters() if "bias" in name]
    if {*every} & {*targets} if adapter.bias.endswith("_only") else every:
        return []
    where = "no module with an adapter has a bias" if every else "this model has no biases"
    return [Problem(f"{adapter.bias!r} has no effect: {where}", "adapter.bias", "Omit it.")]


def _ends_with_pattern(pattern: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return False
