"""Every key of the recipe does something: each is flipped, and what the pipeline makes must change."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from rich.console import Console
from safetensors.torch import load_file
from support import families
from support.audio import write_tone
from support.models import build_llama
from support.runs import write_recipe

from llmtune.errors import LlmtuneError
from llmtune.pipeline import run_pipeline
from llmtune.recipe import Recipe, Source, load_recipe
from llmtune.session import Options
from llmtune.store.atomic_files import hash_folder

SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"validation": 0.2, "test": 0.2},
    "train": {"max_steps": 4, "num_train_epochs": None, "eval_steps": 2, "batch_size": 4, "logging_steps": 1},
    "generation": {"max_new_tokens": 6},
    "evaluate": {"metrics": ["loss", "exact_match", "choice_accuracy"], "samples": 2, "choices": ["red", "green"]},
}
SAMPLING = ("generation.do_sample=true",)
QLORA = ("adapter.method=qlora",)
QUIZ = ("evaluate.benchmarks.task=quiz.yaml",)
MOST = "deliberately high"
COMPILED = "compiled"


@dataclass(frozen=True)
class Flip:
    """One key, another value, and what else the recipe must say for it to count."""

    value: str
    also: tuple[str, ...] = field(default=())
    recipe: str = "tiny.yaml"


FLIPS = {
    "name": Flip("other"),
    "task": Flip("completion", ("data.train=pairs.jsonl",)),
    "seed": Flip("8"),
    "data.train": Flip("pairs.jsonl"),
    "data.train.format": Flip("text", ("data.train.path=pairs.jsonl", "task=completion")),
    "data.train.columns": Flip("{prompt: completion, completion: prompt}", ("data.train.path=pairs.jsonl",)),
    "data.train.weight": Flip("2.0", ("data.train=[{path: pairs.jsonl, weight: 1}, {path: rows.jsonl}]",)),
    "data.train.limit": Flip("30", ("data.train.path=rows.jsonl",)),
    "data.validation": Flip("0.4"),
    "data.test": Flip("0.4"),
    "data.split_by": Flip("group"),
    "data.deduplicate": Flip("none", ("data.train=twice.jsonl",)),
    "data.max_dropped": Flip("0.0", ("data.train=holes.jsonl",)),
    "data.train_on": Flip("all"),
    "data.max_length": Flip("20"),
    "data.on_overlong": Flip("drop", ("data.max_length=44",)),
    "data.packing": Flip("false"),
    "model.name": Flip("other-model"),
    "model.candidates": Flip("[model]", ("model.name=null", "model.candidates=[other-model]")),
    "model.dtype": Flip("bfloat16"),
    "model.chat_template": Flip("other.jinja"),
    "model.chat_template_kwargs": Flip("{shout: true}", ("model.chat_template=other.jinja",)),
    "model.add_tokens": Flip("['<colour>']"),
    "model.trust_remote_code": Flip("true", ("model.name=remote-code",)),
    "model.use_safetensors": Flip("false", ("model.name=pickled",)),
    "model.attn_implementation": Flip("eager"),
    "model.check_memory": Flip("false", (MOST,)),
    "adapter.method": Flip("qlora"),
    "adapter.r": Flip("2"),
    "adapter.lora_alpha": Flip("4"),
    "adapter.lora_dropout": Flip("0.5"),
    "adapter.target_modules": Flip("[q_proj]"),
    "adapter.exclude_modules": Flip("[q_proj]"),
    "adapter.modules_to_save": Flip("[norm]"),
    "adapter.layers_to_transform": Flip("[1]", ("adapter.target_modules=[q_proj]",)),
    "adapter.bias": Flip("all"),
    "adapter.use_dora": Flip("true"),
    "adapter.use_rslora": Flip("true"),
    "adapter.init_lora_weights": Flip("pissa"),
    "adapter.rank_pattern": Flip("{q_proj: 2}"),
    "adapter.alpha_pattern": Flip("{q_proj: 2}"),
    "adapter.bnb_4bit_quant_type": Flip("fp4", QLORA),
    "adapter.bnb_4bit_use_double_quant": Flip("false", QLORA),
    "adapter.start_from": Flip("start"),
    "train.learning_rate": Flip("1e-3"),
    "train.num_train_epochs": Flip("0.5", ("train.max_steps=null", "train.num_train_epochs=1")),
    "train.max_steps": Flip("3"),
    "train.batch_size": Flip("2"),
    "train.batch_tokens": Flip("300", ("train.batch_size=null",)),
    "train.optim": Flip("sgd"),
    "train.loraplus_lr_ratio": Flip("16"),
    "train.weight_decay": Flip("0.5"),
    "train.adam_beta1": Flip("0.5"),
    "train.adam_beta2": Flip("0.5"),
    "train.adam_epsilon": Flip("0.1"),
    "train.max_grad_norm": Flip("0.001"),
    "train.lr_scheduler_type": Flip("cosine"),
    "train.lr_scheduler_kwargs": Flip("{num_cycles: 2}", ("train.lr_scheduler_type=cosine",)),
    "train.warmup_steps": Flip("3"),
    "train.gradient_checkpointing": Flip("true"),
    "train.logging_steps": Flip("2"),
    "train.eval_steps": Flip("1"),
    "train.save_steps": Flip("1"),
    "train.save_total_limit": Flip("1", ("train.save_steps=1",)),
    "train.load_best_model_at_end": Flip("false", ("train.learning_rate=3.0", "train.max_grad_norm=0")),
    "train.early_stopping_patience": Flip("1", ("train.learning_rate=3.0", "train.eval_steps=1")),
    "train.early_stopping_threshold": Flip("5.0", ("train.early_stopping_patience=1", "train.eval_steps=1")),
    "train.report_to": Flip("[tensorboard]"),
    "train.torch_compile": Flip("true", (COMPILED,)),
    "train.use_liger_kernel": Flip("true"),
    "train.seeds": Flip("[8]"),
    "generation.max_new_tokens": Flip("2"),
    "generation.do_sample": Flip("true"),
    "generation.temperature": Flip("5.0", SAMPLING),
    "generation.top_k": Flip("2", SAMPLING),
    "generation.top_p": Flip("0.1", SAMPLING),
    "generation.min_p": Flip("0.9", SAMPLING),
    "generation.repetition_penalty": Flip("50.0"),
    "generation.num_beams": Flip("3"),
    "evaluate.metrics": Flip("[loss, exact_match, rougeL]"),
    "evaluate.gates": Flip("['loss < base']"),
    "evaluate.limit": Flip("3"),
    "evaluate.choices": Flip("[red, green, blue]"),
    "evaluate.samples": Flip("1"),
    "evaluate.slices": Flip("[group]"),
    "evaluate.forgetting.texts": Flip("[other.jinja]", ("evaluate.forgetting.questions=[]",)),
    "evaluate.forgetting.questions": Flip("[quiz.jsonl]", ("evaluate.forgetting.texts=[other.jinja]",)),
    "evaluate.fairness.pairs": Flip("[sentences.jsonl]", ("evaluate.fairness={swaps: []}",)),
    "evaluate.fairness.swaps": Flip("[words.csv]", ("evaluate.fairness={pairs: []}",)),
    "evaluate.fairness.groups": Flip("[group]", ("evaluate.fairness={pairs: []}",)),
    "evaluate.benchmarks.task": Flip("quiz.yaml"),
    "evaluate.benchmarks.num_fewshot": Flip("2", QUIZ),
    "evaluate.benchmarks.limit": Flip("3", QUIZ),
    "evaluate.benchmarks.apply_chat_template": Flip("true", QUIZ),
    "deploy": Flip("[merged]"),
    "completion.objective": Flip("causal", recipe="masked.yaml"),
    "completion.mask_probability": Flip("0.5", recipe="masked.yaml"),
    "translate.source_language": Flip("French", recipe="translate.yaml"),
    "translate.target_language": Flip("French", recipe="translate.yaml"),
    "translate.prompt": Flip("'Say in German: {source}'", recipe="translate.yaml"),
    "summarize.prompt": Flip("'In short: {document}'", recipe="summarize.yaml"),
    "qa.style": Flip("generative", recipe="qa.yaml"),
    "qa.stride": Flip("8", recipe="qa.yaml"),
    "qa.max_answer_length": Flip("1", recipe="qa.yaml"),
    "qa.null_score_diff_threshold": Flip("-100.0", recipe="qa.yaml"),
    "qa.prompt": Flip("'{question} {context}'", recipe="answers.yaml"),
    "qa.no_answer": Flip("nothing", recipe="answers.yaml"),
    "classify.kind": Flip("multi", recipe="classify.yaml"),
    "classify.labels": Flip("[green, red, blue, black]", recipe="classify.yaml"),
    "classify.class_weights": Flip("{red: 5.0}", recipe="classify.yaml"),
    "token_classify.labels": Flip("[THING, COLOUR]", recipe="tags.yaml"),
    "speech.language": Flip("fr", ("speech.language=en",), "speech.yaml"),
    "speech.task": Flip("translate", ("speech.language=en",), "speech.yaml"),
    "speech.normalizer": Flip("none", ("speech.language=en", "train.max_steps=1"), "speech.yaml"),
    "speech.window_seconds": Flip("0.1", ("speech.language=en",), "speech.yaml"),
    "preference.loss": Flip("ipo", recipe="preference.yaml"),
    "preference.beta": Flip("0.5", recipe="preference.yaml"),
    "preference.label_smoothing": Flip("0.3", recipe="preference.yaml"),
    "preference.desirable_weight": Flip("3.0", recipe="thumbs.yaml"),
    "preference.undesirable_weight": Flip("3.0", recipe="thumbs.yaml"),
    "preference.center_rewards_coefficient": Flip("0.5", ("preference.loss=reward",), "preference.yaml"),
}
HUB_ONLY = {"model.revision", "data.train.config", "data.train.split", "data.train.revision"}
"""They name a place on a hub; `tests/model/test_catalogue.py` and `tests/data/test_sources.py` hold them."""
ONE_VALUE = {"recipe_version"}


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, about in model.model_fields.items():
        sections = [part for part in (about.annotation, *typing.get_args(about.annotation)) if isinstance(part, type)]
        section = next((part for part in sections if issubclass(part, BaseModel) and part.model_fields), None)
        if section is None:
            yield prefix + name
        else:
            yield from keys_of(section, f"{prefix}{name}.")


def test_no_key_of_the_schema_is_left_out() -> None:
    known = {key for key in keys_of(Recipe) if not key.startswith("data.train.")}
    sources = {f"data.train.{name}" for name in Source.model_fields if name != "path"}
    assert known | sources | {"data.train"} == FLIPS.keys() | HUB_ONLY | ONE_VALUE


@pytest.mark.parametrize("key", FLIPS)
def test_a_flipped_key_changes_what_is_made(place: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flip = FLIPS[key]
    if MOST in flip.also:
        monkeypatch.setattr("llmtune.model.memory_plan.memory_limit", lambda device: 1000)
    if COMPILED in flip.also:  # the numbers may be the same to the last bit: that there is work for a compiler counts
        monkeypatch.setenv("CXX", "no-such-compiler")
    context = tuple(item for item in flip.also if item not in (MOST, COMPILED))
    plain = outcome(place, context, flip.recipe, cached=MOST not in flip.also)
    assert flip.recipe == "tiny.yaml" or not plain.startswith("RecipeError"), plain
    assert plain != outcome(place, (*context, f"{key}={flip.value}"), flip.recipe)


OUTCOMES: dict[tuple[str, ...], str] = {}


def outcome(place: Path, sets: tuple[str, ...], recipe: str = "tiny.yaml", cached: bool = False) -> str:
    """What a run with these settings makes, as text without times and sizes of this machine."""
    if cached and (recipe, *sets) in OUTCOMES:
        return OUTCOMES[recipe, *sets]
    try:
        loaded = load_recipe(recipe, list(sets))
        report = run_pipeline(loaded, Options(out=place / f"run-{len(list(place.iterdir()))}"), Console(quiet=True))
    except LlmtuneError as error:
        return f"{type(error).__name__}: {error}"
    run = sorted(place.glob("run-*"), key=lambda path: path.stat().st_mtime_ns)[-1]
    made = json.dumps([report["name"], digest(run, report)], sort_keys=True)
    if cached:
        OUTCOMES[recipe, *sets] = made
    return made


def digest(run: Path, report: dict[str, Any]) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [{key: line[key] for key in line if key not in {"tokens_per_second", "peak_bytes"}} for line in lines]
    rows = json.loads((run / "data" / "rows" / "rows.json").read_text())
    examples = json.loads((run / "data" / "examples" / "examples.json").read_text())
    return [
        [rows["content_hash"], rows["counts"], examples["content_hash"]],
        [report["model"]["plan"]["parts"], report["model"]["ranking"] and report["model"]["ranking"]["chosen"]],
        [report["adapter"], hash_folder(run / "adapter"), curve],
        sorted(path.name for path in (run / "checkpoints").iterdir()),
        [_evaluated(run), report["gates"], report["evaluation"]["samples"], report["evaluation"]["seeds"]],
        (run / "merged").exists(),
        sorted(path.name.split(".")[0] for path in run.rglob("events.out.*")),
    ]


def _evaluated(run: Path) -> str:
    """What the evaluation says, but for the places of files."""
    return (run / "evaluation" / "evaluation.json").read_text().replace(str(run.parent), "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a flip may name."""
    place = tmp_path_factory.mktemp("keys")
    colours, things = ["red", "green", "blue", "black"], [f"{a} {b}" for a in ["cat", "dog", "fox"] for b in "1234"]
    rows = [
        (f"Which colour has the {thing} on day {i * 7}?", colours[(i + j) % 4])
        for i, thing in enumerate(things)
        for j in range(4)
    ]
    questions = [(f"{question} Say it the {j}th time.", answer) for j, (question, answer) in enumerate(rows)]
    chat = [chat_row(question, answer, i % 3) for i, (question, answer) in enumerate(questions)]
    (place / "rows.jsonl").write_text("".join(chat))
    (place / "twice.jsonl").write_text("".join(chat + chat[:20]))
    (place / "holes.jsonl").write_text("".join([*chat, '{"messages": []}\n']))
    pairs = [json.dumps({"prompt": f"{question} ", "completion": f"{answer}."}) for question, answer in questions]
    (place / "pairs.jsonl").write_text("\n".join(pairs) + "\n")
    (place / "sentences.jsonl").write_text('{"more": "The cat is red.", "less": "The dog is red."}\n')
    (place / "words.csv").write_text("cat,dog\n")
    (place / "quiz.yaml").write_text(LM_EVAL_TASK)
    build_llama(place / "model")
    build_llama(place / "other-model", seed=1)
    (place / "other.jinja").write_text(OTHER_TEMPLATE)
    (place / "quiz.jsonl").write_text('{"question": "Which colour?", "choices": ["red", "cat"], "answer": "red"}\n')
    make_odd_models(place)
    make_tasks(place, questions)
    return place


