"""A teacher's predictions for each learned token, recorded once before training.

They are in files of `BLOCK` examples each, written atomically, each with its hash at its end. A killed recording
continues after the last intact file, and the files do not depend on the number of processes.
"""

from __future__ import annotations

import json
import operator
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from sys import maxsize
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from rich.console import Console
from rich.progress import MofNCompleteColumn
from transformers import PreTrainedTokenizerBase

from llmtune.data.answer_parser import ParsedAnswer
from llmtune.data.examples import ExampleReader
from llmtune.data.preparation import write_changed
from llmtune.data.row_kind import write_prompt
from llmtune.data.row_store import iterate_rows, read_rows
from llmtune.display.console import progress_bars
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.evaluate.evaluated_task import EvaluatedTask, LoadedModel
from llmtune.evaluate.generation import answer_ends, answer_reader
from llmtune.evaluate.sampled_decoding import sample_answers
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, run_in_batches
from llmtune.model.causal_lm_loss import move_to
from llmtune.model.config import read_model_config, why_headless
from llmtune.model.device import compute_context, resolve_dtype
from llmtune.model.layer_requests import own_passes
from llmtune.model.memory_plan import check_context
from llmtune.model.teacher_files import KEY, check_tokenizers, other_classes, teacher_run
from llmtune.model.teacher_loss import BinRecorder
from llmtune.model.tensor_parallel import is_split
from llmtune.recipe.reinforce_section import ReinforceSection
from llmtune.recipe.schema import Recipe
from llmtune.records import Examples, Json, ModelRef, Row, Rows
from llmtune.store.atomic_files import atomic_file, hash_recording, hash_value, read_json, remove_unfinished, write_json
from llmtune.store.processes import rank, world_size

FOLDER, ANSWERS = "teacher", "answers"
"""Predictions, and answers until all are there; in the folder `data` of the run."""
RECORD = "teacher.json"
BLOCK = 256
"""Examples in a file: a killed recording loses at most the work on one."""
HASH_BYTES = 32
LEARNED = ("train", "validation")
"""Splits whose predictions are recorded."""
Records = npt.NDArray[np.void]
"""One record of `record_format` for each prediction."""


class PlannedModel(Protocol):
    """What a plan says of its model."""

    @property
    def recipe(self) -> Recipe:
        """With the names of classes."""

    @property
    def task(self) -> EvaluatedTask:
        """The task's variant."""

    @property
    def model_ref(self) -> ModelRef:
        """The base model."""

    @property
    def device(self) -> str:
        """Where it computes."""

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""


def record_format(top_k: int) -> np.dtype[Any]:
    """Return the format of a prediction: the likeliest tokens, and log-probabilities of them and of the rest."""
    return np.dtype([("ids", "<i4", (top_k,)), ("logs", "<f2", (top_k + 1,))])


def plan_bytes(task: EvaluatedTask, recipe: Recipe, examples: Examples) -> int:
    """Return the bytes that the predictions of the recipe's teacher will take."""
    count, labels = count_predictions(examples), len(task.output_labels(recipe))
    if task.predicts_tokens:
        return count * record_format(recipe.distil.top_k if recipe.distil else 0).itemsize
    each = (
        labels * record_format(2).itemsize if task.output_kind(recipe) == "yes-no" else record_format(labels).itemsize
    )
    return count * each


def count_predictions(examples: Examples) -> int:
    """Return the number of learned tokens, or texts with classes, whose predictions are recorded."""
    return sum(examples.supervised.get(split, 0) for split in LEARNED)


def check_teacher(teacher: PlannedModel, student: PlannedModel, rows: Rows, longest: int) -> None:
    """Raise RecipeError if a teacher cannot predict for a student, DataError if a row is longer than its context."""
    task, (there, here) = student.task, (teacher.recipe, student.recipe)
    name = here.distil.teacher if here.distil else ""
    if type(teacher.task) is not type(task):
        what = f"{name} is a model for task {there.task} ({teacher.task.model_kind.auto_class})"
        fix = f"Name a {task.model_kind.auto_class} for task {here.task}."
        raise RecipeError.of(f"{what}, but the student is for {here.task} ({task.model_kind.auto_class})", KEY, fix)
    kinds = [task.output_kind(recipe) for recipe in (there, here)]
    if kinds[0] != kinds[1] or "number" in kinds:
        what = f"{name} predicts another kind of label" if kinds[0] != kinds[1] else "numbers have no distribution"
        raise RecipeError.of(f"{what}, so the student cannot learn it", KEY, "Remove distil, or name another teacher.")
    labels = [task.output_labels(recipe) for recipe in (there, here)]
    if labels[0] != labels[1]:
        raise other_classes(name, *labels)
    if teacher_run(here) is None and (headless := why_headless(teacher.model_ref, there, task)):
        raise RecipeError.of(f"{name} cannot teach: {headless}", KEY, "Name a trained run.")
    check_tokenizers(student.processor, teacher.processor, rows, name)
    check_context(teacher.model_ref, there, task, longest)


# Recording


