"""The shipped recipes: each runs to the end with local weights and the shipped rows."""

import json
import math
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from support import families
from support.image_text import build_image_text
from support.models import build_llama
from support.runs import invoke
from support.templates import recipe_for, tokenizer_with

from llmtune.data.answer_parser import parse_answer
from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_rows import chat_from_messages
from llmtune.data.chat_template import read_template
from llmtune.errors import EnvironmentProblem
from llmtune.pipeline import run_pipeline
from llmtune.recipe.builtin import find_recipe, list_recipes
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest

RECIPES = Path(__file__).parent.parent / "recipes"
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "quickstart": build_llama,
    "chat": build_llama,
    "chat-qlora": build_llama,
    "chat-tools": build_llama,
    "chat-tools-offline": build_llama,
    "chat-reasoning": build_llama,
    "chat-reasoning-offline": build_llama,
    "chat-images": partial(build_image_text, family="qwen3_vl"),
    "chat-images-offline": partial(build_image_text, family="llava"),
    "chat-labels-offline": partial(build_image_text, family="llava"),
    "completion": build_llama,
    "completion-masked": families.build_bert,
    "completion-offline": build_llama,
    "translate": families.build_bart,
    "translate-offline": build_llama,
    "summarize": families.build_t5,
    "summarize-offline": build_llama,
    "qa": families.build_roberta,
    "qa-offline": families.build_bert,
    "classify": families.build_modernbert,
    "classify-offline": families.build_bert,
    "token-classify": families.build_roberta,
    "token-classify-offline": families.build_bert,
    "speech": partial(families.build_whisper, multilingual=True),
    "speech-offline": partial(families.build_whisper, multilingual=False),
    "embed": families.build_bert,
    "embed-offline": families.build_bert,
    "rerank": families.build_bert,
    "rerank-offline": families.build_bert,
    "preference": build_llama,
    "preference-offline": build_llama,
    "reinforce": build_llama,
    "reinforce-offline": build_llama,
}
"""A tiny model of each recipe's kind."""
LEARNS_SLOWLY = {"completion-masked", "translate", "summarize", "qa", "preference", "preference-offline", "speech"}


def shorten(recipe: str, model: Path) -> list[str]:
    """Settings that make a shipped recipe run on a tiny model in seconds."""
    written = load_recipe(recipe).recipe
    (source,) = written.data.train
    path = draw_stamps(model.parent / "stamps") if "tuxpaint" in source.path else source.path
    values = {
        "model.name": model,
        "data.train": f"{{path: {written_path(str(path))}, limit: 48}}",
        "train.num_train_epochs": 1,
        "train.learning_rate": 0.01,
        "evaluate.gates": "[]",
    }
    if recipe.startswith("chat-tools"):
        template = RECIPES / "templates/chatml.jinja"
        values |= {"data.max_length": 2048, "generation.max_new_tokens": 4, "model.chat_template": template}
    if written.evaluate.when_unsure != "fail":
        values |= {"evaluate.gates": "[loss.high < 1000]", "evaluate.when_unsure": "pass"}  # the key needs an interval
    if written.model.chat_template_kwargs:
        values["model.chat_template_kwargs"] = "null"
    if written.generation.max_new_tokens != 128:
        values["generation.max_new_tokens"] = 4
    if recipe.startswith("speech"):
        values |= {"speech.window_seconds": 2, "data.max_length": 60}
    if written.task == "reinforce":
        (model.parent / "rewards.py").write_text("def length(row, answer):\n    return len(answer)\n")
        values |= {"reinforce.rewards": f"{{'{model.parent / 'rewards.py'}:length': 1.0}}"}
        values |= {"reinforce.mask_truncated": False, "reinforce.max_new_tokens": 4, "train.learning_rate": 1e-3}
    if recipe == "completion-masked":
        values["data.max_length"] = 200
    if recipe.startswith("qa"):
        values |= {"data.max_length": 256, "qa.stride": 64}
    elif written.task == "embed":
        values |= {"data.max_length": 128, "data.on_overlong": "truncate"}
    elif written.task not in ("chat", "completion", "speech", "rerank"):
        values["data.max_length"] = 500
    return [f"{key}={value}" for key, value in values.items()]


def draw_stamps(folder: Path) -> Path:
    """Write rows like those of the script that fetches pictures: noise, with a number in the caption."""
    folder.mkdir()
    lines, noise = [], random.Random(0).randbytes(48 * 432)
    for number in range(48):
        Image.frombytes("RGB", (12, 12), noise[432 * number : 432 * (number + 1)]).save(folder / f"{number}.png")
        caption = f"Number {number}."
        question = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "What is in the picture?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]
        lines.append(json.dumps({"messages": messages, "caption": caption, "category": "numbers"}) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines))
    return folder / "captions.jsonl"


def written_path(path: str) -> str:
    """Write a source as in the recipe."""
    return path if path.startswith("builtin:") else json.dumps(path)


@pytest.mark.parametrize("recipe", BUILDERS)
def test_rows_of_a_recipe_fit_a_tiny_model_of_its_kind(recipe: str, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, shorten(recipe, BUILDERS[recipe](tmp_path / "model")))
    report = run_pipeline(loaded, RunRequest(out=tmp_path / "run", until="prepare"), Console(quiet=True))
    assert report["data"]["rows_in"] == 48
    assert all(report["data"]["examples"][split] > 0 for split in ("train", "validation", "test"))


