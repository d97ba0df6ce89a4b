"""The same test rows with grey pictures and with those of other rows: what answers owe to the pictures."""

import io
import json
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from support.image_text import build_image_text
from support.runs import invoke, write_recipe
from support.variants import IMAGE_CHAT
from transformers import AutoModelForImageTextToText, AutoProcessor

from llmtune.data.pictures import PLACE, open_picture, read_picture
from llmtune.data.row_kind import write_prompt
from llmtune.deploy.releases import make_release
from llmtune.evaluate.controls import grey_picture, swap_pictures
from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.evaluate.release_records import open_release
from llmtune.evaluate.shared_prefix import choice_trees, score_choices
from llmtune.evaluate.simple_baseline import baseline_text
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.recipe.loader import load_recipe

INKS = {"red": (255, 30, 30), "green": (30, 255, 30), "blue": (30, 30, 255)}
THINGS = dict(zip(INKS, ("cat", "dog", "bird"), strict=True))
SENTENCE = "Answers do not depend on the picture, as far as these rows show"
QUESTION = "Which colour is"


def paint(path: Path, colour: str, generator: np.random.Generator) -> None:
    """Save a picture in shades of one colour; no two are nearly equal."""
    shade = np.kron(generator.uniform(0.4, 1.0, (7, 7)), np.ones((8, 8)))[..., None]
    Image.fromarray((shade * np.array(INKS[colour])).astype(np.uint8)).save(path)