def make_tasks(place: Path, questions: list[tuple[str, str]]) -> None:
    """A small recipe with rows and a model for each task that has keys of its own."""
    families.build_bert(place / "encoder")
    families.build_whisper(place / "hearing", multilingual=True)
    told = [(question, f"{question} It is {answer} there.", answer) for question, answer in questions]
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": text} for _, text, _ in told],
        "translation": [{"source": question, "target": answer} for question, _, answer in told],
        "summary": [{"document": text, "summary": answer} for _, text, answer in told],
        "facts": [
            {"question": "Which colour?", "context": f"{text} " * 3, "answer": answer if i % 4 else None}
            for i, (_, text, answer) in enumerate(told)
        ],
        "labels": [{"text": text, "label": answer} for _, text, answer in told],
        "tags": [
            {"tokens": ["it", answer, question], "tags": ["O", "B-COLOUR", "B-THING"]} for question, _, answer in told
        ],
        "pairs-of-answers": [
            {"prompt": question, "chosen": f"{answer} it is", "rejected": "no idea"} for question, _, answer in told
        ],
        "thumbs": [
            {"prompt": question, "completion": answer, "label": i % 2 == 0}
            for i, (question, _, answer) in enumerate(told)
        ],
        "sounds": [{"audio": f"tone-{i}.wav", "text": answer} for i, (_, _, answer) in enumerate(told[:16])],
    }
    for name, found in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    for i in range(16):
        write_tone(place / f"tone-{i}.wav", seconds=0.4, seed=i)
    quiet = {"generation": None, "evaluate": {"metrics": ["loss"], "samples": 2, "choices": None}}
    scored = {name: {**quiet["evaluate"], "metrics": metrics} for name, metrics in METRICS.items()}  # type: ignore[dict-item]
    write = partial(_write_task, place)
    write("masked", "completion", "encoder", "text", completion={"objective": "masked"}, **quiet)
    write("translate", "translate", "model", "translation", translate=LANGUAGES, evaluate=scored["translate"])
    write("summarize", "summarize", "model", "summary", evaluate=scored["summarize"])
    pointing = {"qa": {"stride": 20, "style": "extractive"}, "generation": None, "evaluate": scored["qa"]}
    write("qa", "qa", "encoder", "facts", data={"max_length": 80}, **pointing)
    write("answers", "qa", "model", "facts", data={"max_length": 256}, evaluate=scored["qa"])
    write("classify", "classify", "encoder", "labels", generation=None, evaluate=scored["classify"])
    write("tags", "token-classify", "encoder", "tags", generation=None, evaluate=scored["tags"])
    write("speech", "speech", "hearing", "sounds", data={"max_length": 60}, evaluate=scored["speech"])
    write("preference", "preference", "model", "pairs-of-answers", generation=None, evaluate=scored["preference"])
    thumbs = {"preference": {"loss": "kto"}, "generation": None, "evaluate": scored["preference"]}
    write("thumbs", "preference", "model", "thumbs", **thumbs)


