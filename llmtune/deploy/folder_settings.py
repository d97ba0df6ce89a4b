"""The settings in the files of a product, compared with those of its run: they decide what its users get.

Weights and token ids can be right while a temperature, a pooling or a length in a file next to them is not.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.deploy.exported_model import ExportedModel
from llmtune.deploy.tuned_model import RULES, TunedModel
from llmtune.errors import EnvironmentProblem, RecipeError, first_line
from llmtune.evaluate.decoder_generation import decoder_settings
from llmtune.evaluate.generation import generation_settings
from llmtune.model.audio_models import feature_extractor
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.config import is_encoder
from llmtune.model.image_models import image_processor
from llmtune.model.processor import PREPROCESSOR, PROCESSOR_FILES
from llmtune.model.sentence_folder import LENGTH, MODULES, SIGMOID, SentenceSettings, read_settings
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.store.atomic_files import plain, read_json

PROCESSOR = PROCESSOR_FILES[0]
GENERATION, TOKENIZER, CONFIG = "generation_config.json", "tokenizer_config.json", "config.json"
Settings = dict[str, Mapping[str, object]]
"""Names and values of settings, by the file that states them."""
CHECKED_ELSEWHERE = {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "_from_model_config"}
SPEED_ONLY = {"use_cache", "cache_implementation", "cache_config", "disable_compile", "compile_config", "low_memory"}
"""Keys of generation settings that change no answer."""
IN_TRAINING = re.compile(
    r".*(?:drop(?:out)?|layerdrop|_drop_prob|initializer_\w+|loss\w*|label_smoothing)|mask_(?:time|feature)_\w+"
)
"""Keys of config.json that only training reads."""
BOOKKEEPING = re.compile(
    r"_.*|architectures|auto_map|transformers_version|dtype|torch_dtype|quantization_config|compression_config|use_cache"
    r"|(?:bos|eos|pad)_token_id|tie_word_embeddings|vocab_size|num_labels|id2label|label2id|problem_type|tokenizer_class"
    r"|sentence_transformers|sbert_\w+|llmtune_\w+|output_\w+|return_dict|use_return_dict|torchscript|gradient_checkpointing"
)
"""Keys of config.json that change no output, that weights decide, or that another comparison reads."""
PARTS_OF_PROCESSOR = re.compile(r"_.*|.*_processor(?:_type|_class)?|tokenizer|feature_extractor|chat_template")
"""Keys of a processor that are another part of it, or its name."""
LONGEST = ("max_length", "max_new_tokens")
QUERIES, PASSAGES = "the prompt of queries", "the prompt of passages"


def expected_settings(tuned: TunedModel) -> Settings:
    """Return the settings of the run; call it before the model is merged."""
    model, task = cast(PreTrainedModel, unwrap(tuned.model)), tuned.task
    settings: Settings = {TOKENIZER: _read_tokenizer(tuned.processor), **tuned.rules}
    if model.can_generate() and not task.model_kind.has_head:
        settings[GENERATION] = _read_generation(expected_generation(model, tuned))
    settings[CONFIG] = _read_network(model.config)
    if task.model_kind.has_head:
        settings[CONFIG] = {**settings[CONFIG], **_read_head(model.config.to_dict(), tuned, model)}
    if task.model_kind.takes_audio:
        settings[PREPROCESSOR] = _read_features(tuned.processor)
    if task.model_kind.takes_images:
        settings[_name_image_file(tuned.model_ref.path)] = _read_images(tuned.processor)
    if (vectors := task.sentence_settings(tuned.recipe)) is not None:
        settings[MODULES] = _name_settings(vectors)
        settings[LENGTH] = {"max_seq_length": tuned.recipe.data.max_length, "do_lower_case": False}
    return settings


def expected_generation(model: PreTrainedModel, tuned: TunedModel) -> GenerationConfig:
    """Return the recipe's generation settings, plus those that the model needs to generate.

    Whisper's class looks up languages and tasks in its own settings. They stay, with the recipe's language and task.
    """
    recipe, stated = tuned.recipe, copy.deepcopy(model.generation_config)
    if tuned.task.model_kind.takes_audio:
        tuned.task.set_generation(stated, recipe)
        return stated
    if model.config.is_encoder_decoder:
        settings = decoder_settings(stated, model, tuned.processor, recipe)
    else:
        settings = generation_settings(model, tuned.processor, recipe)
    settings.max_new_tokens = None  # servers treat it as a maximum for requests
    return settings


def find_changed_settings(expected: Settings, exported: ExportedModel, tuned: TunedModel) -> list[str]:
    """Describe the settings in a product's files that differ from the run's. Missing files are no difference.

    A folder without the files of sentence-transformers has the settings that sentence-transformers then chooses.
    """
    folder = exported.path if exported.path.is_dir() else exported.path.parent
    kind = tuned.task.model_kind
    readers: dict[str, Callable[[], Mapping[str, object]]] = {
        GENERATION: lambda: _read_generation(exported.model.generation_config),
        TOKENIZER: lambda: _read_tokenizer(exported.processor),
        CONFIG: lambda: _read_config(_read_object(folder / CONFIG), tuned, exported),
        PREPROCESSOR: lambda: (_read_features if kind.takes_audio else _read_images)(exported.processor),
        PROCESSOR: lambda: _read_images(exported.processor),
        MODULES: lambda: _read_vectors(folder),
        LENGTH: lambda: {**_default_length(exported), **_read_object(folder / LENGTH)},
    }
    breaches: list[str] = []
    for file, settings in expected.items():
        if file not in RULES and exported.format == "gguf":  # such a file has its own settings
            continue
        if not (folder / file).is_file() and not (exported.is_folder and file in (MODULES, LENGTH)):
            continue
        try:
            if file != MODULES:  # libraries pass over some damaged files
                _read_object(folder / file)
            stated = _flatten(readers[file]() if file in readers else _read_object(folder / file))
        except (RecipeError, EnvironmentProblem) as error:
            breaches.append(f"{file}: {error.problems[0].what}")
            continue
        run = _flatten(settings)
        names = [*run, *(name for name in stated if name not in run and name.partition(".")[0] in settings)]
        breaches += [
            f"{file}: {name} is {stated.get(name)!r}; the run has {run.get(name)!r}"
            for name in names
            if not _is_same(name, stated.get(name), run.get(name), tuned)
        ]
    strange = [name for name in RULES if name not in expected and (folder / name).is_file()]
    return [*breaches, *(f"{name}: the run's evaluation made no such rules" for name in strange)]


def _flatten(settings: Mapping[str, object]) -> dict[str, object]:
    """Name the values of nested objects by both keys, such as `threshold.value`."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _is_same(name: str, stated: object, value: object, tuned: TunedModel) -> bool:
    if name in LONGEST and value is None:  # a limit that no answer reaches changes nothing
        return not isinstance(stated, int) or stated >= tuned.recipe.generation.max_new_tokens
    return bool(plain(stated) == plain(value))


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file; an empty one if the file is missing."""
    content = read_json(file) if file.exists() else {}
    if not isinstance(content, dict):
        raise EnvironmentProblem.of("damaged: not a JSON object", str(file))
    return content


def _read_generation(settings: GenerationConfig | None) -> dict[str, object]:
    """Return the effective settings: those that a file leaves out have transformers' defaults."""
    stated = (settings or GenerationConfig()).to_dict()
    defaults = GenerationConfig._get_default_generation_params() | dict.fromkeys(LONGEST)
    names = [name for name in stated if name not in CHECKED_ELSEWHERE | SPEED_ONLY]
    return {name: stated[name] if stated[name] is not None else defaults.get(name) for name in names}


