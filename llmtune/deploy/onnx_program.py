"""The settings of the program next to ONNX files, `run_model.py`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmtune.data.text_pairs import first_token
from llmtune.data.tokenization import decode
from llmtune.deploy.tuned_model import TunedModel
from llmtune.evaluate.decoder_generation import decoder_settings
from llmtune.evaluate.generation import answer_ends
from llmtune.model.memory_plan import context_length
from llmtune.recipe.model_kind import CTC, MASKED, SPANS, TOKENS, VECTORS
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.store.atomic_files import write_json

PROGRAM = "run_model.py"
KINDS = {TOKENS: "tags", SPANS: "span", MASKED: "masked", CTC: "letters", VECTORS: "vector"}
"""The program's names of kinds of models; of others, the name of the task's kind of output."""


def write_program(model: PreTrainedModel, tuned: TunedModel, folder: Path) -> None:
    """Write the program that answers the text, question or recording given as its arguments, and its settings."""
    task, longest = tuned.task, tuned.recipe.data.max_length
    if model.config.is_encoder_decoder:
        settings = _encoder_decoder_settings(model, tuned)
    elif task.model_kind.decodes:
        settings = _decoder_settings(model, tuned)
    else:
        ranks = TASK_FACTS[task.name].answer_kind == "relevances"
        kind = KINDS.get(task.model_kind) or ("ranking" if ranks else task.output_kind(tuned.recipe))
        limit = min(longest, context_length(model.config) or longest)
        settings = {"kind": kind, "max_length": limit, **task.export_constants(tuned.recipe, tuned.processor)}
    needed = settings.get("places") or task.required_inputs or task.optional_inputs[:1]
    optional = ["[pair]"] if "pair" in task.optional_inputs else []
    arguments = " ".join([*needed, *optional]).upper().replace("<", "").replace(">", "")
    write_json(folder / "run_model.json", {**settings, "needed": len(needed), "arguments": arguments})
    shutil.copyfile(Path(__file__).with_name(PROGRAM), folder / PROGRAM)


def _decoder_settings(model: PreTrainedModel, tuned: TunedModel) -> dict[str, Any]:
    """Return a decoder's settings; the prompt is written as the task renders it.

    It has a placeholder for each required input, and for each language that the rows state.
    """
    first = tuned.rows[0] if tuned.rows else {}
    stated = [name for name in tuned.task.optional_inputs if first.get(name) is not None]
    places = {name: f"<{name}>" for name in (*tuned.task.required_inputs, *stated)}
    inputs = tuned.task.stated_inputs(first, tuned.recipe) if tuned.rows else {}
    ids = tuned.task.prompt_ids(tuned.task.make_row({**inputs, **places}), tuned.processor, tuned.recipe)
    return {
        "kind": "decoder",
        "prompt": decode(tuned.processor, ids),
        "places": list(places.values()),
        "max_new_tokens": tuned.recipe.generation.max_new_tokens,
        "ends": answer_ends(model, tuned.processor, tuned.recipe),
        "never": [],
        "never_first": [],
    }


def _encoder_decoder_settings(model: PreTrainedModel, tuned: TunedModel) -> dict[str, Any]:
    task, processor, recipe = tuned.task, tuned.processor, tuned.recipe
    written: dict[str, Any] = {"kind": "recording"}
    start, first = [], None
    if task.model_kind.takes_audio:
        task.prepare_processor(processor, recipe)
        start = list(processor.prefix_tokens)
    else:
        places = {name: f"<{name}>" for name in task.required_inputs}
        inputs = task.stated_inputs(tuned.rows[0], recipe) if tuned.rows else {}
        pair = task.pair(task.make_row({**inputs, **places}), recipe)
        first = first_token(pair, processor)
        written = {"kind": "text-to-text", "prompt": pair.source, "places": list(places.values())}
    settings = decoder_settings(model.generation_config, model, processor, recipe, first)
    if not start:
        forced = settings.forced_bos_token_id
        start = [settings.decoder_start_token_id, *([] if forced is None else [forced])]
    never = [ids[0] for ids in settings.bad_words_ids or () if len(ids) == 1]
    return {
        **written,
        "start": start,
        "max_new_tokens": recipe.generation.max_new_tokens,
        "ends": settings.eos_token_id,
        "never": [*never, *(settings.suppress_tokens or ())],
        "never_first": list(settings.begin_suppress_tokens or ()),
    }
