"""Labels by source file: which file has far more doubtful labels than the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from llmtune.display.number_format import count, share
from llmtune.evaluate.significance import INCONCLUSIVE
from llmtune.recipe.schema import RELEASE, Recipe
from llmtune.store.report_record import SourceLabels
from llmtune.store.score_records import GateResult

ACCEPTED = "evaluate.max_disagreement"
"""At 1 it accepts the labels of every source file."""
CHANCE = 0.01
"""Error of the test over all files."""
FAR_MORE = 2.0
"""Least ratio of a file's share of doubtful labels to that of the others: large files make small ones significant."""
FEWEST_LABELS = 10
DOUBTFUL = "doubtful_files == 0"
"""The gate on source files whose labels stand out: every recipe that has something to decide has it."""


def compare_sources(
    labels: Mapping[str, int], doubtful: Mapping[str, int], reference: tuple[int, int] = (0, 0)
) -> list[SourceLabels]:
    """Return each file's labels, the most doubtful first, and whether the file stands out from all others.

    A file stands out if Fisher's exact test, with Bonferroni's correction for the number of files, shows a larger share
    of doubtful labels than the other files have, and if that share is at least twice theirs. `reference` has further
    (labels, doubtful ones) to compare with. Fisher, "The Logic of Inductive Inference", 1935.
    """
    total, wrong = sum(labels.values()) + reference[0], sum(doubtful.values()) + reference[1]
    sources = [
        SourceLabels(
            file, number, doubtful.get(file, 0), _stands_out(number, doubtful.get(file, 0), total, wrong, len(labels))
        )
        for file, number in labels.items()
    ]
    return sorted(sources, key=lambda one: -one.rate)


def _stands_out(labels: int, doubtful: int, total: int, wrong: int, files: int) -> bool:
    import scipy.stats  # type: ignore[import-untyped]  # takes a third of a second, and training does not need it

    others = total - labels
    if labels < FEWEST_LABELS or others < FEWEST_LABELS or doubtful * others < FAR_MORE * (wrong - doubtful) * labels:
        return False
    return float(scipy.stats.hypergeom.sf(doubtful - 1, total, wrong, labels)) * files < CHANCE


def describe_disagreement(
    sources: Iterable[SourceLabels], reference: tuple[int, int], unknown: Mapping[str, int], *, every: bool = True
) -> str:
    """Say how many labels of each file differ from the champion's predictions; of outliers only unless `every`."""
    parts = []
    for one in sources:
        if every or one.stands_out:
            text = (
                f"{one.file}: {count(one.doubtful)} of {count(one.labels)} labels that the champion never saw differ "
            )
            text += f"from its predictions ({share(one.doubtful, one.labels, 0)}"
            text += f"; {share(reference[1], reference[0], 0)} in its own test)"
            text += (
                f", and {count(unknown[one.file])} more are of classes that it does not have"
                if one.file in unknown
                else ""
            )
            text += ": far more than expected. Check them." if one.stands_out else "."
            parts.append(text)
    return " ".join(parts)


def describe_outliers(sources: Iterable[SourceLabels]) -> str:
    """Name the files that stand out in a run's suspects, or return an empty string."""
    sources = list(sources)
    suspects = sum(one.doubtful for one in sources)
    parts = []
    for one in sources:
        if one.stands_out:
            rest = sum(other.labels for other in sources) - one.labels
            elsewhere = share(suspects - one.doubtful, rest, 0)
            text = f"{count(one.doubtful)} of {count(suspects)} suspects are in {one.file}: "
            text += f"{share(one.doubtful, one.labels, 0)} of its {count(one.labels)} labels, {elsewhere} elsewhere."
            text += " Check them."
            parts.append(text)
    return " ".join(parts)


def gate_labels(doubts: Sequence[str], recipe: Recipe) -> tuple[GateResult, ...]:
    """Return the gate `DOUBTFUL`, inconclusive, if the labels of a source file are in doubt; else nothing.

    Nothing too for a recipe without gates, champion and release: its verdict decides nothing.
    """
    if not doubts or not (recipe.evaluate.gates or recipe.evaluate.champion or RELEASE in recipe.deploy.products):
        return ()
    note = f"{INCONCLUSIVE}: correct the labels; if they are right, add --set {accept_labels(recipe)}"
    wanted = "no source file with far more doubtful labels than expected"
    return (GateResult(DOUBTFUL, wanted, " ".join(doubts).removesuffix(" Check them."), None, note),)


def accept_labels(recipe: Recipe) -> str:
    """Return the setting that accepts the labels of all source files."""
    return f"{ACCEPTED}=1" if recipe.evaluate.champion else "evaluate.suspects=false"


def unchecked_sentence(unchecked: Mapping[str, int]) -> str:
    """Return a sentence on classes whose labels cannot be checked."""
    listed = ", ".join(f"{name} ({count(labels)})" for name, labels in unchecked.items())
    return f"Not checked, because all labels of the class are in one row or one group of data.split_by: {listed}."