def _read_tokenizer(processor: PreTrainedTokenizerBase) -> dict[str, object]:
    return {"model_max_length": processor.model_max_length, "truncation_side": processor.truncation_side}


def _read_network(config: PretrainedConfig) -> dict[str, object]:
    """Return the settings of the network that weights leave open, such as its positions and windows.

    Of a model of several parts, only the part for text counts: exports of that part alone have the same settings.
    """
    settings = config.get_text_config().to_dict()
    return {
        name: value
        for name, value in settings.items()
        if not (IN_TRAINING.fullmatch(name) or BOOKKEEPING.fullmatch(name))
    }


def _read_config(stated: Mapping[str, Any], tuned: TunedModel, exported: ExportedModel) -> dict[str, object]:
    """Return the settings of a product's network and head. The network of an ONNX graph is that of the graph."""
    network = _read_network(exported.model.config)
    return {**network, **_read_head(stated, tuned, exported.model)} if tuned.task.model_kind.has_head else network


def _read_head(stated: Mapping[str, Any], tuned: TunedModel, model: PreTrainedModel) -> dict[str, object]:
    """Return what turns a head's outputs into scores, as transformers' pipelines and CrossEncoder read it."""
    settings: dict[str, object] = {}
    if TASK_FACTS[tuned.task.name].loader == "CrossEncoder":
        nested = stated.get("sentence_transformers")
        legacy = stated.get("sbert_ce_default_activation_function")
        settings["activation_fn"] = (nested.get("activation_fn") if isinstance(nested, dict) else legacy) or SIGMOID
    elif tuned.task.model_kind.reads_class_at_token:
        several = "single_label_classification" if model.config.num_labels > 1 else "multi_label_classification"
        settings["problem_type"] = stated.get("problem_type") or several
    if not is_encoder(model.config):  # the head reads the last token that is no padding
        settings["pad_token_id"] = stated.get("pad_token_id")
    return settings


