"""Paired sentences about groups of people, as they are read: own, CrowS-Pairs, StereoSet; files and the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmtune.data.file_readers import RawRow, read_file
from llmtune.data.hub_datasets import HUB, read_hub, resolve_commit
from llmtune.data.rejected_rows import RowError
from llmtune.errors import DataError, Problem
from llmtune.evaluate.eval_suite import OWN_FILES, read_sources, read_utf8
from llmtune.recipe.data_section import DATA_ENDINGS, PACKED, Source
from llmtune.recipe.eval_suites_section import OWN

BLANK = "BLANK"
"""Where StereoSet's word stands in its sentence."""
STEREOSET = ("stereotype", "anti-stereotype", "unrelated")
"""The options of StereoSet, in the order in which they are kept."""
HUB_LABELS = ("anti-stereotype", "stereotype", "unrelated")
"""StereoSet's labels by the numbers that the hub has for them."""
FIX = "Pairs are CrowS-Pairs (sent_more, sent_less), StereoSet (context, sentences), or more and less."
MISSING_FIX = "Correct evaluate.fairness.pairs."
Layout = Literal["pair", "within", "between"]


@dataclass(frozen=True)
class Pair:
    """Sentences that differ in the group they are about, the one that follows a stereotype first."""

    options: tuple[str, ...]
    """Two; of StereoSet three: stereotype, anti-stereotype, unrelated."""
    origin: str
    source: str
    """Where it comes from, as a person calls it."""
    group: str = ""
    context: str = ""
    """Of StereoSet: the sentence with a blank, or what stands before the options."""
    target: str = ""
    """Of StereoSet: the term that the sentences are about, over which scores are averaged."""

    @property
    def layout(self) -> Layout:
        """`within`: StereoSet's sentences that differ in a word; `between`: its sentences that may follow a context."""
        return "pair" if not self.context else "within" if BLANK in self.context else "between"


class NotAPair(ValueError):
    """A row that cannot be read as a pair, and why."""


def read_pairs(sources: Sequence[str]) -> list[Pair]:
    """Read all pairs; each source is `own`, a file or a data set of the hub.

    Raises:
        DataError: A source is missing or cannot be read, or holds rows that are no pairs: all of them at once.
        EnvironmentProblem: The hub cannot be reached.
    """
    return read_sources(sources, read_source, "pair", FIX)


def read_source(source: str) -> list[Pair | Problem]:
    """Read the pairs of one source, and what is wrong with its other rows."""
    name = source if source == OWN or source.startswith(HUB) else Path(source).name
    items: list[Pair | Problem] = []
    for origin, row in raw_rows(source):
        if isinstance(row, RowError):
            items.append(Problem(f"{row.reason}: {row.detail}", origin, FIX))
            continue
        try:
            items.append(make_pair(row, origin, name))
        except NotAPair as error:
            items.append(Problem(f"not a pair: {error}", origin, FIX))
    return items


def raw_rows(source: str) -> Iterator[RawRow]:
    """Yield the rows of one source with their origins."""
    if source.startswith(HUB):
        dataset = hub_source(source)
        yield from read_hub(dataset.path.removeprefix(HUB), dataset)
        return
    path = Path(str(OWN_FILES.joinpath("groups/pairs.jsonl"))) if source == OWN else Path(source)
    if not path.is_file():
        raise DataError.of("there is no such file", source, MISSING_FIX)
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    container = DATA_ENDINGS.get(Path(name).suffix, "text")
    if container == "text":
        fix = f"Endings: {', '.join(ending for ending, kind in DATA_ENDINGS.items() if kind != 'text')}."
        raise DataError.of("the file's ending does not say what it holds", source, fix)
    yield from read_json_lists(path) if container == "json" else read_file(path, path.name, container)


def hub_source(source: str) -> Source:
    """Take `hub:OWNER/NAME/CONFIG` apart; owner and configuration may be missing."""
    owner, *name = source.removeprefix(HUB).split("/")
    config = name.pop() if len(name) > 1 else None
    return Source(path=HUB + "/".join([owner, *name]), config=config)


