"""The ledger of looks: how much of the 5 % error budget comparisons on the same test rows have used (alpha spending).

Does not import torch.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.opened_runs import ScoredRun
from llmtune.evaluate.release_records import locate_champion, read_release
from llmtune.recipe.evaluate_section import ERROR
from llmtune.recipe.schema import Recipe
from llmtune.recipe.user_files import read_text_file
from llmtune.records import Json
from llmtune.store.atomic_files import explained, hash_value
from llmtune.store.release_store import is_stored

LEDGER = "releases.jsonl"
LOOKS = "evaluate.looks"
ROUNDING = 1e-12


class LedgerLine(TypedDict):
    """A line of the ledger."""

    tests: str
    trained: str
    champion: str
    alpha: Annotated[float, Field(gt=0, le=ERROR)]
    run: NotRequired[str]
    name: NotRequired[str]
    """Name of the recipe."""


@dataclass(frozen=True)
class Ledger:
    """Lines of `releases.jsonl` next to the champion for one set of test rows, also if it grows with the data."""

    path: Path
    tests: str
    """Hash of the champion's test rows in any order."""
    champion: str
    """Hash of the champion's trained weights."""
    lines: tuple[LedgerLine, ...]

    def spent(self, trained: str = "") -> float:
        """Return the error budget spent so far, without the share of `trained` against this champion."""
        spent = defaultdict[tuple[str, str], float](float)
        for line in self.lines:
            spent[line["trained"], line["champion"]] = max(spent[line["trained"], line["champion"]], line["alpha"])
        return sum(alpha for looked, alpha in spent.items() if looked != (trained, self.champion))

    def require_left(self, alpha: float, trained: str = "") -> None:
        """Raise RecipeError if less than `alpha` of the error budget is left."""
        left = ERROR - self.spent(trained)
        if alpha <= left + ROUNDING:
            return
        looked = len({(line["trained"], line["champion"]) for line in self.lines})
        what = f"{looked} models were already compared on these test rows; the 5 % false-positive budget is used up"
        fix = "Score a model without looks on a file of new rows, and release it as the champion: a new count starts."
        if left > ROUNDING:
            fix = f"Set it to {int(ERROR / left) + 1} or more, for wider intervals. Or s{fix[1:]}"
        raise RecipeError.of(what, f"{LOOKS}: {self.path}", fix)


def open_ledger(recipe: Recipe, champion: ScoredRun, run: Path | None = None) -> Ledger | None:
    """Open the ledger next to a recipe's champion, for the run in folder `run`; None if the recipe counts no looks.

    Raises:
        RecipeError: the champion is not a release file, so it has no ledger.
        EnvironmentProblem: the ledger cannot be written, or one of its lines is damaged.
    """
    if recipe.evaluate.looks is None:
        return None
    release = locate_champion(recipe, run)
    assert release is not None, "the champion is open"
    if not release.is_file():
        what = "looks are counted next to a release file, but the champion is a run folder"
        fix = f"Release it with `llmtune release {release}`, and set evaluate.champion: release:NAME."
        raise RecipeError.of(what, LOOKS, fix)
    path = (release.parent.parent if is_stored(release.parent) else release.parent) / LEDGER
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        fix = "Give the job a writable copy of the folder, and keep the file that it writes there."
        raise EnvironmentProblem.of("cannot be written, so this look would not be counted", str(path), fix)
    tests = hash_value(sorted(champion.measures.rows))
    with explained(path):
        texts = read_text_file(path, errors="replace").splitlines() if path.exists() else []
    try:
        lines = [TypeAdapter(LedgerLine).validate_json(text) for text in texts if text.strip()]
    except ValidationError:
        fix = "Restore it from the repository. After a merge, keep the lines of both sides."
        raise EnvironmentProblem.of("damaged: a line was not written by llmtune", str(path), fix) from None
    grows = not isinstance(recipe.data.test, tuple)  # then most of a week's test rows are in the next week's too
    counted = tuple(line for line in lines if line["tests"] == tests or (grows and line.get("name") == recipe.name))
    return Ledger(path, tests, read_release(release)["trained"], counted)


def check_looks(recipe: Recipe, champion: ScoredRun, fingerprint: str, run: Path | None = None) -> None:
    """Refuse, before training, a run for which no error budget is left; a run already counted may continue."""
    ledger = open_ledger(recipe, champion, run)
    if ledger and fingerprint not in {line.get("run") for line in ledger.lines}:
        ledger.require_left(recipe.evaluate.alpha)


def count_look(
    recipe: Recipe, champion: ScoredRun, fingerprint: str, trained: str, run: Path | None = None
) -> str | None:
    """Add a look to the ledger before its scores are seen; return its number, or None if looks are not counted.

    The same model against the same champion counts once; the champion itself does not count.

    Raises as `open_ledger` does, and RecipeError if the error budget is used up.
    """
    ledger = open_ledger(recipe, champion, run)
    if ledger is None or trained == ledger.champion:
        return None
    alpha, pair = recipe.evaluate.alpha, (trained, ledger.champion)
    earlier = [line for line in ledger.lines if (line["trained"], line["champion"]) == pair]
    if max((line["alpha"] for line in earlier), default=0.0) < alpha:
        ledger.require_left(alpha, trained)
        line: Json = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "name": recipe.name, "run": fingerprint}
        line |= {"tests": ledger.tests, "trained": trained, "champion": ledger.champion, "alpha": alpha}
        with explained(ledger.path), ledger.path.open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            begin = "" if file.read() in (b"", b"\n") else "\n"  # an editor may have taken the last line's end
            file.write(f"{begin}{json.dumps(line)}\n".encode())
    looked = dict.fromkeys([*((line["trained"], line["champion"]) for line in ledger.lines), pair])
    return f"look {[*looked].index(pair) + 1} of {recipe.evaluate.looks} on these test rows, counted in {LEDGER}"
