"""`llmtune explain positions`: the sinusoidal encoding of any length, or how a model knows the order of words."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llmtune.errors import Problem, RecipeError
from llmtune.explain.position_encodings import (
    Scheme,
    find_schemes,
    frequencies,
    similarity_by_distance,
    sinusoidal_encoding,
)
from llmtune.explain.positions_page import write_positions_page
from llmtune.explain.positions_picture import draw_schemes
from llmtune.explain.target import TUNED, Subject
from llmtune.explain.token_text import label, name_tokens
from llmtune.model.memory_plan import context_length
from llmtune.store.atomic_files import explained, write_json

LONGEST, WIDEST = 4096, 4096
"""Positions and dimensions of an encoding: more than that is no table any more."""
MOST_CELLS = 1 << 20
"""Of one encoding."""
FIRST = 512
"""Positions of a model that are shown where no text and no length is given."""
DEFAULT_LENGTH, DEFAULT_DIMENSION, DEFAULT_BASE = 64, 64, 10_000.0
NONE_FOUND = (
    "No table, rotation or bias of positions was found in this model: it knows the order of words in another way "
    "(convolutions, recurrence), or in one that is not known here."
)


@dataclass(frozen=True)
class Asked:
    """What a person asks for; what is None is not given."""

    text: str | None = None
    length: int | None = None
    dimension: int | None = None
    base: float | None = None


@dataclass(frozen=True)
class Shown:
    """What is shown: how positions are known, over how many of them, and which words stand at them."""

    name: str
    """Of the model; empty for an encoding by itself."""
    schemes: list[Scheme]
    length: int
    words: list[str]
    """Empty where there is no text."""
    base: float | None = None
    tuned: str = ""
    """Of a run, what the tuning did to its positions."""


def explain_positions(
    asked: Asked, subject: Subject | None, folder: Path, console: Console
) -> tuple[Shown, dict[str, Any], list[Path]]:
    """Write page, pictures and numbers into `folder`.

    Returns:
        What was shown, the same as JSON values, and the files.

    Raises:
        RecipeError: a text that is empty or longer than the model's positions; an option out of range or of no use.
    """
    shown = encode(asked) if subject is None else look(asked, subject, console)
    told = tell(shown)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        pictures = draw_schemes(shown.schemes, shown.length, shown.words, folder / "positions") if shown.schemes else []
        page = write_positions_page(folder / "positions.html", shown, NONE_FOUND)
        write_json(folder / "positions.json", told)
    return shown, told, [page, *pictures, folder / "positions.json"]


def encode(asked: Asked) -> Shown:
    """Compute the sinusoidal encoding of a text's words, which are cut at spaces, or of a number of positions."""
    words = asked.text.split() if asked.text is not None else []
    length = len(words) if asked.text is not None else asked.length or DEFAULT_LENGTH
    dimension = DEFAULT_DIMENSION if asked.dimension is None else asked.dimension
    base = DEFAULT_BASE if asked.base is None else asked.base
    problems = _text_problems(asked, bool(words))
    if length > LONGEST:
        option = "--length" if asked.text is None else "--text"
        problems.append(Problem(f"{length:,} positions are too many", option, f"The most is {LONGEST:,}."))
    if dimension < 2 or dimension % 2 or dimension > WIDEST:
        fix = f"Give an even number from 2 to {WIDEST:,}."
        problems.append(Problem(f"{dimension:,}: dimensions come in pairs of sine and cosine", "--dimension", fix))
    elif length * dimension > MOST_CELLS >= 0 and length <= LONGEST:
        what = f"{length:,} × {dimension:,} numbers are too many for a picture"
        problems.append(Problem(what, "--dimension", f"The most is {MOST_CELLS:,}."))
    if not (math.isfinite(base) and base > 1):
        problems.append(Problem(f"{base:g}: waves would not grow longer", "--base", "Give a number above 1."))
    RecipeError.collect(problems)
    table = sinusoidal_encoding(length, dimension, base)
    waves = 2 * np.pi / frequencies(dimension, base)
    facts = {"positions": f"{length:,}", "dimensions": f"{dimension:,}", "base n": f"{base:,g}"}
    facts["waves"] = f"{waves[0]:.2f} to {waves[-1]:,.2f} positions"
    return Shown("", [Scheme("sinusoidal", "", table, facts=facts)], length, words, base)


