"""Paired sentences about groups of people, as they are read: own, CrowS-Pairs, StereoSet; files and the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmtune.data.file_readers import RawRow, Unreadable, explained, open_bytes, read_file
from llmtune.data.hub_datasets import HUB, read_hub
from llmtune.data.sources import ENDINGS, PACKED
from llmtune.errors import DataError, Problem
from llmtune.recipe import Source
from llmtune.recipe.eval_suites_section import OWN

SETS = Path(__file__).parent / "groups"
"""What comes with llmtune."""
BLANK = "BLANK"
"""Where StereoSet's word stands in its sentence."""
STEREOSET = ("stereotype", "anti-stereotype", "unrelated")
"""The options of StereoSet, in the order in which they are kept."""
MOST_SHOWN = 20
"""Bad rows that are named; more are counted."""
FORMS = "CrowS-Pairs (sent_more, sent_less), StereoSet (context, sentences), or more and less"
Form = Literal["pair", "within", "between"]


@dataclass(frozen=True)
class Pair:
    """Sentences that differ in the group they are about, the one that follows a stereotype first."""

    options: tuple[str, ...]
    """Two; of StereoSet three: stereotype, anti-stereotype, unrelated."""
    origin: str
    source: str
    """Where it comes from, as a person calls it."""
    group: str = ""
    form: Form = "pair"
    """`within`: StereoSet's sentences that differ in a word; `between`: its sentences that may follow a context."""
    context: str = ""
    """Of StereoSet: the sentence with a blank, or what stands before the options."""
    target: str = ""
    """Of StereoSet: the term that the sentences are about, over which scores are averaged."""


def read_pairs(places: Sequence[str]) -> list[Pair]:
    """Read all pairs; each place is `own`, a file or a data set of the hub.

    Raises:
        DataError: A place is not there or not to be read, or holds rows that are no pairs: all of them at once.
        EnvironmentProblem: The hub cannot be reached.
    """
    found: list[Pair] = []
    problems: list[Problem] = []
    for place in places:
        name = OWN if place == OWN else place if place.startswith(HUB) else Path(place).name
        before, bad = len(found), len(problems)
        for origin, row in raw_rows(place):
            pair = row if isinstance(row, Unreadable) else read_pair(row, origin, name)
            if isinstance(pair, Pair):
                found.append(pair)
            else:
                problems.append(Problem(f"{pair.reason}: {pair.detail}", origin, f"Pairs are {FORMS}."))
        if len(found) == before and len(problems) == bad:
            problems.append(Problem("there are no pairs in it", place, f"Pairs are {FORMS}."))
    if len(problems) > MOST_SHOWN:
        more = Problem(f"{len(problems) - MOST_SHOWN} more rows are no pairs", "evaluate.fairness.pairs")
        problems = [*problems[:MOST_SHOWN], more]
    DataError.collect(problems)
    return found


def raw_rows(place: str) -> Iterator[RawRow]:
    """Yield the rows of one place with their origins."""
    if place.startswith(HUB):
        source = hub_source(place)
        yield from read_hub(source.path.removeprefix(HUB), source)
        return
    path = SETS / "pairs.jsonl" if place == OWN else Path(place)
    if not path.is_file():
        raise DataError.of("there is no such file", place, "Correct evaluate.fairness.pairs.")
    container = container_of(path)
    if container is None:
        fix = f"Endings: {', '.join(ending for ending, kind in ENDINGS.items() if kind != 'text')}."
        raise DataError.of("the file's ending does not say what it holds", place, fix)
    yield from read_whole(path) if container == "json" else read_file(path, path.name, container)


def hub_source(place: str) -> Source:
    """Take `hub:OWNER/NAME/CONFIG` apart; owner and configuration may be missing."""
    owner, *name = place.removeprefix(HUB).split("/")
    config = name.pop() if len(name) > 1 else None
    return Source(path=HUB + "/".join([owner, *name]), config=config)


def container_of(path: Path) -> str | None:
    """Tell by a file's ending what it holds; None for text and what is not known."""
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    container = ENDINGS.get(Path(name).suffix)
    return None if container == "text" else container


