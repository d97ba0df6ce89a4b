"""The recipe that `llmtune init` proposes: its sources, columns and corpus, each with the reason for it."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.cli.proposed_model import look_up_config, propose_model
from llmtune.data.class_spelling import NAMED, propose_renames, write_renames
from llmtune.data.column_mapping import FIELD, HEADINGS, JOINT, find, name_words, with_aliases
from llmtune.data.file_survey import Reading, Survey
from llmtune.data.language_guess import guess_language
from llmtune.data.pictures import row_pictures, without_pictures
from llmtune.data.retrieval_layout import RetrievalSet, find_corpus, join_rows
from llmtune.data.row_kind import compared_text, kind_of_row, kind_of_task, names_in, write_prompt
from llmtune.errors import RecipeError
from llmtune.recipe.class_names import tidy_name
from llmtune.recipe.first_settings import FIRST_SETTINGS, FirstSettings
from llmtune.recipe.model_kind import PROPOSED_MODELS
from llmtune.recipe.task_facts import TASK_FACTS, TaskFacts
from llmtune.recipe.undecided import UNDECIDED
from llmtune.recipe.yaml_writer import flow, scalar
from llmtune.records import Row
from llmtune.store.atomic_files import atomic_file, explained
from llmtune.store.machine import likely_device, list_cards, process_memory_limit
from llmtune.tasks.label_rules import LABEL_METRICS

SHOWN_CANDIDATES = 8
CHARACTERS_A_TOKEN = 3
"""Low, to leave room for the longest row; English has about four."""
TEMPLATE_TOKENS = 48
"""Upper estimate of the tokens that a chat template adds to a row."""
PICTURE_TOKENS = 1280
"""Tokens of any picture in SmolVLM: 17 tiles of 64 tokens, and their marks."""
PATCH_PIXELS = 28 * 28
"""Pixels for each token in Qwen2.5-VL."""
LENGTHS = (64, 8192)
ANSWER_LENGTHS = (16, 1024)
PACKAGED_LENGTH = 512
"""Most tokens that the packaged encoder reads."""
MINED, FEWEST_MINED = 4, 50
"""Mined negatives per query, and the fewest passages to mine them among."""
BATCH_SIZES = ((1000, 64), (300, 32), (0, 16))
"""(Fewest rows, rows per step) of a task with in-batch negatives."""
TEXT_LENGTH = 1024
"""Tokens per row when plain text is split."""
ERRORS = ("bits_per_byte", "wer", "mse")
"""Lower-is-better metrics that the example gate may use."""
DEFAULT_DROPPED, MOST_DROPPED = 0.05, 0.3
"""Shares of unreadable rows: the default limit of a recipe, and the share at which `init` no longer raises it."""
TEST_ROWS = 20
"""Minimum test rows for a useful interval; with fewer than ten the verdict is inconclusive."""
LEAST_TEST, MOST_TEST = 0.1, 0.5
FEW_ANSWERS = 20
"""Maximum different answers to treat as choices, whose likelihoods are compared too."""


def write_joined_rows(files: RetrievalSet, target: Path) -> dict[str, Path]:
    """Write the joined rows of each split of a retrieval set next to the recipe; return their files.

    Raises RecipeError if a file exists, DataError for files that cannot be joined.
    """
    written = {split: target.with_name(f"{target.stem}-{split}.jsonl") for split in files.judgements}
    for file in written.values():
        if file.exists():
            raise RecipeError.of("the file exists", str(file), "Choose another name with --out.")
    for split, file in written.items():
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in join_rows(files, split)]
        with explained(file), atomic_file(file) as partial:
            partial.write_text("".join(rows), encoding="utf-8")
    return written


def propose_recipe(
    survey: Survey,
    reading: Reading,
    target: Path,
    model: str | None,
    splits: Mapping[str, Path],
    corpus: Path | None,
) -> tuple[str, str, str]:
    """Return the recipe's text, its model, and why; `splits` and `corpus` are files of a retrieval set."""
    cuda = likely_device() == "cuda"
    memory = max(card.memory_bytes for card in list_cards()) if cuda else process_memory_limit() / 2
    shows = any(map(row_pictures, reading.rows))
    note = ""
    if model is None:
        language = guess_language(compared_text(row) for row in reading.rows)
        model, note = propose_model(reading.task, memory, on_gpu=cuda, pictures=shows, language=language)
    sources = _write_sources(survey, target)
    each = "the encodings differ, so each file is a source; add a line for a new file" if len(sources) > 1 else ""
    data = _list_source_lines("train", sources, each)
    data += [f"{split}: {flow(_relative(file, target))}" for split, file in splits.items() if split != "train"]
    data += [*_name_columns(survey, reading), *_name_corpus(survey, reading, sources, target, corpus)]
    if reading.roles:
        names = {role: names[0] if len(names) == 1 else list(names) for role, names in reading.roles.items()}
        data.append(f"roles: {flow(names)}  # DECIDE: who is who; the model learns what the assistant says")
    config = look_up_config(model)
    if TASK_FACTS[reading.task].packs and _has_linear_attention(config):
        data.append("packing: false  # the model's linear attention carries one packed row into the next")
    choose_metrics, choose_settings = LABEL_METRICS.get(reading.task), FIRST_SETTINGS.get(reading.task)
    text = write_first_recipe(
        target.stem,
        reading.task,
        data,
        reading.rows,
        model=model,
        model_note=note or "a folder, owner/model on the hub, or builtin:NAME",
        renames=list_renames(reading),
        metrics=choose_metrics([*map(kind_of_task(reading.task).label, reading.rows)]) if choose_metrics else None,
        settings=choose_settings(reading.rows, _name_class(config)) if choose_settings else FirstSettings(),
        unread=sum(reading.bad.values()),
        copies=reading.copies,
        has_test="test" in splits,
    )
    return text, model, note


