"""The data report: how many rows were kept, why others were dropped, their lengths, and the supervised share."""

from __future__ import annotations

import base64
import io
import json
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from llmtune.data.chat_template import read_template
from llmtune.data.data_notes import (
    filled_sentence,
    long_answers_sentence,
    lost_sentence,
    picture_blocks,
    shorten,
    vanishing_sentence,
)
from llmtune.data.examples import ExampleReader
from llmtune.data.pictures import PLACE, Picture, open_picture, picture_name, row_pictures
from llmtune.data.row_hash import iterate_strings
from llmtune.data.row_kind import kind_of_row, write_prompt
from llmtune.data.row_store import iterate_texts
from llmtune.data.task_interface import TaskInterface
from llmtune.data.tokenization import decode
from llmtune.display.blocks import Column, Table
from llmtune.display.blocks import Text as Note
from llmtune.display.console import print_blocks
from llmtune.recipe.schema import Recipe
from llmtune.recipe.secrets import redact_all, secret_values
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Examples, Json, Row, Rows
from llmtune.store.atomic_files import write_json
from llmtune.store.run_folder import THUMBNAILS

BINS = 10
SHOWN = 30
BAR_CELLS = 40
PICTURES = 12
"""How many pictures are shown with their rows."""
THUMBNAIL_SIDE = 160
PRINTABLE = frozenset(string.ascii_letters + string.digits + string.punctuation + " ")


def describe_examples(
    rows: Rows,
    examples: Examples,
    processor: PreTrainedTokenizerBase,
    console: Console,
    task: TaskInterface,
    recipe: Recipe,
) -> dict[str, object]:
    """Print the data report and return it in a form that JSON can represent.

    Keys: `rows_in`; `rows`, `examples`, `tokens`, `supervised` and `longest` by split; `supervised_share` (None if no
    tokens are predicted); `dropped` by reason (`rows` and `examples` together); `lost` (what truncated rows lost:
    `rows`, `answers`, `tokens`, and `supervised` tokens); `long_answers` (of `count_long_answers`); `filled` (null keys
    that Arrow added); `vanishing` (rows by character that the tokenizer drops); `pictures` (of
    `describe_pictures`); `histogram` (training examples: `edges` in tokens, `counts`); `example`, the first training
    example as pieces `[text, learned]`.
    """
    train = ExampleReader(examples, "train", task.example_type)
    edges, counts = _histogram(train.lengths)
    dropped = dict(rows.dropped)
    for reason, count in examples.dropped.items():
        dropped[reason] = dropped.get(reason, 0) + count
    secrets = [*secret_values(recipe.model.chat_template_kwargs)]  # others read the console in CI
    pieces = redact_all(task.highlighted_text(train[0], processor, recipe), secrets)
    classes = task.class_counts(rows, recipe)
    share = sum(examples.supervised.values()) / max(1, sum(examples.tokens.values()))
    vanishing, texts = dict[str, int](), (text for split in rows.files for _, text in iterate_texts(rows, split))
    pictures, thumbnails = describe_pictures(rows)
    if thumbnails:
        write_json(examples.folder / Path(THUMBNAILS).name, thumbnails)
    if not TASK_FACTS[task.name].takes_audio:
        vanishing = find_vanishing((text.replace(PLACE, "") for text in texts), processor)
    long_answers = count_long_answers(task, examples, recipe)
    blocks = [_splits(rows, examples), _dropped(rows.rows_in, dropped), *picture_blocks(pictures)]
    blocks += _notes(rows, examples, vanishing, long_answers)
    print_blocks([*blocks, _bars(edges, counts), *([_classes(classes)] if classes else [])], console)
    _name_missing(classes, console)
    if task.predicts_tokens:
        console.print(f"{share:.1%} of all tokens are learned.")
    if recipe.data.system_prompt is None:
        _name_system_message(task, processor, recipe, "".join(text for text, _ in pieces), console)
    _print_example(pieces, console)
    return {
        "rows_in": rows.rows_in,
        "rows": dict(rows.counts),
        "examples": dict(examples.counts),
        "tokens": dict(examples.tokens),
        "supervised": dict(examples.supervised),
        "longest": dict(examples.longest),
        "supervised_share": share if task.predicts_tokens else None,
        "dropped": dropped,
        "lost": dict(examples.lost),
        "long_answers": long_answers,
        "filled": rows.filled,
        "vanishing": vanishing,
        "pictures": pictures,
        "histogram": {"edges": edges, "counts": counts},
        "example": [list(piece) for piece in pieces],
        "classes": classes,
    }