def read_whole(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a JSON file: a list of them, or StereoSet's object with its two lists."""
    with explained(path.name), open_bytes(path) as stream:
        try:
            content = json.loads(stream.read().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError.of(
                f"the file is not UTF-8 at byte {error.start}", path.name, "Save it as UTF-8."
            ) from error
        except json.JSONDecodeError as error:
            raise DataError.of(f"not valid JSON: {error.msg}", f"{path.name}:{error.lineno}") from error
    held = content.get("data", content) if isinstance(content, dict) else {"row": content}
    lists = {name: rows for name, rows in held.items() if isinstance(rows, list)} if isinstance(held, dict) else {}
    for name, rows in lists.items():
        for number, row in enumerate(rows, 1):
            known = row if isinstance(row, dict) else Unreadable("not a JSON object", f"it is {row!r:.60}")
            yield f"{path.name}:{name} {number}", known


def read_pair(row: Mapping[str, Any], origin: str, source: str) -> Pair | Unreadable:
    """Tell by its columns what a row is, and read it; or say why it is no pair."""
    if "sent_more" in row and "sent_less" in row:
        texts, about = (row["sent_more"], row["sent_less"]), {"group": row.get("bias_type")}
    elif "more" in row and "less" in row:
        texts, about = (row["more"], row["less"]), {"group": row.get("group")}
    elif "context" in row and ("sentences" in row or "stereotype" in row):
        options = stereoset_options(row)
        if isinstance(options, Unreadable):
            return options
        texts, about = options, {"group": row.get("bias_type"), "context": row["context"], "target": row.get("target")}
        if not is_text(row["context"]):
            return Unreadable("not a pair", f"context is {row['context']!r:.60}")
        about["form"] = "within" if BLANK in row["context"] else "between"
    else:
        return Unreadable("not a pair", f"its columns are {', '.join(map(str, row)) or '(none)'}")
    for text in texts:
        if not is_text(text):
            return Unreadable("not a pair", f"a sentence is {text!r:.60}")
    stripped = tuple(str(text).strip() for text in texts)
    if len(set(stripped)) < len(stripped):
        return Unreadable("not a pair", f"two sentences are equal: {stripped[0]!r:.60}")
    if about.get("form") == "within" and word_at_blank(str(about["context"]), stripped[0]) is None:
        return Unreadable("not a pair", f"{stripped[0]!r:.60} is not the context with a word at its {BLANK}")
    told: dict[str, Any] = {name: str(value) for name, value in about.items() if value not in (None, "")}
    return Pair(stripped, origin, source, **told)


def stereoset_options(row: Mapping[str, Any]) -> tuple[Any, ...] | Unreadable:
    """Return the three options of StereoSet, whose file, hub form and flat form name them each in its own way."""
    if "sentences" not in row:
        return tuple(row.get(name) for name in STEREOSET)
    held = row["sentences"]
    if isinstance(held, Mapping):  # the hub has lists side by side, and numbers for labels
        sentences, labels = held.get("sentence") or [], held.get("gold_label") or []
        numbered = dict(enumerate(("anti-stereotype", "stereotype", "unrelated")))
        named = {numbered.get(label, label): text for text, label in zip(sentences, labels, strict=False)}
    elif isinstance(held, list) and all(isinstance(one, Mapping) for one in held):
        named = {one.get("gold_label"): one.get("sentence") for one in held}
    else:
        return Unreadable("not a pair", f"sentences are {held!r:.60}")
    missing = [name for name in STEREOSET if name not in named]
    if missing:
        return Unreadable("not a pair", f"no sentence has the gold_label {' or '.join(missing)}")
    return tuple(named[name] for name in STEREOSET)


def word_at_blank(context: str, option: str) -> tuple[int, int] | None:
    """Return where in `option` the characters stand that fill the blank of `context`; None if it has other words.

    Words are counted, as StereoSet's own script does: options differ from the context in more than the blank at times.
    """
    words = context.split()
    at = next(i for i, word in enumerate(words) if BLANK in word)
    places = [found.span() for found in re.finditer(r"\S+", option)]
    inside = places[at : len(places) - (len(words) - at - 1)]
    if not inside:
        return None
    before, after = words[at].split(BLANK, 1)
    start = inside[0][0] + len(before)
    word = option[start : inside[-1][1]].removesuffix(after).rstrip(".,;:!?")
    return (start, start + len(word)) if word.strip() else None


def is_text(value: Any) -> bool:
    """Whether a value is a text that says something."""
    return isinstance(value, str) and bool(value.strip())