def _name_class(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else ""


def _has_linear_attention(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    sizes = text if isinstance(text, dict) else config
    return "linear_num_value_heads" in sizes or "linear_attention" in (sizes.get("layer_types") or ())


def _relative(path: Path | str, target: Path) -> str:
    return os.path.relpath(path, target.parent)


def _write_sources(survey: Survey, target: Path) -> list[str]:
    """Write each source as it is in the recipe."""
    written = [(_relative(one.path, target), one.encoding) for one in survey.sources]
    each = len(written) > 1
    return [
        flow({"path": path, "encoding": encoding} if encoding else {"path": path} if each else path)
        for path, encoding in written
    ]


def _list_source_lines(key: str, sources: Sequence[str], note: str) -> list[str]:
    comment = f"  # {note}" if note else ""
    if len(sources) == 1:
        return [f"{key}: {sources[0]}{comment}"]
    return [f"{key}:{comment}", *(f"  - {one}" for one in sources)]


def _name_columns(survey: Survey, reading: Reading) -> list[str]:
    """Return the lines of `data.columns`, with a reason for each column that is no single, named one."""
    columns = reading.columns
    notes = dict[str, str]()
    for ours, theirs in columns.items():
        if JOINT in theirs:
            each = "both" if len(FIELD.findall(theirs)) == 2 else "all"
            why = f"joined in this order: {each} differ from row to row; an empty one is left out"
            notes[ours] = f"{why}. Join new texts for the model in the same way"
    if len(reading.candidates) > 1:
        shown = [str(one) for one in reading.candidates[:SHOWN_CANDIDATES]]
        more = len(reading.candidates) - len(shown)
        notes["label"] = f"one of {', '.join(shown)}{f' and {more} more' if more else ''}"
        columns = {**columns, "label": UNDECIDED}
    if TASK_FACTS[reading.task].searches and all(map(kind_of_task(reading.task).passages, reading.rows)):
        columns = _usual_columns(survey, reading)
        if name_words(columns.get("query", "")) & HEADINGS:
            notes["query"] = "titles stand in for queries; queries that users typed teach more"
    if not notes:
        return [f"columns: {flow(columns)}"] if columns else []
    lines = [
        f"{ours}: {flow(theirs)}" + (f"  # {notes[ours]}" if ours in notes else "") for ours, theirs in columns.items()
    ]
    return ["columns:", *(f"  {line}" for line in lines)]


def _usual_columns(survey: Survey, reading: Reading) -> dict[str, str]:
    """Return the columns of query and passage, including those that are read by their usual names."""
    usual = with_aliases(reading.columns, ("query", "passage"), survey.columns, kind_of_task(reading.task).aliases)
    return {ours: theirs for ours, theirs in usual.items() if ours != theirs}


def _name_corpus(
    survey: Survey, reading: Reading, sources: Sequence[str], target: Path, corpus: Path | None
) -> list[str]:
    """Return the lines of `data.corpus`: a file with all passages, or the rows themselves."""
    facts = TASK_FACTS[reading.task]
    kind = kind_of_task(reading.task)
    searches = facts.searches and all(kind.passages(row) and kind.label(row) is None for row in reading.rows)
    if not searches and not mines_negatives(facts, reading.rows):
        return []
    if corpus := corpus or find_corpus(next(iter(survey.files)).parent, besides=survey.files):
        return _list_source_lines(
            "corpus", [flow(_relative(corpus, target))], "all passages, as users will search them"
        )
    column = _usual_columns(survey, reading).get("passage", "passage")
    if not searches or any(isinstance(find(row, column), list | dict) for row in survey.rows):
        return []
    note = "test queries search the passages of all rows, not only of the test rows; a file with more is harder"
    return _list_source_lines("corpus", sources, note)


# The recipe: known values filled in, comments for the user's decisions


def write_first_recipe(
    name: str,
    task: str,
    data: Sequence[str],
    rows: Sequence[Row],
    *,
    model: str,
    model_note: str,
    renames: Mapping[str, str],
    metrics: Sequence[str] | None = None,
    settings: FirstSettings | None = None,
    unread: int = 0,
    copies: int = 0,
    has_test: bool = False,
) -> str:
    """Return the first recipe for canonical rows, with comments.

    `data` has the lines of the section `data` that name and map the rows. `renames` join classes. `metrics` override
    the task's metrics if they depend on the labels, `settings` what depends on rows or model. `unread` counts
    unreadable rows, `copies` duplicates that will be dropped. `has_test` says that `data` names the test rows too.
    """
    facts, settings = TASK_FACTS[task], settings or FirstSettings()
    longest = max(_count_row(row, apart=facts.searches) for row in rows)
    is_text = facts.splits_text and not any(map(write_prompt, rows))
    most = TEXT_LENGTH if is_text else PACKAGED_LENGTH if model == PROPOSED_MODELS["encoder"].packaged else LENGTHS[1]
    lengths = (LENGTHS[0], most)
    answers = (
        []
        if is_text or not facts.ranks or not settings.generates
        else [str(kind_of_row(row).answer(row)) for row in rows]
    )
    metrics = metrics or settings.metrics or facts.first_metrics or facts.default_metrics
    measures = _name_measures(name, facts, metrics, answers, shows=any(map(row_pictures, rows)))
    test = [] if has_test else _name_test(name, len(rows) - copies)
    mined = f"negatives: {{mine: {MINED}}}  # for each query, the {MINED} nearest wrong passages: they teach the most"
    negatives = [mined] if mines_negatives(facts, rows) else []
    lines = [
        "# yaml-language-server: $schema=recipe.schema.json",
        f"# Made by `llmtune init`. Next: llmtune run {name}.yaml",
        "recipe_version: 1",
        f"name: {scalar(name)}",
        f"task: {task}",
        "data:",
        *(f"  {line}" for line in (*data, *negatives, *_max_dropped(unread, len(rows) + unread), *test)),
        *(f"  {line}" for line in _name_length(facts, longest, lengths, is_text)),
    ]
    lines += ["model:", f"  name: {model}  # {model_note}"]
    section = facts.first_lines if settings.lines is None else settings.lines
    if renames:
        section = (*section, f"rename: {write_renames(renames)}  # spellings of one class, the most frequent wins")
    if section:
        lines += [f"{facts.section}:", *(f"  {line}" for line in section)]
    usual = "# train: epochs, learning rate and batch size depend on rows and model; set them to override"
    lines += _name_batch_size(rows) if facts.searches else [usual]
    if answers:
        tokens = _round_up_tokens(max(map(len, answers)), ANSWER_LENGTHS)
        lines += ["generation:", f"  max_new_tokens: {tokens}  # estimate of the longest answer"]
    return "\n".join([*lines, "evaluate:", *(f"  {line}" for line in measures)]) + "\n"


def _name_measures(
    name: str, facts: TaskFacts, metrics: Sequence[str], answers: Sequence[str], *, shows: bool
) -> list[str]:
    """Return the lines of `evaluate`; with gates where answers are one word, or should depend on pictures (`shows`)."""
    is_choice = len(set(answers)) <= min(FEW_ANSWERS, len(answers) // 4)
    is_word = facts.has_turns and bool(answers) and not any(len(answer.split()) > 1 for answer in answers)
    if facts.has_turns and (is_word or is_choice):
        metrics = ("loss", "exact_match", *(("choice_accuracy",) if is_choice else ()))
    judged = "exact_match" if is_word else metrics[-1 if facts.has_turns else 0 if facts.searches else 1]
    end, margin = (".high <", "* 1.05") if judged in ERRORS else (".low >", "* 0.95")
    gate = f"{judged}{end} base"
    gates = [gate, f"{judged}.low > blind"] if shows else [gate] if is_word else []
    example = "" if gates else f" e.g. [{gate}]"
    weekly = f"['{judged}{end} champion {margin}', '{judged}[new]{end} base']"
    return [
        f"metrics: [{', '.join(metrics)}]",
        f"gates: [{', '.join(gates)}]  # DECIDE: when is the model good enough?{example}",
        f"# each week: champion: release:{name}, gates: {weekly}, and deploy: [release]",
    ]


def mines_negatives(facts: TaskFacts, rows: Sequence[Row]) -> bool:
    """Whether a recipe for these rows mines negatives: they have none, and enough passages to mine among."""
    if not facts.mines:
        return False
    kind = kind_of_row(rows[0])
    passages = {passage for row in rows for passage in kind.passages(row)}
    given = any(0 in kind.relevances(row) or kind.label(row) is not None for row in rows)
    return len(passages) >= FEWEST_MINED and not given


def _name_batch_size(rows: Sequence[Row]) -> list[str]:
    """Return the lines of `train` for a task that learns from the other rows of a step."""
    size = next(size for least, size in BATCH_SIZES if len(rows) >= least)
    why = "the passages of the other rows are negatives too, so a larger batch is a harder and better task"
    labels = map(kind_of_row(rows[0]).label, rows)
    if classes := {label for label in labels if isinstance(label, str)}:
        size, why = max(size, 2 * len(classes)), "a step learns from classes with several rows"
    return ["train:", f"  batch_size: {size}  # {why}"]


def _name_test(name: str, count: int) -> list[str]:
    """Return the lines that put a share of `count` rows aside for the test."""
    share = min(MOST_TEST, max(LEAST_TEST, math.ceil(20 * TEST_ROWS / count) / 20))
    return [
        f"test: {share}  # share of rows used only for evaluation; if your data grows, keep these",
        f"#           rows in a file: llmtune prepare {name}.yaml --write-test FILE, then test: FILE",
    ]


def _name_length(facts: TaskFacts, longest: int, bounds: tuple[int, int], is_text: bool) -> list[str]:
    """Return the lines for the length of rows, the `longest` in characters."""
    tokens = _round_up_tokens(longest, bounds, TEMPLATE_TOKENS)
    if longest / CHARACTERS_A_TOKEN <= bounds[1]:
        return [f"max_length: {tokens}  # tokens: estimate of the longest row; longer rows are errors"]
    long_way = "split" if is_text else "truncate" if "truncate" in facts.overlong else "drop"
    return [f"max_length: {tokens}  # tokens: the most that a row has", f"on_overlong: {long_way}  # longer rows"]


def _max_dropped(unread: int, looked_at: int) -> list[str]:
    """Raise the limit of bad rows if more rows are bad than the default allows but most are good."""
    share = unread / looked_at
    if not DEFAULT_DROPPED < share < MOST_DROPPED:
        return []
    why = f"DECIDE: {unread:,} of {looked_at:,} rows cannot be read; fix them, or train without them"
    return [f"max_dropped: {math.ceil(100 * share + 1) / 100}  # {why}"]


def list_renames(reading: Reading) -> dict[str, str]:
    """Return renames to one spelling of each class, in all columns that may be the label."""
    if TASK_FACTS[reading.task].answer_kind not in NAMED:
        return {}
    columns = [one.counts for one in reading.candidates]
    columns = columns or [Counter(name for row in reading.rows for name in names_in(row))]
    renames = dict[str, str]()
    for counts in columns:
        tidy = Counter[str]()
        for name, number in counts.items():
            tidy[tidy_name(name)] += number
        found = propose_renames(tidy)
        renames |= {old: new for old, new in found.items() if new not in renames and old not in renames.values()}
    return renames


def _round_up_tokens(characters: int, bounds: tuple[int, int], more: int = 0) -> int:
    """Return enough tokens for a text: the next power of two, within bounds."""
    least, most = bounds
    return min(most, max(least, 1 << math.ceil(math.log2(characters / CHARACTERS_A_TOKEN + more + 1))))


def _count_row(row: Row, apart: bool) -> int:
    """Return the characters of a row, with those of an upper estimate of the tokens of its pictures."""
    pictures = row_pictures(row)
    tokens = sum(max(PICTURE_TOKENS, math.prod(one["size"]) // PATCH_PIXELS) for one in pictures)
    return _count_characters(without_pictures(row) if pictures else row, apart) + CHARACTERS_A_TOKEN * tokens


def _count_characters(value: object, apart: bool) -> int:
    """Return the characters of all texts of a row with spaces between them; `apart`, those of its longest text."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    counts = [_count_characters(item, apart) for item in inner]
    return max(counts, default=0) if apart else sum(counts) + max(len(counts) - 1, 0)
