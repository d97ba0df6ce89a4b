"""Words that are marked in a text: aligned to tokens, learned, counted as seqeval counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from seqeval.metrics import f1_score, precision_score, recall_score
from support import families, pairs
from support.pairs import gradient, quiet, start_training
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer

from llmtune.data import load_rows, read_rows
from llmtune.data.examples import ExampleReader, load_examples
from llmtune.data.label_encoding import encode_tags
from llmtune.data.target_collators import tags_collator
from llmtune.errors import DataError, RecipeError
from llmtune.evaluate.task_predictions import predict_tags
from llmtune.model import load_processor
from llmtune.model.task_losses import tags_loss
from llmtune.pipeline import evaluate_run, run_pipeline
from llmtune.recipe import Recipe, load_recipe
from llmtune.session import Models, Options, open_finished
from llmtune.store.run_folder import read_run, recipe_of_run
from llmtune.tasks import choose_variant, get_task, token_classify

ENCODERS = ("bert", "roberta", "deberta", "modernbert")
METHODS = {"bert": "lora", "roberta": "qlora", "deberta": "full", "modernbert": "lora"}
COLOURS = ("red", "green", "blue")
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone")
ASKED = ["The fox is blue and the sky is red .", "A cat , a dog ."]


def tagged(thing, colour, number):
    tokens = ["The", "quick", thing, "is", colour, f"({number})", "."]
    return {"tokens": tokens, "tags": ["O", "B-THING", "I-THING", "O", "B-COLOUR", "O", "O"]}


ROWS = [tagged(thing, colour, number) for thing in THINGS for colour in COLOURS for number in (1, 23, 456)]
NAMES = ["O", "B-COLOUR", "I-COLOUR", "B-THING", "I-THING"]


def run_recipe(*about, **sections):
    return pairs.run_recipe(*about, "token-classify", generation={"max_new_tokens": None}, **sections)


def recipe_of(*about, **sections):
    return pairs.recipe_of(*about, "token-classify", generation={"max_new_tokens": None}, **sections)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """`built("bert")` is the folder of a tiny model."""
    folders = {}

    def build(family):
        if family not in folders:
            folder = tmp_path_factory.mktemp("models") / family
            folders[family] = getattr(families, f"build_{family}")(folder)
        return folders[family]

    return build


@pytest.fixture(scope="module")
def finished(tmp_path_factory, built):
    """`finished("bert")` is the run folder of a family with its method, and its report."""
    runs = {}

    def run(family):
        if family not in runs:
            folder = tmp_path_factory.mktemp("runs") / family
            sections = {"data": {"max_length": 64}, "adapter": {"method": METHODS[family]}}
            sections["train"] = {"num_train_epochs": 3, "learning_rate": 5e-3 if family == "deberta" else 1e-2}
            sections["evaluate"] = {"metrics": ["loss", "f1", "precision", "recall", "accuracy"]}
            runs[family] = folder / "run", run_recipe(folder, built(family), ROWS, **sections)
        return runs[family]

    return run


def predictions(run):
    return [json.loads(line) for line in (run / "evaluation" / "predictions.jsonl").read_text().splitlines()]


def wanted_tags(line):
    return ROWS[int(line["origin"].rpartition(":")[2]) - 1]["tags"]


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_learns_tags_and_is_held_against_the_most_frequent_one(finished, family):
    run, report = finished(family)
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    scores = report["evaluation"]
    assert scores["baseline"] == "the most frequent tag (O) on every word"
    assert (scores["base"]["f1"], scores["base"]["accuracy"]) == (0, pytest.approx(4 / 7))
    assert set(scores["tuned"]) == {"loss", "f1", "precision", "recall", "accuracy"}
    assert set(scores["difference"]) == {"f1", "precision", "recall", "accuracy"}
    assert scores["difference"]["f1"]["value"] == pytest.approx(scores["tuned"]["f1"])
    assert scores["tuned"]["f1"] > 0.5


@pytest.mark.parametrize("family", ENCODERS)
def test_the_scores_are_those_of_seqeval_on_the_predictions(finished, family):
    run, report = finished(family)
    lines = predictions(run)
    said, wanted = [line["tuned_prediction"] for line in lines], [wanted_tags(line) for line in lines]
    assert [line["tuned"] for line in lines] == [" ".join(tags) for tags in said]
    scores = report["evaluation"]["tuned"]
    for metric, reference in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert scores[metric] == pytest.approx(reference(wanted, said), abs=1e-12)
    pairs = [pair for row in zip(said, wanted, strict=True) for pair in zip(*row, strict=True)]
    assert scores["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    table = report["evaluation"]["details"]["tuned"]["classes"]
    assert [(entry["label"], entry["support"]) for entry in table] == [("COLOUR", len(lines)), ("THING", len(lines))]


def test_the_data_report_counts_entities_by_kind_and_side(finished):
    _, report = finished("bert")
    sides = report["data"]["kept"]
    assert sum(sides.values()) == len(ROWS)
    assert report["data"]["classes"] == {"COLOUR": sides, "THING": sides}


RELOAD = """
import json, sys, torch
from peft import AutoPeftModelForTokenClassification, PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, BitsAndBytesConfig
found = {}
for method, folder in json.loads(sys.argv[1]).items():
    options = {"config": AutoConfig.from_pretrained(folder), "dtype": torch.float32}
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["classifier"],
        )
    if method == "full":
        model = AutoModelForTokenClassification.from_pretrained(folder, **options)
    elif method == "lora":
        labels = options["config"].num_labels
        model = AutoPeftModelForTokenClassification.from_pretrained(folder, num_labels=labels, dtype=torch.float32)
    else:
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        model = PeftModel.from_pretrained(AutoModelForTokenClassification.from_pretrained(base, **options), folder)
    for module in model.modules():  # bitsandbytes' kernel for inference rounds otherwise, and wants other shapes
        module.support_avx512bf16_for_cpu = False
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        said = [model(**tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in json.loads(sys.argv[2])]
    names = options["config"].id2label
    found[method] = {"logits": said, "names": [names[i] for i in range(len(names))]}
assert not any(name.startswith("llmtune") for name in sys.modules)
print(json.dumps(found))
"""


def test_what_was_trained_loads_with_plain_classes_says_the_same_and_knows_its_tags(finished):
    folders = {METHODS[family]: finished(family)[0] for family in ("bert", "roberta", "deberta")}
    paths = {method: str(run / ("weights" if method == "full" else "adapter")) for method, run in folders.items()}
    command = [sys.executable, "-c", RELOAD, json.dumps(paths), json.dumps(ASKED)]
    made = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    plain = json.loads(made.stdout)
    for method, run in folders.items():
        assert plain[method]["names"] == NAMES
        context, place = open_finished(run, quiet(), True)
        processor = load_processor(place, context.recipe.model)
        with Models(context, place, processor).tuned() as model, torch.no_grad():
            for text, logits in zip(ASKED, plain[method]["logits"], strict=True):
                said = model(**processor(text, return_tensors="pt")).logits[0]
                torch.testing.assert_close(torch.tensor(logits), said, rtol=1e-4, atol=1e-4)


def test_a_second_run_is_skipped_and_evaluate_knows_the_labels(finished):
    run, report = finished("bert")
    out = quiet()
    again = run_pipeline(load_recipe(str(run.parent / "recipe.yaml")), Options(out=run), out)
    assert out.file.getvalue().count("unchanged, skipped") == 6
    assert again["evaluation"] == report["evaluation"]
    fewer = recipe_of_run(read_run(run), ["evaluate.metrics=[f1]"])
    tuned = evaluate_run(fewer, run, quiet(), offline=True)["evaluation"]["tuned"]
    assert tuned == {"f1": report["evaluation"]["tuned"]["f1"]}


def test_a_tuned_model_is_a_base_with_a_trained_head_for_the_same_kinds(finished, tmp_path):
    run, report = finished("deberta")
    sections = {"data": {"max_length": 64}, "train": {"num_train_epochs": None, "max_steps": 1, "learning_rate": 1e-9}}
    again = run_recipe(tmp_path, run / "weights", ROWS, **sections)
    assert again["evaluation"]["baseline"] is None
    assert again["evaluation"]["base"]["f1"] == pytest.approx(report["evaluation"]["tuned"]["f1"])
    other = [{**row, "tags": [tag.replace("THING", "BEING") for tag in row["tags"]]} for row in ROWS]
    again = run_recipe(tmp_path / "other", run / "weights", other, **sections)
    assert again["evaluation"]["baseline"] == "the most frequent tag (O) on every word"


@pytest.mark.parametrize("family", ENCODERS)
def test_micro_batches_of_one_give_the_gradient_of_one_batch(built, tmp_path, family):
    rows = [
        {**row, "tokens": row["tokens"] * (i % 3 + 1), "tags": row["tags"] * (i % 3 + 1)} for i, row in enumerate(ROWS)
    ]
    path = recipe_of(tmp_path, built(family), rows, token_classify={"labels": ["COLOUR", "THING"]})
    training = start_training(path, tmp_path / "run")
    loss_one, one = gradient(training, 1)
    loss_all, together = gradient(training, 8 * 128)
    assert loss_one == pytest.approx(loss_all, rel=1e-5)
    torch.testing.assert_close(one, together, rtol=1e-3, atol=1e-6)
    assert together.norm() > 0


def about(max_length=64, labels=("COLOUR", "THING")):
    return Recipe.model_validate(
        {
            "task": "token-classify",
            "data": {"train": "rows.jsonl", "max_length": max_length},
            "model": {"name": "tiny"},
            "token_classify": {"labels": labels},
        }
    )


@pytest.mark.parametrize("family", ENCODERS)
def test_padding_changes_no_loss_and_the_loss_is_that_of_transformers(built, family):
    tokenizer = AutoTokenizer.from_pretrained(built(family))
    torch.manual_seed(1)
    model = AutoModelForTokenClassification.from_pretrained(built(family), num_labels=5).eval()
    rows = [ROWS[0], {"tokens": ["red", "cats"], "tags": ["B-COLOUR", "O"]}]
    examples = [example for (example,) in encode_tags(rows, tokenizer, about())]
    collate = tags_collator(tokenizer, about())
    with torch.no_grad():
        together = tags_loss(model, collate(examples, 0), by_row=True)
        for example, row, found in zip(examples, rows, together.row_sums, strict=True):
            alone = tags_loss(model, collate([example], 0))
            assert alone.count == len(row["tokens"])
            assert float(alone.sum) == pytest.approx(float(found), rel=1e-4)
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.target_ids])
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            assert float(alone.sum) / alone.count == pytest.approx(float(expected), rel=1e-5)
    assert together.count == 9


@pytest.mark.parametrize("family", ENCODERS)
def test_predictions_read_the_ids_of_training(finished, family):
    run, _ = finished(family)
    context, place = open_finished(run, quiet(), True)
    processor = load_processor(place, context.recipe.model)
    rows, reader = load_rows(run / "data" / "rows"), ExampleReader(load_examples(run / "data" / "examples"), "test")
    asked = [
        token_classify.VARIANTS[0].split_answer(row)[0] for row in read_rows(rows, "test", range(rows.counts["test"]))
    ]
    seen = []
    with Models(context, place, processor).tuned() as model, torch.no_grad():
        model.register_forward_pre_hook(lambda module, args, inputs: seen.append(inputs), with_kwargs=True)
        said = predict_tags(model, asked, processor, context.recipe, device="cpu")
    read = {
        tuple(ids[mask > 0].tolist())
        for inputs in seen
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    }
    assert read == {tuple(example.input_ids) for example in reader}
    assert [len(tags) for tags in said] == [len(row["tokens"]) for row in asked]


def test_a_text_longer_than_the_model_reads_gets_a_tag_for_each_word(finished):
    run, _ = finished("bert")
    context, place = open_finished(run, quiet(), True)
    processor = load_processor(place, context.recipe.model)
    words = ROWS[0]["tokens"] * 64
    with Models(context, place, processor).tuned() as model, torch.no_grad():
        (said, dropped) = predict_tags(
            model,
            [{"tokens": words, "tags": []}, {"tokens": ["\N{ZERO WIDTH SPACE}"], "tags": []}],
            processor,
            context.recipe,
            device="cpu",
        )
        (huge,) = predict_tags(model, [{"tokens": ["1" * 999], "tags": []}], processor, context.recipe, device="cpu")
    assert len(processor(" ".join(words))["input_ids"]) > families.LONGEST
    assert len(said) == len(words)
    assert {"B-THING", "B-COLOUR"} <= set(said[-64:])
    assert dropped == ["O"]
    assert len(huge) == 1


def test_labels_are_those_of_the_rows_unless_the_recipe_names_them(built, tmp_path):
    recipe = load_recipe(str(recipe_of(tmp_path, built("bert"), ROWS))).recipe
    config = AutoConfig.from_pretrained(built("bert"))
    run_pipeline(load_recipe(str(tmp_path / "recipe.yaml")), Options(out=tmp_path / "run", until="prepare"), quiet())
    rows = load_rows(tmp_path / "run" / "data" / "rows")
    assert token_classify.VARIANTS[0].infer_labels(recipe, rows, config).token_classify.labels == ("COLOUR", "THING")
    named = Recipe.model_validate({**recipe.model_dump(), "token_classify": {"labels": ["THING", "COLOUR", "PLACE"]}})
    assert token_classify.VARIANTS[0].infer_labels(named, rows, config).token_classify.labels == (
        "THING",
        "COLOUR",
        "PLACE",
    )
    config.id2label = dict(enumerate(["O", "B-THING", "I-THING", "B-COLOUR", "I-COLOUR"]))
    assert token_classify.VARIANTS[0].infer_labels(recipe, rows, config).token_classify.labels == (
        "THING",
        "COLOUR",
    )  # the model's order


@pytest.mark.parametrize(
    ("row", "section", "said"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, None, "2 tokens and 1 tags"),
        ({"tokens": ["a"], "tags": [3]}, None, "numbers need their names"),
        ({"tokens": ["a", "b"], "tags": ["B-PLACE", "O"]}, {"labels": ["THING", "COLOUR"]}, "label unknown: 'B-PLACE'"),
        ({"tokens": ["a", "\N{ZERO WIDTH SPACE}"], "tags": ["O", "O"]}, None, "makes nothing of the word"),
        ({"tokens": ["a"] * 99, "tags": ["O"] * 99}, None, "101 tokens, data.max_length is 64"),
    ],
)
def test_rows_that_cannot_be_used_are_named_with_their_line(built, tmp_path, row, section, said):
    sections = {"data": {"max_length": 64, "test": 0, "validation": 0}}
    if section:
        sections["token_classify"] = section
    with pytest.raises(DataError) as caught:
        run_recipe(tmp_path, built("bert"), [*ROWS[:5], row], **sections)
    assert caught.value.exit_code == 3
    assert "rows.jsonl:6" in str(caught.value)
    assert said in str(caught.value)


def test_rows_without_any_entity_are_refused(built, tmp_path):
    rows = [{"tokens": row["tokens"], "tags": ["O"] * 7} for row in ROWS]
    with pytest.raises(DataError, match="no row has an entity"):
        run_recipe(tmp_path, built("bert"), rows)


def test_an_encoder_decoder_is_refused_by_name(built):
    with pytest.raises(RecipeError, match="which needs AutoModelForTokenClassification") as caught:
        choose_variant(about(), AutoConfig.from_pretrained(built("bart")), "this model")
    assert caught.value.exit_code == 2


def test_a_task_says_its_rows_for_people():
    task, row = get_task("token-classify"), ROWS[0]
    prompt, answer = task.split_answer(row)
    assert prompt == {"tokens": row["tokens"], "tags": []}
    assert answer == "quick cat (THING), red (COLOUR)"
    assert task.split_answer({**row, "tags": ["O"] * 7})[1] == "(none)"
    assert task.reference(row) == row["tags"]
    assert task.make_row({"prompt": "Ada (1815)"}) == {"tokens": ["Ada", "(", "1815", ")"], "tags": []}
    assert task.format_answer(row["tags"], row) == answer