def hub_commits(sources: Sequence[str]) -> list[str]:
    """Return the commits of the data sets of the hub that are among the sources."""
    named = [hub_source(source).path.removeprefix(HUB) for source in sources if source.startswith(HUB)]
    return [resolve_commit(name, None) for name in named]


def read_json_lists(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a JSON file: a list of them, or StereoSet's object with its two lists."""
    try:
        content = json.loads(read_utf8(path, MISSING_FIX))
    except json.JSONDecodeError as error:
        raise DataError.of(f"not valid JSON: {error.msg}", f"{path.name}:{error.lineno}") from error
    held = content.get("data", content) if isinstance(content, dict) else {"row": content}
    for name, rows in held.items() if isinstance(held, dict) else ():
        for number, row in enumerate(rows if isinstance(rows, list) else (), 1):
            known = row if isinstance(row, dict) else RowError("not a JSON object", f"it is {row!r:.60}")
            yield f"{path.name}:{name} {number}", known


def make_pair(row: Mapping[str, object], origin: str, source: str) -> Pair:
    """Read a row by the columns that it has. Raises NotAPair."""
    group, context = row.get("bias_type"), ""
    if "sent_more" in row and "sent_less" in row:
        texts: Sequence[object] = (row["sent_more"], row["sent_less"])
    elif "more" in row and "less" in row:
        texts, group = (row["more"], row["less"]), row.get("group")
    elif "context" in row and ("sentences" in row or "stereotype" in row):
        texts, context = stereoset_options(row), sentence(row["context"], "context")
    else:
        raise NotAPair(f"its columns are {', '.join(map(str, row)) or '(none)'}")
    options = tuple(sentence(text, "a sentence").strip() for text in texts)
    if len(set(options)) < len(options):
        raise NotAPair(f"two sentences are equal: {options[0]!r:.60}")
    if BLANK in context and word_at_blank(context, options[0]) is None:
        raise NotAPair(f"{options[0]!r:.60} is not the context with a word at its {BLANK}")
    group, target = ("" if value is None else str(value) for value in (group, row.get("target")))
    return Pair(options, origin, source, group, context, target)


def stereoset_options(row: Mapping[str, object]) -> list[object]:
    """Return the three options of StereoSet, whose file, hub form and flat form name them each in its own way."""
    if "sentences" not in row:
        return [row.get(name) for name in STEREOSET]
    sentences = row["sentences"]
    labelled: dict[object, object] = {}
    if isinstance(sentences, Mapping):  # the hub has lists side by side, and numbers for labels
        numbered = dict(enumerate(HUB_LABELS))
        labels = [numbered.get(label, label) for label in sentences.get("gold_label") or []]
        labelled = dict(zip(labels, sentences.get("sentence") or [], strict=False))
    elif isinstance(sentences, list) and all(isinstance(one, Mapping) for one in sentences):
        labelled = {one.get("gold_label"): one.get("sentence") for one in sentences}
    else:
        raise NotAPair(f"sentences are {sentences!r:.60}")
    missing = [name for name in STEREOSET if name not in labelled]
    if missing:
        raise NotAPair(f"no sentence has the gold_label {' or '.join(missing)}")
    return [labelled[name] for name in STEREOSET]


def sentence(value: object, name: str) -> str:
    """Return a value that is text with something in it. Raises NotAPair."""
    if not isinstance(value, str) or not value.strip():
        raise NotAPair(f"{name} is {value!r:.60}")
    return value


def word_at_blank(context: str, option: str) -> tuple[int, int] | None:
    """Return where in `option` the characters stand that fill the blank of `context`; None if it has other words.

    Words are counted, as StereoSet's own script does: options differ from the context in more than the blank at times.
    """
    words = context.split()
    at = next(i for i, word in enumerate(words) if BLANK in word)
    spans = [word.span() for word in re.finditer(r"\S+", option)]
    inside = spans[at : len(spans) - (len(words) - at - 1)]
    if not inside:
        return None
    before, after = words[at].split(BLANK, 1)
    start = inside[0][0] + len(before)
    word = option[start : inside[-1][1]].removesuffix(after).rstrip(".,;:!?")
    return (start, start + len(word)) if word.strip() else None