def _read_features(processor: PreTrainedTokenizerBase) -> dict[str, object]:
    return cast(dict[str, object], cast(Any, feature_extractor(processor)).to_dict())


def _name_image_file(folder: Path) -> str:
    """Return the file of a base that states how pictures are scaled."""
    return PREPROCESSOR if (folder / PREPROCESSOR).is_file() else PROCESSOR


def _read_images(processor: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return how pictures are scaled and counted, whichever of the files states it."""
    stated = image_processor(processor).processor
    sizes = {**stated.to_dict(), **stated.image_processor.to_dict()}
    return {name: value for name, value in sizes.items() if not PARTS_OF_PROCESSOR.fullmatch(name)}


def _read_vectors(folder: Path) -> dict[str, object]:
    """Return how sentence-transformers makes vectors with a folder; without modules, it takes a mean."""
    try:
        stated = read_settings(folder)
        kinds = [str(one["type"]) for one in read_json(folder / MODULES) or ()]
        if foreign := [kind for kind in kinds if not kind.startswith("sentence_transformers.")]:
            raise ValueError(foreign[0])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        what = f"not as sentence-transformers writes it ({first_line(error)})"
        raise EnvironmentProblem.of(what, str(folder / MODULES)) from error
    return _name_settings(stated)


def _name_settings(settings: SentenceSettings) -> dict[str, object]:
    return {
        "pooling": settings.pooling or "mean",
        "normalize": bool(settings.normalize),
        QUERIES: settings.query_prompt or "",
        PASSAGES: settings.passage_prompt or "",
    }


def _default_length(exported: ExportedModel) -> dict[str, object]:
    positions = getattr(exported.model.config, "max_position_embeddings", None) or exported.processor.model_max_length
    return {"max_seq_length": min(positions, exported.processor.model_max_length), "do_lower_case": False}


def stated_recipe(recipe: Recipe, exported: ExportedModel) -> Recipe:
    """Return the run's recipe with the settings of a product that decide its vectors, and how long its texts are.

    Settings that cannot be read stay those of the run; `find_changed_settings` reports them.
    """
    folder = exported.path if exported.path.is_dir() else exported.path.parent
    length = min(recipe.data.max_length, exported.processor.model_max_length)
    if TASK_FACTS[recipe.task].loader == "SentenceTransformer" and ((folder / MODULES).is_file() or exported.is_folder):
        try:
            stated = _read_vectors(folder)
            length = {**_default_length(exported), **_read_object(folder / LENGTH)}["max_seq_length"]
        except (RecipeError, EnvironmentProblem):
            return recipe
        prompts = {"query_prompt": stated[QUERIES], "passage_prompt": stated[PASSAGES]}
        recipe = recipe.with_section(pooling=stated["pooling"], normalize=stated["normalize"], **prompts)
    if not isinstance(length, int) or length < 1:
        return recipe
    data = recipe.data.model_copy(update={"max_length": length})
    return recipe.model_copy(update={"data": data})
