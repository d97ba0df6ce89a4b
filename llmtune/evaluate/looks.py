"""`evaluate.looks`: models that share the error of gates on the same test rows, as `releases.jsonl` counts them."""

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
from llmtune.evaluate.release_file import find_release, read_release
from llmtune.recipe.evaluate_section import ERROR
from llmtune.recipe.schema import Recipe
from llmtune.records import Json
from llmtune.store.atomic_files import explained, hash_file, hash_value

LEDGER = "releases.jsonl"
KEY = "evaluate.looks"
ROUNDING = 1e-12


class Look(TypedDict):
    """A line of the ledger."""

    tests: str
    trained: str
    champion: str
    alpha: Annotated[float, Field(gt=0, le=ERROR)]
    run: NotRequired[str]


@dataclass(frozen=True)
class Ledger:
    """What `releases.jsonl` beside the champion says of one set of test rows."""

    path: Path
    tests: str
    """Hash of the test rows, whatever their order."""
    champion: str
    """Hash of what the champion's run trained."""
    lines: tuple[Look, ...]

    def spent(self, trained: str = "") -> float:
        """Return the error that models have spent; without that of `trained` against this champion."""
        spent = defaultdict[tuple[str, str], float](float)
        for line in self.lines:
            spent[line["trained"], line["champion"]] = max(spent[line["trained"], line["champion"]], line["alpha"])
        return sum(alpha for looked, alpha in spent.items() if looked != (trained, self.champion))

    def require_left(self, alpha: float, trained: str = "") -> None:
        """Raise RecipeError where less than `alpha` of the error is left."""
        left = ERROR - self.spent(trained)
        if alpha <= left + ROUNDING:
            return
        looked = len({(line["trained"], line["champion"]) for line in self.lines})
        what = f"{looked} models were held against these test rows already, and their error is spent"
        fix = "Give data.test new rows: the count begins anew with them."
        if left > ROUNDING:
            fix = f"Set it to {int(ERROR / left) + 1} or more, for wider intervals; or give data.test new rows."
        raise RecipeError.of(what, f"{KEY}: {self.path}", fix)


def open_ledger(recipe: Recipe, champion: ScoredRun) -> Ledger | None:
    """Open the ledger beside the champion of a recipe; None where it wants no looks counted.

    Raises:
        RecipeError: the champion is no release, beside which the ledger lies.
        EnvironmentProblem: it cannot be written, or one of its lines is damaged.
    """
    if recipe.evaluate.looks is None:
        return None
    release = find_release(Path(recipe.evaluate.champion or ""), recipe.name)
    if not release.is_file():
        what = "looks are counted beside a release file, and the champion is a run folder"
        raise RecipeError.of(what, KEY, f"Write one, and name it as evaluate.champion: llmtune release {release}")
    path = release.parent / LEDGER
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        fix = "Give the job a copy of the folder that it may write, and keep the file that it leaves there."
        raise EnvironmentProblem.of("cannot be written, so this look would not be counted", str(path), fix)
    tests = hash_value(sorted(champion.measures.rows))
    with explained(path):
        texts = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    try:
        lines = [TypeAdapter(Look).validate_json(text) for text in texts if text.strip()]
    except ValidationError:
        fix = "Put it back as the repository has it; of a merge, keep the lines of both sides."
        raise EnvironmentProblem.of("damaged: a line is not what llmtune wrote", str(path), fix) from None
    own = tuple(line for line in lines if line["tests"] == tests)
    return Ledger(path, tests, read_release(release)["trained"], own)


def hash_weights(run: Path) -> str:
    """Hash what a run trained, without what names folders of this machine."""
    files = [*run.glob("adapter/*.safetensors"), *run.glob("weights/*.safetensors")]
    return hash_value([hash_file(file) for file in sorted(files)])


def check_looks(recipe: Recipe, champion: ScoredRun, fingerprint: str) -> None:
    """Refuse, before training, a run for which no error is left; one that has been counted may come again."""
    ledger = open_ledger(recipe, champion)
    if ledger and fingerprint not in {line.get("run") for line in ledger.lines}:
        ledger.require_left(recipe.evaluate.alpha)


def count_look(recipe: Recipe, champion: ScoredRun, fingerprint: str, trained: str) -> str | None:
    """Add a look to the ledger, before its scores are seen, and return which it is; None where none is counted.

    The same model against the same champion is counted once, and the champion itself is not.

    Raises as `open_ledger` does, and RecipeError where the error is spent.
    """
    ledger = open_ledger(recipe, champion)
    if ledger is None or trained == ledger.champion:
        return None
    alpha, own = recipe.evaluate.alpha, (trained, ledger.champion)
    known = [line for line in ledger.lines if (line["trained"], line["champion"]) == own]
    if max((line["alpha"] for line in known), default=0.0) < alpha:
        ledger.require_left(alpha, trained)
        line: Json = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "name": recipe.name, "run": fingerprint}
        line |= {"tests": ledger.tests, "trained": trained, "champion": ledger.champion, "alpha": alpha}
        with explained(ledger.path), ledger.path.open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            begin = "" if file.read() in (b"", b"\n") else "\n"  # an editor may have taken the last line's end
            file.write(f"{begin}{json.dumps(line)}\n".encode())
    looked = dict.fromkeys([*((line["trained"], line["champion"]) for line in ledger.lines), own])
    return f"look {[*looked].index(own) + 1} of {recipe.evaluate.looks} on these test rows, counted in {LEDGER}"