def record_predictions(
    student: PlannedModel,
    teacher: torch.nn.Module,
    packs: bool,
    examples: Examples,
    folder: Path,
    console: Console,
) -> None:
    """Write the teacher's predictions for a student's examples to `folder`, in all processes.

    `packs` says whether the teacher reads packed rows. Processes divide the blocks, unless the teacher is split.

    Raises EnvironmentProblem if an example does not fit into memory, an OSError if the disk is full.
    """
    task, recipe, section = student.task, student.recipe, student.recipe.distil
    assert section is not None, "the recipe has a teacher"
    config = read_model_config(student.model_ref, recipe.model).get_text_config()
    vocabulary = max(config.vocab_size, len(student.processor)) if task.predicts_tokens else maxsize
    top_k = section.top_k if task.predicts_tokens else maxsize  # all classes
    collate, dtype = task.collator(student.processor, recipe, packs), resolve_dtype(recipe.model.dtype, student.device)

    def record(reader: ExampleReader, rows: Sequence[int]) -> Records:
        recorder = BinRecorder(top_k, section.temperature, vocabulary)
        batch = move_to(student.device, collate([reader[row] for row in rows], 0))
        with torch.no_grad(), compute_context(dtype, student.device):
            task.loss(teacher, {**batch, "teacher": recorder})
        return to_records(torch.cat(recorder.ids), torch.cat(recorder.logs))

    splits = [split for split in LEARNED if examples.counts.get(split)]
    readers = {split: ExampleReader(examples, split, task.example_type) for split in splits}
    all_blocks = is_split(teacher)
    with own_passes(teacher), progress_bars(console, MofNCompleteColumn()) as progress:
        bar = progress.add_task("teach", total=sum(map(len, readers.values())))
        for split, reader in readers.items():
            for number, rows in enumerate(cut_blocks(len(reader))):
                path = block_file(folder, split, number)
                if not is_intact(path) and (all_blocks or number % world_size() == rank()):
                    records = _record_block(reader, rows, record, student.device, packs)
                    if not (all_blocks and rank()):
                        _write_block(records, path)
                progress.advance(bar, len(rows))


def _write_block(records: Records, path: Path) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, records)
        file.flush()
        file.write(hash_recording(temporary).encode())
        file.flush()
        os.fsync(file.fileno())


def is_intact(path: Path) -> bool:
    """Return whether a block ends in the hash of its predictions."""
    data = path.read_bytes() if path.is_file() else b""
    return xxhash.xxh3_128_hexdigest(memoryview(data)[:-HASH_BYTES]).encode() == data[-HASH_BYTES:]


def begin_recording(folder: Path, inputs: str, student: PlannedModel, examples: Examples, *, restart: bool) -> None:
    """Prepare a folder for predictions with these inputs, without those of others; with `restart`, without any.

    Raises EnvironmentProblem if the disk has less space than they need.
    """
    begin_blocks(folder, inputs, restart=restart)
    needed = plan_bytes(student.task, student.recipe, examples)
    left = needed - sum(path.stat().st_size for path in folder.iterdir())
    if left > (free := shutil.disk_usage(folder).free):
        what = f"the teacher's predictions need {left / 1e6:,.0f} MB more, but the disk has {free / 1e6:,.0f} MB free"
        raise EnvironmentProblem.of(what, str(folder), "Free space, or lower distil.top_k.")


def begin_blocks(folder: Path, inputs: str, *, restart: bool) -> None:
    """Prepare a folder for blocks made of these inputs, without those of others."""
    if restart or read_json(folder / RECORD) != {"inputs": inputs}:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    write_json(folder / RECORD, {"inputs": inputs})


def _record_block(
    reader: ExampleReader,
    rows: range,
    record: Callable[[ExampleReader, Sequence[int]], Records],
    device: str,
    packed: bool,
) -> Records:
    def work(batch: list[int]) -> list[Records]:
        chosen = [rows[i] for i in batch]
        records, counts = record(reader, chosen), reader.supervised[chosen].astype(np.int64)
        return np.split(records, np.cumsum(counts)[:-1] * count_outputs(records, counts))

    lengths = reader.lengths[rows.start : rows.stop].tolist()
    return np.concatenate(run_in_batches(lengths, budget_for(device, TOKEN_BUDGET), work, packed=packed))


def count_outputs(records: Records, counts: npt.NDArray[np.int64]) -> int:
    """Return the outputs of a prediction: several if a text may have several classes."""
    each, rest = divmod(len(records), max(1, int(counts.sum())))
    assert not rest, "each prediction has the same number of outputs"
    return each