COMPLETE = ("quickstart", "chat-qlora", "chat-tools")
"""Recipes that the default suite runs to the end; the contract of tasks covers the training of the others."""


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name in COMPLETE else [pytest.mark.slow]) for name in BUILDERS]
)
def test_recipe_runs_to_the_end_on_a_tiny_model_of_its_kind(recipe: str, tmp_path: Path) -> None:
    model = BUILDERS[recipe](tmp_path / "model")
    loaded = load_recipe(recipe, shorten(recipe, model))
    report = run_pipeline(loaded, RunRequest(out=tmp_path / "run"), Console(quiet=True))
    assert report["data"]["rows_in"] == 48
    assert report["adapter"]["method"] == ("qlora" if recipe == "chat-qlora" else "lora")
    evaluation = report["evaluation"]
    metrics = {metric.rpartition(":")[2] for metric in loaded.recipe.evaluate.metrics}
    assert set(evaluation["tuned"]) - {"answers_cut"} == metrics - BESIDE.get(recipe, set())
    assert evaluation["difference"]
    if recipe not in LEARNS_SLOWLY and "loss" in evaluation["difference"]:
        assert evaluation["tuned"]["loss"] < evaluation["base"]["loss"]
    assert all(math.isfinite(line["loss"]) for line in report["train"]["curve"])


BESIDE: dict[str, set[str]] = {"chat-tools": {"no_call"}, "chat-tools-offline": {"no_call"}}
"""Metrics of a recipe that its shortened rows do not produce."""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in BUILDERS if name.endswith("-offline")])
def test_rows_of_an_offline_recipe_fit_its_packaged_model(recipe: str, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    if (missing := Path(loaded.recipe.data.train[0].path)).is_absolute() and not missing.exists():
        pytest.skip(f"{missing} is fetched by a script")
    try:
        report = run_pipeline(loaded, RunRequest(out=tmp_path, until="prepare"), Console(quiet=True))
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))  # the package is not installed
    assert report["data"]["examples"]["test"] >= 30


def test_every_recipe_is_tested() -> None:
    assert {recipe.name for recipe in list_recipes()} == set(BUILDERS)


@pytest.mark.parametrize("recipe", [recipe.name for recipe in list_recipes()])
def test_recipe_has_a_description_and_an_editor_schema(recipe: str) -> None:
    first, second = find_recipe(recipe).read_text().splitlines()[:2]
    schema = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert schema
    assert (RECIPES / schema[1]).is_file()
    assert re.fullmatch(r"# [A-Z].+\.", second)
    assert load_recipe(recipe).recipe.name == recipe


def test_table_of_recipes_names_each_of_them() -> None:
    table = (RECIPES / "README.md").read_text()
    assert set(re.findall(r"\]\((\S+)\.yaml\)", table)) == {recipe.name for recipe in list_recipes()}


SHIPPED = sorted(path.stem for path in (RECIPES / "data").glob("*.jsonl"))
SAYS = ("text", "document", "source", "prompt", "question", "query", "tokens")
"""Content columns; each shipped row has at least one of them."""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_rows_are_complete_and_their_origin_is_noted(name: str) -> None:
    rows = [json.loads(line) for line in (RECIPES / f"data/{name}.jsonl").read_text("utf-8").splitlines()]
    noted = re.search(rf"\| `{name}` \| ([\d,]+) \|", (RECIPES / "data/README.md").read_text())
    assert noted
    assert int(noted[1].replace(",", "")) == len(rows)
    texts = [str([row["messages"][-2]["content"]] if "messages" in row else row) for row in rows]
    assert len(set(texts)) == len(texts)
    assert all("messages" in row or any(row.get(column) for column in SAYS) for row in rows)


@pytest.mark.parametrize("name", ["home-tools", "word-problems"])
def test_the_shipped_template_writes_tools_and_thoughts_that_parse_back(name: str) -> None:
    tokenizer, recipe = tokenizer_with((RECIPES / "templates/chatml.jinja").read_text()), recipe_for(max_length=4096)
    template = read_template(tokenizer, recipe)
    for line in (RECIPES / f"data/{name}.jsonl").read_text("utf-8").splitlines():
        row = chat_from_messages(json.loads(line))
        (examples,) = encode_chat([row], tokenizer, recipe)
        assert not isinstance(examples, str), examples
        start, end = examples[-1].spans[-2:]
        read = parse_answer(examples[-1].input_ids[start:end], template, row.get("tools"))
        said = row["messages"][-1]
        assert (read.text, read.reasoning) == (said["content"], said.get("reasoning"))
        assert list(read.tool_calls) == said.get("tool_calls", [])


def test_shipped_answers_occur_in_their_contexts_and_tags_match_words() -> None:
    for line in (RECIPES / "data/debian-facts.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text
    for line in (RECIPES / "data/debian-mentions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        assert len(row["tokens"]) == len(row["tags"])


def test_all_shipped_recordings_exist_with_their_licence() -> None:
    folder = RECIPES / "data/asterisk-prompts"
    lines = (folder / "metadata.csv").read_text("utf-8").splitlines()[1:]
    assert {line.split(",")[0] for line in lines} == {path.name for path in folder.glob("*.flac")}
    assert "ShareAlike" in (folder / "CREDITS").read_text("utf-8")


def test_quickstart_rows_are_balanced_and_match_the_recipes_choices() -> None:
    rows = [json.loads(line) for line in (RECIPES / "data/debian-sections.jsonl").read_text().splitlines()]
    answers = [row["messages"][-1]["content"] for row in rows]
    counts = {answer: answers.count(answer) for answer in answers}
    assert sorted(counts) == list(load_recipe("quickstart").recipe.evaluate.choices)
    assert min(counts.values()) > 0.75 * max(counts.values())


def test_a_recipe_whose_rows_a_script_makes_names_its_command() -> None:
    done = invoke("recipes", "check", "chat-images-offline")
    words = " ".join(done.stderr.split())
    assert "A script makes it: python " in words
    assert "make_tuxpaint_stamps.py" in words.partition("A script makes it")[2]
    assert "Did you mean" not in words