def _print_example(pieces: Sequence[tuple[str, bool]], console: Console) -> None:
    start, end, title = "", "", "one example: green is learned"
    if console.no_color or console.color_system is None:
        start, end, title = ">>>", "<<<", "one example: >>>text<<< is learned"
    marked = ((f"{start}{piece}{end}", "green") if learned else (piece, "dim") for piece, learned in pieces)
    console.print(Panel(Text.assemble(*marked), title=title, title_align="left"))


def describe_pictures(rows: Rows) -> tuple[Json, list[str]]:
    """Count the pictures of all rows; return facts, empty without pictures, and thumbnails as data URLs.

    Keys: `rows` with pictures, `pictures` in them, `different` ones; of these the size of the `smallest` and `largest`
    (width and height), and how many were `converted`, by conversion; `shown`: name, size, prompt and answer of up to
    PICTURES of training, chosen by hash.
    """
    facts: Json = {"rows": 0, "pictures": 0}
    contents, sizes, shown = set[str](), list[list[int]](), dict[str, tuple[Picture, Row]]()
    converted: Counter[str] = Counter()
    for split, text in ((name, text) for name in rows.files for _, text in iterate_texts(rows, name)):
        row = json.loads(text) if '"look":' in text else {}
        pictures = row_pictures(row)
        facts["rows"] += bool(pictures)
        facts["pictures"] += len(pictures)
        for picture in pictures:
            if split == "train":
                shown.setdefault(picture["content"], (picture, row))
            if len(shown) > PICTURES:
                del shown[max(shown)]
            if picture["content"] not in contents:
                contents.add(picture["content"])
                sizes = [*sizes, picture["size"]]
                sizes = [min(sizes, key=prod), max(sizes, key=prod)]
                converted.update(filter(None, picture.get("converted", "").split(", ")))
    if not contents:
        return {}, []
    listed = [_show(*shown[content]) for content in sorted(shown)]
    facts |= {"different": len(contents), "smallest": sizes[0], "largest": sizes[1], "converted": dict(converted)}
    return facts | {"shown": listed}, [thumbnail(shown[content][0]) for content in sorted(shown)]


def _show(picture: Picture, row: Row) -> list[str]:
    kind = kind_of_row(row)
    prompt, answer = write_prompt(kind.without_answer(row)), kind.answer(row)
    size = " x ".join(map(str, picture["size"]))
    return [picture_name(picture), size, shorten(prompt), shorten(answer)]


def thumbnail(picture: Picture) -> str:
    """Return a small copy of a picture as a data URL, about 5 kB."""
    image, stream = open_picture(picture), io.BytesIO()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def count_long_answers(task: TaskInterface, examples: Examples, recipe: Recipe) -> Json:
    """Count the rows whose answer the model learns and can never give, because it is longer than a key allows.

    Keys: `key`, `limit`, `longest` (tokens of the longest answer), and `rows` by split; empty if there are none.
    """
    limit, sizes = task.answer_limit(recipe), dict[str, dict[int, int]]()
    if limit is None:
        return {}
    for split in examples.counts:
        reader = ExampleReader(examples, split, task.example_type)
        sizes[split] = {}
        for row, example in zip(reader.rows.tolist(), reader, strict=True):
            sizes[split][row] = max(sizes[split].get(row, 0), task.answer_size(example))
    counts = {split: sum(size > limit[1] for size in row_sizes.values()) for split, row_sizes in sizes.items()}
    longest = max((size for row_sizes in sizes.values() for size in row_sizes.values()), default=0)
    return {"key": limit[0], "limit": limit[1], "longest": longest, "rows": counts} if longest > limit[1] else {}


def _notes(rows: Rows, examples: Examples, vanishing: Mapping[str, int], long_answers: Json) -> Iterator[Note]:
    """Yield a note on each kind of content that rows lost on their way to the model."""
    if rows.filled:
        yield Note(filled_sentence(rows.filled), "note")
    if vanishing:
        yield Note(vanishing_sentence(vanishing), "note")
    if examples.lost:
        yield Note(lost_sentence(examples.lost, sum(examples.supervised.values())), "note")
    if long_answers:
        yield Note(long_answers_sentence(long_answers), "note")