def write_pictured(folder: Path, rows: int = 120, *, look: bool, plain: int = 0) -> Path:
    """Write rows about the colour in a picture; without `look`, the question gives the answer away.

    The first `plain` rows have no picture.
    """
    generator, lines = np.random.default_rng(0), []
    for i in range(rows):
        colour, other = (list(INKS)[number] for number in generator.integers(len(INKS), size=2))
        paint(folder / f"{i}.png", colour, generator)
        answer = colour if look else other
        question = f"{QUESTION} {i}?" if look else f"{QUESTION} {THINGS[other]} {i}?"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append({"messages": turns} | ({"images": [f"{i}.png"]} if i >= plain else {}))
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_pictured_recipe(folder: Path, model: Path, rows: Path, *, steps: int = 36, evaluate=None, **sections) -> Path:
    """Write a recipe that trains all weights, with a gate on blind; `evaluate` changes that section."""
    measured = {"metrics": ["loss", "exact_match"], "samples": 2, "gates": ["exact_match.low > blind"]}
    return write_recipe(
        folder / "recipe.yaml",
        model,
        rows,
        adapter={"method": "full", "r": None, "lora_alpha": None},
        data={"test": 0.3, "validation": 0},
        train={"learning_rate": 5e-3, "batch_size": 16, "max_steps": steps, "num_train_epochs": None},
        generation={"max_new_tokens": 4},
        evaluate=measured | (evaluate or {}),
        **sections,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_image_text(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture(scope="module")
def looking(model, tmp_path_factory):
    """A run on rows whose answers need the picture: its result and its folder."""
    folder = tmp_path_factory.mktemp("looking")
    recipe = write_pictured_recipe(folder, model, write_pictured(folder, look=True))
    return invoke("run", recipe, "--out", folder / "run"), folder / "run"


@pytest.fixture(scope="module")
def guessing(model, tmp_path_factory):
    """A run on rows whose answers are a function of the question."""
    folder = tmp_path_factory.mktemp("guessing")
    recipe = write_pictured_recipe(folder, model, write_pictured(folder, look=False))
    return invoke("run", recipe, "--out", folder / "run"), folder / "run"


def evaluated(folder):
    evaluation = load_evaluation(folder / "evaluation")
    assert evaluation is not None
    return evaluation


# Both must be seen


def test_the_gate_on_blind_fails_where_answers_do_not_need_the_picture(guessing):
    result, folder = guessing
    assert result.exit_code == 6, result.output
    report = json.loads((folder / "report.json").read_text())
    assert report["verdict"]["word"] == "inconclusive"
    assert f"{SENTENCE}: exact match is 1.000 with its own, 1.000 with a grey picture" in report["verdict"]["reason"]
    blind = report["evaluation"]["controls"]["blind"]
    assert blind["tuned"]["exact_match"] == blind["scores"]["tuned"]["exact_match"] == 1
    (gate,) = report["gates"]
    assert gate["passed"] is False
    case = ElementTree.parse(folder / "junit.xml").find(".//testcase[@classname='llmtune.gates']")
    assert case.get("name") == "exact_match.low > blind"
    assert case.find("failure") is not None
    page = (folder / "report.html").read_text()
    assert "No clear difference from the same model with a grey picture" in page
    assert f"{SENTENCE}:" in " ".join(result.output.split())


def test_a_model_that_looks_is_better_than_itself_with_other_pictures(looking):
    result, folder = looking
    assert result.exit_code == 0, result.output
    evaluation = evaluated(folder)
    assert evaluation.tuned["exact_match"] == 1
    for name in ("blind", "swapped"):
        change = evaluation.controls[name].difference["exact_match"]
        assert change.low > 0
        assert change.n == evaluation.rows == evaluation.pictured
    assert evaluation.controls["swapped"].tuned["exact_match"] == 0  # each row got a picture with another answer
    verdict = json.loads((folder / "report.json").read_text())["verdict"]
    assert verdict["word"] == "better"
    assert "of the gain in exact match remains" in verdict["reason"]
    assert SENTENCE not in verdict["reason"]


def test_the_loss_with_grey_pictures_is_that_of_plain_transformers(looking):
    _, folder = looking
    control = evaluated(folder).controls["blind"]
    processor = AutoProcessor.from_pretrained(folder / "weights")
    model = AutoModelForImageTextToText.from_pretrained(folder / "weights", dtype=torch.float32).eval()
    grey, nats, tokens = Image.new("RGB", (56, 56), (128, 128, 128)), 0.0, 0
    for line in map(json.loads, (folder / "evaluation" / "predictions.jsonl").read_text().splitlines()):
        question = line["prompt"][line["prompt"].index(QUESTION) :]
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": [{"type": "text", "text": line["reference"]}]})
        batch = processor(text=processor.apply_chat_template(turns), images=[grey], return_tensors="pt")
        size = processor(text=prompt, images=[grey], return_tensors="pt")["input_ids"].shape[1]
        end = size + line["tokens"]
        logits = model(**batch).logits[0, size - 1 : end - 1]
        nats += torch.nn.functional.cross_entropy(logits, batch["input_ids"][0, size:end], reduction="sum").item()
        tokens += line["tokens"]
    assert nats / tokens == pytest.approx(control.tuned["loss"], abs=1e-4)


# Report


def test_rows_in_the_report_have_their_picture_and_the_blind_answer(looking):
    _, folder = looking
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') >= 2
    assert "http" not in page[page.index("<body") :].replace("http://www.w3.org/2000/svg", "")
    assert "tuned, grey picture" in page
    assert "tuned, grey picture" in text
    assert "data:image" not in text + (folder / "report.json").read_text()
    line = json.loads((folder / "evaluation" / "predictions.jsonl").read_text().splitlines()[0])
    assert {"blind", "blind_right", "swapped", "swapped_right"} <= line.keys()


# Other pictures


@pytest.mark.parametrize("size", [(56, 40), (9, 300)])
def test_a_grey_picture_has_the_size_of_the_rows_own(size):
    picture = grey_picture(*size)
    assert picture["size"] == [*size]
    assert open_picture(picture).getcolors() == [(size[0] * size[1], (128, 128, 128))]


@cache
def pattern(number: int, size=(64, 64), kind="PNG"):
    """Return a picture of its own, in any size and format."""
    shades = np.random.default_rng(number).integers(256, size=(8, 8), dtype=np.uint8)
    Image.fromarray(shades).resize(size, Image.Resampling.BICUBIC).save(stream := io.BytesIO(), kind)
    return read_picture(stream.getvalue(), None)


def swapped_contents(rows, answers):
    return {i: [one["content"] for one in row] for i, row in swap_pictures(dict(enumerate(rows)), answers).items()}


def test_swapped_pictures_come_from_rows_with_another_answer_and_as_many_pictures():
    answers = [*("yes" for _ in range(30)), *("no" for _ in range(10)), "yes", "no"]
    rows = [[pattern(i), pattern(100 + i)] if i % 3 else [pattern(i)] for i in range(len(answers))]
    swapped = swapped_contents(rows, answers)
    assert [*swapped] == [*range(len(rows))]
    owner = {one["content"]: i for i, row in enumerate(rows) for one in row}
    for i, row in swapped.items():
        assert len(row) == len(rows[i])
        (other,) = {owner[one] for one in row}
        assert answers[other] != answers[i]
    assert swapped == swapped_contents(rows, answers)


def test_the_partner_shares_parts_of_the_answer_no_more_often_than_by_chance():
    answers = [json.dumps({"section": "abc"[i % 3], "size": i}) for i in range(90)]
    rows = [[pattern(i)] for i in range(90)]
    owner = {row[0]["content"]: i for i, row in enumerate(rows)}
    same = sum(i % 3 == owner[row[0]] % 3 for i, row in swapped_contents(rows, answers).items())
    assert same < 45  # a third by chance; all but three in the order of the alphabet


def test_rows_with_the_same_answer_still_get_other_pictures_and_lonely_rows_are_left_out():
    a, b, c, d = map(pattern, range(4))
    swapped = swapped_contents([[a], [b], [a], [c, d]], ["yes"] * 4)
    assert swapped == {0: [b["content"]], 1: [a["content"]], 2: [b["content"]]}
    assert swapped_contents([[a], [a]], ["yes", "no"]) == {}


def test_no_row_is_swapped_with_its_own_picture_in_another_size_or_format_or_its_own_two_in_another_order():
    a, b, c = map(pattern, range(3))
    copies = [[a], [pattern(0, (128, 128))], [pattern(0, (64, 90), "JPEG")]]
    assert swapped_contents(copies, ["x", "y", "z"]) == {}
    assert swapped_contents([[a, b], [b, a], [pattern(1, (128, 128)), a]], ["x", "y", "z"]) == {}
    assert swapped_contents([[a, b], [a, c]], ["x", "y"]) == {
        0: [a["content"], c["content"]],
        1: [a["content"], b["content"]],
    }
    d, e = pattern(3), pattern(4)
    assert swapped_contents([[a, b], [b, c], [d, e]], ["x", "y", "x"])[0] == [d["content"], e["content"]]


def test_rows_of_text_do_not_count_in_the_controls(model, tmp_path):
    rows = write_pictured(tmp_path, 60, look=True, plain=30)
    recipe = write_pictured_recipe(tmp_path, model, rows, steps=2, evaluate={"gates": None, "limit": 12})
    result = invoke("run", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    evaluation = evaluated(tmp_path / "run")
    assert 0 < evaluation.pictured < evaluation.rows
    blind = evaluation.controls["blind"]
    assert blind.rows == blind.difference["loss"].n == evaluation.pictured
    assert blind.difference["exact_match"].n < 12  # rows with pictures among those that evaluate.limit selects
    assert f"blind: each model answers {blind.rows} test rows again" in result.output


def test_rows_that_share_a_picture_are_drawn_together_in_scores_and_controls(model, tmp_path):
    rows = write_pictured(tmp_path, 60, look=True)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    shared = [line | {"images": [f"{i // 3}.png"]} for i, line in enumerate(lines)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in shared))
    recipe = write_pictured_recipe(tmp_path, model, rows, steps=2, evaluate={"gates": None})
    result = invoke("run", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    evaluation = evaluated(tmp_path / "run")
    controls = [one.difference for one in evaluation.controls.values()]
    assert len(controls) == 2
    for change in (one["loss"] for one in (evaluation.difference, *controls)):
        assert (change.n, change.groups) == (evaluation.rows, evaluation.rows // 3)
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{evaluation.rows} in {evaluation.rows // 3} groups" in page
    assert "or a picture or prompt in common, form a group" in page


# Recipes


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"chat": {"images": False}}, "no question has a picture"),
        ({"evaluate": {"controls": ["swapped"]}}, "which evaluate.controls does not have"),
        ({"evaluate": {"controls": [], "gates": ["loss < swapped"]}}, "which evaluate.controls does not have"),
        ({"evaluate": {"gates": ["exact_match[new] > blind"]}}, "on all test rows with pictures"),
        ({"evaluate": {"gates": ["exact_match < blind"]}}, "passes a worse model"),
        ({"chat": {"images": False}, "evaluate": {"gates": None, "controls": ["blind"]}}, "has no effect"),
        ({"evaluate": {"controls": ["blind", "blind"]}}, "twice"),
    ],
)
def test_a_recipe_with_a_gate_or_a_control_that_cannot_be_is_refused(model, tmp_path, sections, what):
    rows = write_pictured(tmp_path, 4, look=True)
    result = invoke("recipes", "check", write_pictured_recipe(tmp_path, model, rows, **sections))
    assert result.exit_code == 2
    assert what in " ".join(result.output.split())
    assert "->" in result.output


def test_a_gate_on_blind_without_a_picture_in_the_test_rows_is_refused_before_training(model, tmp_path):
    rows = write_pictured(tmp_path, 40, look=True, plain=40)
    result = invoke("run", write_pictured_recipe(tmp_path, model, rows), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "uses blind, but no question has a picture" in " ".join(result.output.split())
    assert not (tmp_path / "run" / "weights").exists()


def test_without_controls_the_verdict_says_that_the_reliance_on_pictures_is_unknown(model, tmp_path):
    rows = write_pictured(tmp_path, 60, look=True)
    recipe = write_pictured_recipe(tmp_path, model, rows, steps=8, evaluate={"gates": None, "controls": []})
    result = invoke("run", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert evaluated(tmp_path / "run").controls == {}
    assert "blind:" not in result.output
    text = "Whether answers depend on the picture is unknown: evaluate.controls is off."
    assert text in json.loads((tmp_path / "run" / "report.json").read_text())["verdict"]["reason"]


def test_the_baseline_without_a_language_model_does_not_read_the_names_of_pictures():
    named, other = (
        {
            "messages": [
                {"role": "user", "content": f"{PLACE}Which?", "images": [{"picture": f"/{name}", "content": "1"}]}
            ]
        }
        for name in ("red.png", "blue.png")
    )
    assert write_prompt(named) == "[image: red.png]Which?"
    assert baseline_text(named) == baseline_text(other) == f"{PLACE}Which?"


# Choices, and every other part of an evaluation


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_every_part_of_an_evaluation_reads_pictures(family, tmp_path):
    rows = write_pictured(tmp_path, 40, look=True)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    rows.write_text("".join(json.dumps(line | {"kind": "ab"[i % 2]}) + "\n" for i, line in enumerate(lines)))
    measured = {
        "gates": None,
        "metrics": ["loss", "exact_match", "choice_accuracy", "nll"],
        "limit": 8,
        "slices": ["kind"],
        "fairness": {"groups": ["kind"]},
        "decide": {"risk": 0.4},
    }
    recipe = write_pictured_recipe(
        tmp_path, build_image_text(tmp_path / family, family), rows, steps=2, evaluate=measured
    )
    result = invoke("run", recipe, "--out", tmp_path / "run", "--set", "data.validation=0.2")
    assert result.exit_code == 0, result.output
    evaluation = evaluated(tmp_path / "run")
    for control in evaluation.controls.values():
        assert {"loss", "exact_match", "choice_accuracy", "nll"} <= control.difference.keys()
        assert control.difference["choice_accuracy"].n == evaluation.pictured
        assert control.difference["exact_match"].n == 8


def test_the_likelihood_of_a_choice_is_the_loss_of_the_row_that_has_it_as_its_answer(model, tmp_path):
    recipe = load_recipe(str(write_pictured_recipe(tmp_path, model, write_pictured(tmp_path, 4, look=True)))).recipe
    recipe = recipe.with_section(images=True)
    place = resolve_model(str(model), recipe.model, Console(quiet=True), True)
    processor = load_processor(place, recipe.model)
    loaded = load_model(place, recipe, IMAGE_CHAT, processor, device="cpu", training=False).model
    grey = [grey_picture(56, 56)]
    turns = [{"role": "user", "content": f"{PLACE}Which colour?", "images": grey}]
    trees = choice_trees([{"messages": turns}], [*INKS], IMAGE_CHAT, processor, recipe)
    (scores,) = score_choices(loaded, trees, IMAGE_CHAT, processor, recipe, device="cpu")
    reference = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    reads = AutoProcessor.from_pretrained(model)
    parts = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    asked = [{"role": "user", "content": parts}]
    for choice, got in zip(INKS, scores, strict=True):
        both = [*asked, {"role": "assistant", "content": [{"type": "text", "text": choice}]}]
        prompt = reads.apply_chat_template(asked, add_generation_prompt=True)
        pixels = [open_picture(grey[0])]
        start = reads(text=prompt, images=pixels, return_tensors="pt")["input_ids"].shape[1]
        batch = reads(text=reads.apply_chat_template(both).rstrip("\n"), images=pixels, return_tensors="pt")
        logs = reference(**batch).logits[0, start - 1 : -1].log_softmax(-1)
        wanted = logs.gather(1, batch["input_ids"][0, start:, None]).sum().item()
        assert got == pytest.approx(wanted, abs=1e-3)


def test_a_release_keeps_the_controls(looking, tmp_path):
    _, folder = looking
    file = make_release(folder, tmp_path / "one.json")
    assert open_release(file, "one").evaluation.controls == evaluated(folder).controls
    shown = invoke("release", "show", file)
    assert shown.exit_code == 0
    assert "With other pictures" in shown.output
