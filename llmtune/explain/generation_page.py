"""The page of an answer: its four stages, step by step, and where base and tuned model part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.explain.html_page import asset, fill, write_page
from llmtune.explain.target import BASE, TUNED
from llmtune.explain.token_json import shown

Facts = Mapping[str, Any]
LEAD = (
    "A model writes a word at a time. Here is each of its steps: the prompt cut into tokens, what every layer would "
    "say if it were the last one, how likely each next word is, and the text so far."
)
LEAD_MASKED = (
    "An encoder fills in what is masked, all at once. Here is each mask: what every layer would say in its place, and "
    "how likely each word is."
)
RIVALS = 6
"""Words of each side that are shown where they part."""
DIGITS = 6


def write_generation_page(path: Path, told: Facts) -> Path:
    """Write what `explain_generation` found as a page."""
    return write_page(
        path,
        title=title(told),
        lead=LEAD_MASKED if told["masked"] else LEAD,
        body=fill("generation.html.jinja", view(told)),
        data=page_data(told),
        script=asset("generation.js"),
        style=asset("generation.css"),
    )


def title(told: Facts) -> str:
    """Say what was asked."""
    given = told["given"]
    asked = given.get("prompt") or Path(str(given.get("audio", ""))).name
    short = " ".join(asked.split())
    return f"Generation: {short if len(short) <= 70 else short[:69] + '…'}"


def view(told: Facts) -> dict[str, Any]:
    """Return what the template shows."""
    return {
        "subject": Path(told["subject"]).name if len(told["traces"]) > 1 else told["subject"],
        "family": told["family"],
        "note": told["note"],
        "masked": told["masked"],
        "system": told["given"].get("system") or "",
        "tokens": [chip(token) for token in told["tokens"]],
        "sides": list(told["traces"]),
        "parting": parting(told) if len(told["traces"]) > 1 else None,
        "moved": [moved(row) for row in told["comparison"]],
        "sampled": told["choice"]["sample"],
    }


def chip(token: Facts) -> dict[str, Any]:
    """Return a token as a chip."""
    return {"text": shown(token, 60), "id": token["id"], "special": token["special"]}


def parting(told: Facts) -> dict[str, Any]:
    """Return where base and tuned model part: what both say before, and what each could say then."""
    at, traces = told["parting"], told["traces"]
    if at is None:
        return {"at": None}
    rivals = []
    for side in (BASE, TUNED):
        steps = traces[side]["steps"]
        candidates = steps[at]["candidates"][:RIVALS] if at < len(steps) else []
        said = steps[at]["token"]["id"] if at < len(steps) else None
        rivals.append({"side": side, "words": [rival(one, said) for one in candidates]})
    common = [chip(step["token"]) for step in traces[TUNED]["steps"][:at]]
    return {"at": at + 1, "common": common, "rivals": rivals}


def rival(one: Facts, said: int | None) -> dict[str, Any]:
    """Return a word with its probability, as text and as the width of a bar."""
    return {
        "text": shown(one, 30),
        "share": percent(one["probability"]),
        "width": f"{100 * one['probability']:.1f}",
        "said": one["id"] == said,
    }


def moved(row: Facts) -> dict[str, Any]:
    """Return how likely a word of the tuned model's answer is to both."""
    says = row["base_says"]
    return {
        "text": shown(row, 30),
        "base": percent(row["base"]),
        "tuned": percent(row["tuned"]),
        "base_width": f"{100 * row['base']:.1f}",
        "tuned_width": f"{100 * row['tuned']:.1f}",
        "rank": f"{row['base_rank']:,}",
        "says": "" if row["base_rank"] == 1 else f"{shown(says, 30)} {percent(says['probability'])}",
    }


def percent(value: float) -> str:
    """Write a probability in percent, small ones with their first digit."""
    number = 100 * value
    if number >= 99.95:
        return "100 %" if number >= 99.9995 else "> 99.9 %"
    return f"{number:.1f} %" if number >= 0.1 else f"{number:.2g} %" if number >= 0.001 else "< 0.001 %"


def page_data(told: Facts) -> dict[str, Any]:
    """Return what the script shows, in few letters: words by number, the rest as lists."""
    words: dict[tuple[int, str], int] = {}

    def word(token: Facts) -> int:
        return words.setdefault((token["id"], shown(token, 30)), len(words))

    sides = {side: [pack(step, word) for step in trace["steps"]] for side, trace in told["traces"].items()}
    return {
        "sides": sides,
        "ended": {side: trace["ended"] for side, trace in told["traces"].items()},
        "words": [text for _, text in words],
        "ids": [number for number, _ in words],
        "temperatures": told["temperatures"],
        "choice": told["choice"],
        "parting": told["parting"],
        "masked": told["masked"],
    }


def pack(step: Facts, word: Any) -> dict[str, Any]:
    """Return one step: `w`ord, `p`robability, `b`its, `c`andidates, `z` by temperature, `l`ayers."""
    layers: Sequence[Facts] | None = step["layers"]
    return {
        "w": word(step["token"]),
        "p": brief(step["probability"]),
        "b": brief(step["entropy_bits"]),
        "k": step["kept_tokens"],
        "c": [[word(one), brief(one["probability"]), brief(one["kept"])] for one in step["candidates"]],
        "z": [brief(value) for value in step["partitions"]],
        "l": layers
        and [
            [[[word(one), brief(one["probability"])] for one in layer["says"]], brief(layer["chosen"])]
            for layer in layers
        ],
    }


def brief(value: float) -> float:
    """Return a number with the digits that a picture needs."""
    return float(f"{value:.{DIGITS}g}")
