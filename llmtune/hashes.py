"""What each step depends on, as a hash: a step whose hash is the one it was done with is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune import __version__
from llmtune.adapter import find_adapter
from llmtune.data import hash_sources
from llmtune.data.hub_datasets import HUB, resolve_commit
from llmtune.evaluate.paired_sentences import hub_source
from llmtune.recipe import TASK_FACTS, Recipe
from llmtune.records import Examples, ModelRef, Rows
from llmtune.session import RunContext, trained_name
from llmtune.store.atomic_files import hash_file, hash_folder, hash_value
from llmtune.store.lm_eval_tasks import list_task_files
from llmtune.store.run_lock import check_pin, package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare(context: RunContext) -> str:
    """Rows depend on the data section, the files behind it, and the task.

    Raises EnvironmentProblem where a lock that was named with --lock holds other data.
    """
    data = context.recipe.data
    if context.held and context.pins is not None:
        check_pin("the data's content", context.pins.data_hash, hash_sources(data, context.recipe.task))
    about_examples = {"max_length", "on_overlong", "packing", "train_on"}
    settings = data.model_dump(mode="json", exclude=about_examples)
    if context.recipe.evaluate.columns:  # kept beside the rows
        settings["slices"] = tuple(context.recipe.evaluate.columns)
    return hash_value([__version__, context.recipe.task, settings, hash_sources(data, context.recipe.task)])


def encode(context: RunContext, rows: Rows, place: ModelRef, processor: PreTrainedTokenizerBase) -> str:
    """Examples depend on the rows, the tokenizer, the template and the task's own section."""
    recipe = context.recipe
    about = recipe.model.model_dump(mode="json", include={"chat_template_kwargs", "add_tokens"})
    settings = recipe.data.model_dump(mode="json", include={"max_length", "on_overlong", "train_on", "max_dropped"})
    settings |= {"section": own_section(recipe)}
    versions = package_versions(("transformers", "tokenizers"))
    contents = [rows.content_hash, place.content_hash, hash_value(processor.chat_template)]
    return hash_value([__version__, versions, contents, about, settings, recipe.task])


def adapt(context: RunContext, place: ModelRef, examples: Examples) -> str:
    """The adapted model depends on the model, the examples (their labels), the seed and the adapter section."""
    contents = [place.content_hash, examples.content_hash, own_section(context.recipe)]
    return hash_value([*contents, context.recipe.seed, adapter_settings(context.recipe)])


def own_section(recipe: Recipe) -> dict[str, Any] | None:
    """The section that only this task has, as the rows have settled it: names of classes do not stand in token ids."""
    name = TASK_FACTS[recipe.task].section
    section = getattr(recipe, name) if name else None
    return section.model_dump(mode="json") if section else None


def adapter_settings(recipe: Recipe) -> list[Any]:
    """The adapter section, with the content of an adapter that is gone on from."""
    start = recipe.adapter.start_from
    content = hash_folder(find_adapter(Path(start))) if start else None
    return [recipe.adapter.model_dump(mode="json"), recipe.model.dtype, content]


def train(context: RunContext, adapted: str) -> str:
    """Training depends on the adapted model and the train section."""
    settings = [{**context.recipe.train.model_dump(mode="json"), "seeds": []}, context.recipe.data.packing]
    return hash_value([__version__, adapted, settings])


def evaluate(context: RunContext, place: ModelRef, rows: Rows, examples: Examples) -> str:
    """Scores depend on what was trained, the rows, and how answers are generated and measured."""
    recipe = context.recipe
    trained = hash_folder(context.folder.path / trained_name(recipe))
    settings: list[Any] = [
        recipe.evaluate.model_dump(mode="json", exclude={"gates"}),
        recipe.generation.model_dump(mode="json"),
    ]
    settings.append(own_section(recipe) or {})
    settings.append([hash_file(path) for path in study_files(recipe)])
    settings.append(study_commits(recipe))
    contents = [trained, place.content_hash, rows.content_hash, examples.content_hash, rows.columns_hash]
    versions = package_versions(("torch", "transformers", "peft", *(["lm-eval"] if recipe.evaluate.benchmarks else [])))
    return hash_value([__version__, versions, contents, settings, recipe.seed])


def base(context: RunContext, place: ModelRef, rows: Rows, examples: Examples) -> str:
    """What the base model says depends on all that scores depend on but what was trained, and on how it is loaded."""
    recipe = context.recipe
    sections = (recipe.generation, recipe.model)
    settings: list[Any] = [recipe.evaluate.model_dump(mode="json", exclude={"gates"}), context.device]
    settings += [own_section(recipe), adapter_settings(recipe), *(one.model_dump(mode="json") for one in sections)]
    contents = [place.content_hash, rows.content_hash, examples.content_hash]
    drawn = recipe.seed if recipe.generation.do_sample else None
    return hash_value([__version__, package_versions(("torch", "transformers")), contents, settings, drawn])


def study_commits(recipe: Recipe) -> list[str]:
    """The commits of the hub's data sets that studies of the evaluation read."""
    fairness = recipe.evaluate.fairness
    named = [place for place in (fairness.pairs if fairness else ()) if place.startswith(HUB)]
    return [resolve_commit(hub_source(place).path.removeprefix(HUB), None) for place in named]


def study_files(recipe: Recipe) -> list[Path]:
    """The files that studies of the evaluation read; one that is not there is left for the study to speak of."""
    forgetting, fairness = recipe.evaluate.forgetting, recipe.evaluate.fairness
    named = [*(forgetting.texts + forgetting.questions if forgetting else ())]
    named += [*(fairness.pairs + fairness.swaps if fairness else ())]
    read = [file for benchmark in recipe.evaluate.benchmarks for file in list_task_files(benchmark.task)]
    return [path for path in (*map(Path, named), *read) if path.is_absolute() and path.is_file()]