def _name_missing(classes: Mapping[str, Mapping[str, int]], console: Console) -> None:
    """Print the classes that have no training rows."""
    if missing := [name for name, counts in classes.items() if not counts["train"]]:
        what = f"{len(missing)} of {len(classes)} classes have no training rows and cannot be learned"
        console.print(f"{what}: {escape(', '.join(missing[:SHOWN]))}", style="yellow", highlight=False)


def _name_system_message(
    task: TaskInterface, processor: PreTrainedTokenizerBase, recipe: Recipe, example: str, console: Console
) -> None:
    """Print the system message that the template adds by default, if the example contains it."""
    if not TASK_FACTS[task.name].templated or not processor.chat_template:
        return
    added = read_template(processor, recipe).facts.added_system
    if added is not None and added in example:
        console.print(
            f"The chat template adds a system message if a row has none: {added!r}. "
            "Set data.system_prompt to replace it.",
            highlight=False,
            markup=False,
        )


def _histogram(lengths: npt.NDArray[np.int32]) -> tuple[list[int], list[int]]:
    """Count lengths in bins with integer edges: `edges` has one entry more than `counts`."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    width = max(1, -(-(high - low) // BINS))
    edges = list(range(low, high + width, width))
    counts, _ = np.histogram(lengths, bins=edges)
    return edges, counts.tolist()


def _numbers(*headings: str) -> list[Column]:
    return [Column(heading, "number") for heading in headings]


def _splits(rows: Rows, examples: Examples) -> Table:
    cells = []
    for split, count in examples.counts.items():
        tokens, learned = examples.tokens[split], examples.supervised[split]
        share = f"{learned / tokens:.1%}" if tokens else "-"
        numbers = [f"{number:,}" for number in (rows.counts[split], count, tokens, learned)]
        cells.append([split, *numbers, share, f"{examples.longest[split]:,}"])
    return Table(["split", *_numbers("rows", "examples", "tokens", "learned", "share", "longest")], cells, "data")


def _dropped(rows_in: int, dropped: dict[str, int]) -> Table | Note:
    if not any(dropped.values()):
        return Note(f"{rows_in:,} rows read, none left out.")
    most_first = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    cells = [[f"{count:,}", reason] for reason, count in most_first]
    return Table([*_numbers("rows"), "reason"], cells, f"{rows_in:,} rows read; left out:")


def _bars(edges: list[int], counts: list[int]) -> Table:
    cells = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        width = -(-count * BAR_CELLS // max(counts))  # a bin that is not empty stays visible
        cells.append([f"{low:,} - {high - 1:,}", "█" * width, f"{count:,}"])
    return Table([*_numbers("tokens"), "", *_numbers("examples")], cells, "length of training examples")


def _classes(classes: dict[str, dict[str, int]]) -> Table:
    """Show the distribution of classes, the most frequent first."""
    splits = list(next(iter(classes.values())))
    total = sum(counts["train"] for counts in classes.values()) or 1
    cells = []
    for name, counts in sorted(classes.items(), key=lambda item: -item[1]["train"]):
        share = f"{counts['train'] / total:.1%}" if counts["train"] else "none"
        cells.append([name, *(f"{counts[split]:,}" for split in splits), share])
    return Table(["class", *_numbers(*splits, "share of train")], cells, "classes")


def find_vanishing(texts: Iterable[str], processor: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the characters that make no token, each with the number of rows (given as JSON) that contain it.

    Tokenizers without `<unk>` drop unknown text, and some drop control characters in any case. Combining marks do not
    count if the tokenizer strips all accents on purpose.
    """
    vanishes: dict[str, bool] = {}
    counts: Counter[str] = Counter()
    accented, plain = processor(["\xe9", "e"], add_special_tokens=False)["input_ids"]
    strips_accents = list(accented) == list(plain)
    for text in texts:
        spelled = "".join(iterate_strings(json.loads(text))) if "\\" in text else text
        letters = {*spelled} - PRINTABLE
        for letter in letters - vanishes.keys():
            ids = processor([f"a{letter}b", "ab"], add_special_tokens=False)["input_ids"]
            with_it, without = (decode(processor, one) for one in ids)  # "ab" may be one token, and "a", "b" two
            stripped = strips_accents and unicodedata.category(letter) == "Mn"
            vanishes[letter] = with_it == without and not stripped
        counts.update(letter for letter in letters if vanishes[letter])
    return dict(sorted(counts.items()))