def _text_problems(asked: Asked, some: bool) -> list[Problem]:
    problems = []
    if asked.text is not None and not some:
        problems.append(Problem("it is empty", "--text", "Give at least one word."))
    if asked.text is not None and asked.length is not None:
        problems.append(Problem("the text says how many positions there are", "--length", "Leave it out."))
    return problems


def look(asked: Asked, subject: Subject, console: Console) -> Shown:
    """Find how a model knows positions; of a run, whether the tuning changed that, and then the tuned model's."""
    ids = list(subject.processor(asked.text, verbose=False)["input_ids"]) if (asked.text or "").strip() else []
    problems = _text_problems(asked, bool(ids))
    for name, value in (("dimension", asked.dimension), ("base", asked.base)):
        if value is not None:
            problems.append(Problem("a model has its own", f"--{name}", "Leave it out, or name no model."))
    limit = context_length(subject.config)
    most = min(limit or LONGEST, LONGEST)
    wanted = len(ids) or asked.length or 0
    if wanted > most:
        where = "--text" if ids else "--length"
        known = "the model has" if limit == most else "the most that is shown is"
        problems.append(Problem(f"{wanted:,} positions, and {known} {most:,}", where, "Give a shorter one."))
    RecipeError.collect(problems)
    by_side: dict[str, list[Scheme]] = {}
    for side in subject.sides:
        by_side[side] = _schemes_of(subject, side, console)
    schemes = by_side[subject.sides[-1]]
    tables = [len(scheme.values) for scheme in schemes if scheme.kind in ("sinusoidal", "learned")]
    length = wanted or min(max([*tables, 0 if tables else most]), FIRST)
    words = [label(token) for token in name_tokens(subject.processor, ids)]
    name = Path(subject.name).name if subject.recipe else subject.name
    return Shown(name, schemes, length, words, tuned=_compare(by_side) if TUNED in by_side else "")


def _schemes_of(subject: Subject, side: str, console: Console) -> list[Scheme]:
    with ExitStack() as stack:
        with console.status("loading the model"):
            model = stack.enter_context(subject.open_side(side))
        return find_schemes(model)


def _compare(by_side: dict[str, list[Scheme]]) -> str:
    """Say whether the tuning changed how the model knows positions."""
    base, tuned = by_side.values()
    if len(base) == len(tuned) and all(old.equals(new) for old, new in zip(base, tuned, strict=True)):
        return "Unchanged by the tuning."
    changed = [new.name for new in tuned if not any(old.equals(new) for old in base)]
    return f"Changed by the tuning: {', '.join(changed)}. What is shown is the tuned model's."


def tell(shown: Shown) -> dict[str, Any]:
    """Put it into JSON values; a model's own tables are too large, of those it is how alike positions are."""
    return {
        "model": shown.name or None,
        "length": shown.length,
        "words": shown.words,
        "base": shown.base,
        "tuned": shown.tuned or None,
        "schemes": [
            {
                "kind": scheme.kind,
                "title": scheme.title,
                "module": scheme.name or None,
                "facts": scheme.facts,
                **_numbers(scheme, shown),
            }
            for scheme in shown.schemes
        ],
    }


def _numbers(scheme: Scheme, shown: Shown) -> dict[str, Any]:
    if scheme.kind == "bias":
        return {"distances": list(scheme.distances), "bias": scheme.values.tolist()}
    if scheme.kind == "slopes":
        return {"slopes": scheme.values.tolist()}
    alike = {"similarity_by_distance": similarity_by_distance(scheme, shown.length).tolist()}
    if scheme.kind == "rotary":
        return {"angles": scheme.values.tolist(), **alike}
    return {"encoding": scheme.values.tolist(), **alike} if not shown.name else alike