def cut_blocks(count: int) -> Iterator[range]:
    """Return the examples of each file."""
    return (range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def block_file(folder: Path, split: str, number: int, suffix: str = "npy") -> Path:
    """Return the file of a block of predictions, or with the suffix `json` of answers."""
    return folder / f"{split}-{number:05}.{suffix}"


def to_records(ids_SK: torch.Tensor, logs_SL: torch.Tensor) -> Records:
    """Return predictions as they are stored."""
    records = np.empty(len(ids_SK), dtype=record_format(ids_SK.shape[1]))
    records["ids"], records["logs"] = ids_SK.cpu().numpy(), logs_SL.cpu().numpy()
    return records


# Answers


def longest_answered(student: PlannedModel, rows: Rows) -> int:
    """Return the tokens of the longest prompt with its answer; 0 for encoder-decoders, which cut their source.

    Raises DataError if a row has no prompt.
    """
    task, recipe, longest = student.task, student.recipe, 0
    for split in LEARNED:
        for origin, row in iterate_rows(rows, split):
            if not write_prompt(row).strip():
                fix = "Remove distil.answers, or give each row a prompt."
                raise DataError.of("the row has no prompt that the teacher could answer", origin, fix)
            if not task.predicts:
                longest = max(longest, len(task.prompt_ids(task.split_answer(row)[0], student.processor, recipe)))
    return longest and longest + recipe.generation.max_new_tokens


def answer_rows(student: PlannedModel, teacher: torch.nn.Module, rows: Rows, folder: Path, console: Console) -> None:
    """Write the rows of train and validation with the teacher's answers to `folder`, in files of `BLOCK` rows."""
    dtype = resolve_dtype(student.recipe.model.dtype, student.device)
    with progress_bars(console, MofNCompleteColumn()) as progress:
        bar = progress.add_task("answer", total=sum(rows.counts.get(split, 0) for split in LEARNED))
        for split in LEARNED:
            for number, block in enumerate(cut_blocks(rows.counts.get(split, 0))):
                path = block_file(folder, split, number, "json")
                if read_answers(path) is None:
                    with torch.no_grad(), compute_context(dtype, student.device):
                        answered = _answer_block(student, teacher, read_rows(rows, split, block))
                    write_json(path, {"hash": hash_value(answered), "rows": answered})
                progress.advance(bar, len(block))


def _answer_block(student: PlannedModel, teacher: torch.nn.Module, rows: Sequence[Row]) -> list[Json]:
    """Sample an answer to each row; its random numbers depend on the prompt, or on the block if `predict` samples."""
    task, recipe, processor, device = student.task, student.recipe, student.processor, student.device
    questions = [task.split_answer(row)[0] for row in rows]
    if task.predicts:
        truncated = [False] * len(rows)
        sampled = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        generation = recipe.generation.model_copy(update=sampled)
        recipe = recipe.model_copy(update={"generation": generation, "seed": _prompt_number(questions)})
        note_end = partial(operator.setitem, truncated)
        texts = task.predict(questions, LoadedModel(teacher, processor, recipe, device, note_end=note_end))
        answers = [*map(ParsedAnswer, texts)]
    else:
        prompts = [task.prompt_ids(question, processor, recipe) for question in questions]
        section = ReinforceSection(max_new_tokens=recipe.generation.max_new_tokens)
        stops = set(answer_ends(teacher, processor, recipe))
        made = sample_answers(teacher, prompts, [[_prompt_number(one)] for one in prompts], section, stops, device)
        truncated, read = [one.truncated for one in made], answer_reader(processor, recipe)
        triples = zip(rows, prompts, made, strict=True)
        answers = [read(one.ids, row.get("tools"), prompt) for row, prompt, one in triples]
    thinks = any(one.reasoning for one in answers) and recipe.data.reasoning != "drop"
    if thinks and not recipe.variant.facts.has_messages:
        what = f"the teacher writes thoughts before its answers, and task {task.name} cannot learn them"
        fix = "Set model.chat_template_kwargs so that it does not think, or data.reasoning: drop to learn the texts."
        raise RecipeError.of(what, "distil.answers", fix)
    # A call that cannot be parsed would be learned as text: its row is left empty, and encoding drops it.
    return [
        {
            "row": task.take_answer(row, ParsedAnswer("") if answer.error else answer),
            "truncated": is_cut,
            "unreadable_calls": answer.error is not None,
        }
        for row, answer, is_cut in zip(rows, answers, truncated, strict=True)
    ]


def _prompt_number(prompt: object) -> int:
    return int(hash_value(prompt)[:15], 16)


def read_answers(path: Path) -> list[Json] | None:
    """Return the answered rows of a block; None if it is missing or damaged."""
    saved = read_json(path)
    return saved["rows"] if isinstance(saved, dict) and saved.get("hash") == hash_value(saved.get("rows")) else None


def write_answered(rows: Rows, answers: Path, folder: Path) -> Json:
    """Write the answered rows, and those of test as they are, into `folder`; return facts for the manifest."""
    blocks = {
        split: [block_file(answers, split, number, "json") for number, _ in enumerate(cut_blocks(rows.counts[split]))]
        for split in LEARNED
        if rows.counts.get(split)
    }
    answered = [one for files in blocks.values() for file in files for one in read_answers(file) or ()]
    texts = (json.dumps(one["row"], ensure_ascii=False) for one in answered)
    write_changed(rows, dict.fromkeys(blocks, texts), folder)
    outcomes = {name: sum(one[name] for one in answered) for name in ("truncated", "unreadable_calls")}
    return {"answered": len(answered), **outcomes}
