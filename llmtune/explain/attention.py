"""`llmtune explain attention`: which words look at which, by layer and head; base, tuned and the difference.

Shapes: Q rows (who looks), T columns (what is looked at).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from llmtune.errors import RecipeError
from llmtune.explain.attention_inputs import Given, Reading, read, write
from llmtune.explain.attention_page import write_attention_page
from llmtune.explain.attention_pictures import STEM, draw_pictures
from llmtune.explain.attention_selection import DIFFERENCE, Choice, Seen, Shape, Wishes, choose
from llmtune.explain.attention_summary import MEAN, Gathered, Line, Lines, Mask, among_words, plainest, title_of
from llmtune.explain.capture import CROSS, Kind, attend, shape_of
from llmtune.explain.rollout import Matrix
from llmtune.explain.target import Subject
from llmtune.explain.token_text import Token, label, name_tokens
from llmtune.store.atomic_files import explained

KEPT_BYTES = 2**30
"""Of the heads of all layers, both sides; where they are more, only those of the layer that was asked for are kept."""
STRONGEST = 3
"""Pairs of words that are told of each layer."""


def explain_attention(
    subject: Subject, given: Given, wishes: Wishes, out: Path, console: Console
) -> tuple[dict[str, Any], list[Path]]:
    """Look at the attention on one text and draw it into `out`.

    Returns:
        What was seen, as JSON: words, kinds of attention with their layers and heads, the strongest pairs of each
        layer; and the files.

    Raises:
        RecipeError: an unknown layer, head or kind, or something that this model needs or has no use for.
        DataError: the text is empty or too long, or a recording cannot be read.
        EnvironmentProblem: the model is gone, or does not show its attention.
    """
    shape = shape_of(subject.config, subject.family)
    choice = choose(shape, wishes)
    reading = read(subject, given)
    for note in reading.notes:
        console.print(f"attention: {note}", markup=False)
    sides, lines, said = gather(subject, reading, given, choice, shape, console)
    check_seen(choice, sides[subject.sides[-1]])
    layers = {kind: _layer(choice, list(sides.values()), kind) for kind in choice.kinds}
    seen = Seen(subject, sides, lines, choice, layers)
    with console.status("drawing"), explained(out):
        drawn = draw_pictures(seen, wishes, out, console)
        page = write_attention_page(out / f"{STEM}.html", seen, drawn.thresholds)
    return tell(seen, said, drawn.thresholds), [page, *drawn.files]


def gather(
    subject: Subject,
    reading: Reading,
    given: Given,
    choice: Choice,
    shape: Shape,
    console: Console,
) -> tuple[dict[str, Gathered], Lines, str | None]:
    """Run each side once on the same tokens; returns what was kept of each, the words, and what the decoder wrote."""
    sides: dict[str, Gathered] = {}
    lines, said, inputs = reading.lines(), None, dict(reading.inputs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("layers"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        for side in subject.sides:
            bar = bars.add_task(f"attention: {side}", total=sum(layers for layers, _ in shape.values()))
            with subject.open_side(side) as model:
                if reading.pair is not None and said is None:
                    ids, said = write(model, reading, subject, given)
                    inputs["decoder_input_ids"] = torch.tensor([ids])
                    lines = reading.lines(name_tokens(subject.processor, ids))
                    if not reading.pair.target:
                        told = f"target: {said!r}, the {side}'s own answer; --target gives another"
                        console.print(told, markup=False)
                keep = _keeper(shape, lines, len(subject.sides), choice)
                gathered = Gathered(lines, keep, lambda bar=bar: bars.advance(bar))  # type: ignore[misc]
                attend(model, inputs, subject.family, gathered.see)
            sides[side] = gathered
    return sides, lines, said


def _keeper(shape: Shape, lines: Lines, sides: int, choice: Choice) -> Callable[[Kind, int], bool]:
    """Return what says whether a layer's heads are kept: all of them, or where that is too much the one asked for.

    Raises RecipeError where heads are asked for without a layer, and there is no room for all.
    """
    numbers = sum(
        layers * heads * len(lines.of(kind)[0]) * len(lines.of(kind)[1]) for kind, (layers, heads) in shape.items()
    )
    if 4 * sides * numbers <= KEPT_BYTES:
        return lambda kind, layer: True
    if choice.layer is None and (choice.heads or isinstance(choice.head, int)):
        what = f"the heads of all layers are {4 * sides * numbers / 2**30:.1f} GiB on this text: too many to keep"
        raise RecipeError.of(what, "--layer", "Name a layer, or give a shorter text.")
    return lambda kind, layer: layer == choice.layer


def check_seen(choice: Choice, gathered: Gathered) -> None:
    """Raise RecipeError for a layer that has no attention: in some models only every fourth layer has."""
    for kind in choice.kinds:
        known = gathered.layers.get(kind, {})
        if choice.layer is not None and choice.layer not in known:
            there = ", ".join(map(str, sorted(known)))
            raise RecipeError.of(
                f"layer {choice.layer} has no {kind} attention", "--layer", f"Those that have: {there}."
            )


def _layer(choice: Choice, sides: Sequence[Gathered], kind: Kind) -> int:
    if choice.layer is not None:
        return choice.layer
    base = sides[0].layers[kind] if len(sides) > 1 else None
    return plainest(sides[-1].layers[kind], base, among_words(*sides[-1].lines.of(kind), kind))


def tell(seen: Seen, said: str | None, thresholds: Mapping[Kind, float]) -> dict[str, Any]:
    """Return what was seen as JSON values."""
    source, target = seen.lines.source, seen.lines.target
    kinds = {}
    for kind, layer in seen.layers.items():
        rows, columns = seen.lines.of(kind)
        kinds[kind] = {
            "title": title_of(kind, seen.subject.family),
            "layers": len(seen.numbers(kind)),
            "heads": seen.heads(kind),
            "shown": {"layer": layer, "head": seen.choice.head, "threshold": thresholds.get(kind)},
            "by_layer": [_tell_layer(seen, kind, number, rows, columns) for number in seen.numbers(kind)],
        }
    return {
        "name": seen.subject.name,
        "family": seen.subject.family,
        "sides": list(seen.sides),
        "tokens": {
            "source": [_tell_token(token) for token in source.tokens],
            **({"target": [_tell_token(token) for token in target.tokens]} if target else {}),
        },
        **({"target": said} if said is not None else {}),
        "attention": kinds,
    }


def _tell_token(token: Token) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "special": token.special, "continues": token.continues}


def _tell_layer(seen: Seen, kind: Kind, number: int, rows: Line, columns: Line) -> dict[str, Any]:
    """Return the strongest pairs of words of a layer's mean, and where the rest goes; of a run also what moved most."""
    side = seen.subject.sides[-1]
    mean_QT = seen.weights(side, kind, number, MEAN)
    assert mean_QT is not None, "means are always kept"
    telling_QT = among_words(rows, columns, kind)
    found: dict[str, Any] = {"layer": number, "strongest": _pairs(mean_QT, telling_QT, rows, columns)}
    found["among_words"] = round(float((mean_QT * telling_QT).sum() / len(rows)), 4)
    if kind != CROSS:
        found["itself"] = round(float(mean_QT.trace() / len(rows)), 4)
        found["first"] = round(float(mean_QT[:, 0].mean()), 4)
    change_QT = seen.weights(DIFFERENCE, kind, number, MEAN) if DIFFERENCE in seen.shown else None
    if change_QT is not None:
        found["changed_most"] = _pairs(change_QT, telling_QT, rows, columns)[:1]
        found["mean_change"] = round(float(np.abs(change_QT).sum() / 2 / len(rows)), 6)
    return found


def _pairs(weights_QT: Matrix, telling_QT: Mask, rows: Line, columns: Line) -> list[dict[str, Any]]:
    """Return the pairs with the largest weights in size among those that tell something, as labels."""
    sizes = np.where(telling_QT, np.abs(weights_QT), 0)
    order = np.argsort(-sizes, axis=None, kind="stable")[:STRONGEST]
    places = [divmod(int(at), weights_QT.shape[1]) for at in order]
    return [
        {
            "from": label(rows.tokens[i]),
            "to": label(columns.tokens[k]),
            "row": i,
            "column": k,
            "weight": round(float(weights_QT[i, k]), 6),
        }
        for i, k in places
        if sizes[i, k] > 0
    ]