LANGUAGES = {"source_language": "English", "target_language": "German"}
METRICS = {
    "translate": ["loss", "chrf"],
    "summarize": ["loss", "rougeL"],
    "qa": ["exact_match", "f1"],
    "classify": ["loss", "accuracy"],
    "tags": ["loss", "f1"],
    "speech": ["loss", "wer"],
    "preference": ["accuracy", "margin"],
}


def _write_task(place: Path, name: str, task: str, model: str, rows: str, **sections: Any) -> None:
    """Write a recipe of a task beside its rows; sections that the task does not read are left out."""
    data = {"validation": 0.2, "test": 0.2, **sections.pop("data", {})}
    train = {"max_steps": 2, "num_train_epochs": None, "batch_size": 4, "logging_steps": 1}
    settings = {"task": task, "data": data, "train": train, "generation": {"max_new_tokens": 6}, **sections}
    write_recipe(place / f"{name}.yaml", f"./{model}", f"{rows}.jsonl", **settings)


def chat_row(question: str, answer: str, group: int) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, "group": group}) + "\n"


OTHER_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ (m['role'] | upper) if shout else m['role'] }}: {{ m['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{{ 'ASSISTANT' if shout else 'assistant' }}: {% endif %}"
)
LM_EVAL_TASK = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: pairs.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
metric_list: [{metric: perplexity}]
"""
REMOTE_CODE = "from transformers import LlamaForCausalLM\n\n\nclass Odd(LlamaForCausalLM):\n    pass\n"


def make_odd_models(place: Path) -> None:
    remote = build_llama(place / "remote-code")
    config = json.loads((remote / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_odd.Odd"}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "modeling_odd.py").write_text(REMOTE_CODE)
    pickled = build_llama(place / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()


@pytest.fixture
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    if not (folder / "tiny.yaml").exists():
        write_recipe(folder / "tiny.yaml", "./model", "rows.jsonl", **SECTIONS)
        run_pipeline(load_recipe("tiny.yaml"), Options(out=folder / "start", until="train"), Console(quiet=True))
    return folder
