"""Completion with `objective: masked`: hidden words are guessed by encoders."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import families, pairs
from support.adapting import quiet
from support.pairs import gradient
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM, BertModel

from llmtune.adapter import inject
from llmtune.data.examples import ExampleReader, load_examples
from llmtune.data.label_encoding import encode_masked
from llmtune.data.target_collators import masked_collator
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.task_predictions import fill_masks
from llmtune.model import causal_loss, load_model, load_processor, resolve_model
from llmtune.pipeline import evaluate_run, run_pipeline
from llmtune.recipe import Recipe, load_recipe
from llmtune.session import Models, Options, open_finished
from llmtune.store.run_folder import read_run, recipe_of_run
from llmtune.tasks import VARIANTS, choose_variant
from llmtune.train.setup import set_up

ENCODERS = ("bert", "roberta", "deberta", "modernbert")
METHODS = {"bert": "lora", "roberta": "qlora", "deberta": "full", "modernbert": "lora"}
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone")
ROWS = [
    {"text": f"The quick {thing} is {colour}. The sky is {colour}, and a {thing} has four legs."}
    for thing in THINGS
    for colour in ("red", "green", "blue", "black", "white")
]
MASKED = VARIANTS["completion"][1]


def run_recipe(folder, model, rows=ROWS, **sections):
    return pairs.run_recipe(folder, model, rows, "completion", **described(sections))


def described(sections):
    completion = {"objective": "masked", "mask_probability": 0.3, **sections.pop("completion", {})}
    return {"completion": completion, "generation": {"max_new_tokens": None}, "data": {"max_length": 64}, **sections}


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
            adapter = {"method": "full"} if family == "deberta" else {"method": METHODS[family], "r": 16}
            train = {"num_train_epochs": 6, "learning_rate": 3e-3 if family == "deberta" else 2e-2}
            sections = {"adapter": adapter, "train": train}
            runs[family] = folder / "run", run_recipe(folder, built(family), **sections)
        return runs[family]

    return run


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_learns_to_guess_hidden_words(finished, family):
    run, report = finished(family)
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1]["loss"] < 0.95 * curve[0]["loss"]
    scores = report["evaluation"]
    assert scores["baseline"] is None
    assert (
        set(scores["base"]) == set(scores["tuned"]) == set(scores["difference"]) == {"loss", "perplexity", "accuracy"}
    )
    assert scores["tuned"]["loss"] < scores["base"]["loss"]
    assert scores["tuned"]["accuracy"] > scores["base"]["accuracy"]


def test_base_and_tuned_guess_the_same_words_and_a_second_evaluation_too(finished):
    run, report = finished("bert")
    context, place = open_finished(run, quiet(), True)
    processor = load_processor(place, context.recipe.model)
    reader = ExampleReader(load_examples(run / "data" / "examples"), "test")
    batch = MASKED.collator(processor, context.recipe)(list(reader), 0)
    models = Models(context, place, processor)
    for name, context in (("base", models.base), ("tuned", models.tuned)):
        with context() as model, torch.no_grad():
            loss = causal_loss(model, batch, by_row=True)
        assert float(loss.sum) / loss.count == pytest.approx(report["evaluation"][name]["loss"], rel=1e-5)
        assert float(loss.correct) / loss.count == pytest.approx(report["evaluation"][name]["accuracy"])
    fewer = recipe_of_run(read_run(run), ["evaluate.metrics=[loss]"])
    again = evaluate_run(fewer, run, quiet(), offline=True)["evaluation"]
    assert again["tuned"] == {"loss": pytest.approx(report["evaluation"]["tuned"]["loss"])}


def test_a_second_run_is_skipped(finished):
    run, report = finished("modernbert")
    out = quiet()
    again = run_pipeline(load_recipe(str(run.parent / "recipe.yaml")), Options(out=run), out)
    assert out.file.getvalue().count("unchanged, skipped") == 6
    assert again["evaluation"] == report["evaluation"]


RELOAD = """
import json, sys, torch
from peft import AutoPeftModel
from transformers import AutoModelForMaskedLM, AutoTokenizer, BitsAndBytesConfig
found = {}
for method, folder in json.loads(sys.argv[1]).items():
    options = {"dtype": torch.float32}
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["lm_head"],
        )
    loader = AutoModelForMaskedLM if method == "full" else AutoPeftModel
    model = loader.from_pretrained(folder, **options).eval()
    for module in model.modules():  # bitsandbytes' kernel for inference rounds otherwise, and wants other shapes
        module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        ids = tokenizer(f"The quick fox is {tokenizer.mask_token}.", return_tensors="pt")
        found[method] = model(**ids).logits[0].tolist()
assert not any(name.startswith("llmtune") for name in sys.modules)
print(json.dumps(found))
"""


def test_what_was_trained_loads_with_plain_classes_and_says_the_same(finished):
    folders = {METHODS[family]: finished(family)[0] for family in ("bert", "roberta", "deberta")}
    paths = {method: str(run / ("weights" if method == "full" else "adapter")) for method, run in folders.items()}
    command = [sys.executable, "-c", RELOAD, json.dumps(paths)]
    made = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    plain = json.loads(made.stdout)
    for method, run in folders.items():
        context, place = open_finished(run, quiet(), True)
        processor = load_processor(place, context.recipe.model)
        text = f"The quick fox is {processor.mask_token}."
        with Models(context, place, processor).tuned() as model, torch.no_grad():
            said = model(**processor(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(torch.tensor(plain[method]), said, rtol=1e-4, atol=1e-3)


def masked_recipe(max_length=64, on_overlong="error", **section):
    return Recipe.model_validate(
        {
            "task": "completion",
            "data": {"train": "rows.jsonl", "max_length": max_length, "on_overlong": on_overlong},
            "model": {"name": "tiny"},
            "completion": {"objective": "masked", **section},
        }
    )


@pytest.mark.parametrize("family", ENCODERS)
def test_the_loss_is_that_of_the_model_on_the_same_hidden_words_and_padding_changes_nothing(built, family):
    tokenizer = AutoTokenizer.from_pretrained(built(family))
    model = AutoModelForMaskedLM.from_pretrained(built(family)).eval()
    about = masked_recipe(mask_probability=0.4)
    rows = [{"prompt": "", "completion": text} for text in (ROWS[0]["text"], "A fox and a dog and a cat.")]
    examples = [example for (example,) in encode_masked(rows, tokenizer, about)]
    collate = masked_collator(tokenizer, about)
    batch = collate(examples, 3)
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["predict_S"]] = batch["targets_S"]
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        together = causal_loss(model, batch, by_row=True)
        assert float(together.sum) / together.count == pytest.approx(float(expected), rel=1e-5)
        for example, found in zip(examples, together.row_sums, strict=True):
            alone = causal_loss(model, collate([example], 3))
            assert alone.count == example.supervised
            assert float(alone.sum) == pytest.approx(float(found), rel=1e-4)


@pytest.mark.parametrize("family", ENCODERS)
def test_micro_batches_of_one_give_the_gradient_of_one_batch(built, tmp_path, family):
    rows = [{"text": row["text"][: 30 + 7 * (i % 6)]} for i, row in enumerate(ROWS)]
    path = pairs.recipe_of(tmp_path, built(family), rows, "completion", **described({}))
    loaded = load_recipe(str(path))
    run_pipeline(loaded, Options(out=tmp_path / "run", until="prepare"), quiet())
    place = resolve_model(loaded.recipe.model.name, loaded.recipe.model, quiet(), True)
    processor = load_processor(place, loaded.recipe.model)
    selected = load_model(place, loaded.recipe, MASKED, processor, device="cpu", training=True)
    adapted, examples = inject(selected, loaded.recipe, quiet()), load_examples(tmp_path / "run" / "data" / "examples")
    training = set_up(adapted, examples, MASKED, loaded.recipe, tmp_path / "run", quiet(), "inputs")
    loss_one, one = gradient(training, 1)
    loss_all, together = gradient(training, 8 * 64)
    assert loss_one == pytest.approx(loss_all, rel=1e-5)
    torch.testing.assert_close(one, together, rtol=1e-3, atol=1e-6)
    assert together.norm() > 0


def test_other_words_are_hidden_in_every_step_of_training(built, tmp_path):
    """One row, again and again: without a step of its own each draw would give the same loss at a rate of zero."""
    sections = {"data": {"max_length": 64, "validation": 0, "test": 0}, "evaluate": {"metrics": None}}
    train = {"num_train_epochs": None, "max_steps": 4, "learning_rate": 1e-12, "batch_size": 1}
    run_recipe(tmp_path, built("bert"), ROWS[:1], train=train, **sections)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(set(losses)) == len(losses) == 4


# Filling in


@pytest.mark.parametrize("family", ENCODERS)
def test_masks_in_a_text_are_filled_and_other_texts_come_back(finished, family):
    run, _ = finished(family)
    context, place = open_finished(run, quiet(), True)
    processor = load_processor(place, context.recipe.model)
    texts = [f"The quick {processor.mask_token} is red.", "The quick fox is red. ", ""]
    with Models(context, place, processor).tuned() as model, torch.no_grad():
        rows = [MASKED.make_row({"prompt": text}) for text in texts]
        filled, whole, nothing = fill_masks(model, rows, processor, context.recipe, device="cpu")
        logits = model(**processor(texts[0], return_tensors="pt")).logits[0]
    ids = processor(texts[0])["input_ids"]
    ids[ids.index(processor.mask_token_id)] = int(logits[ids.index(processor.mask_token_id)].argmax())
    assert filled == processor.decode(ids, skip_special_tokens=True)
    assert (whole, nothing) == (texts[1], "")


def test_behind_the_longest_text_that_is_read_masks_come_back_as_they_are(finished):
    run, _ = finished("modernbert")
    context, place = open_finished(run, quiet(), True)
    processor = load_processor(place, context.recipe.model)
    text = f"The quick {processor.mask_token} is red. " * 40
    with Models(context, place, processor).tuned() as model, torch.no_grad():
        (said,) = fill_masks(model, [MASKED.make_row({"prompt": text})], processor, context.recipe, device="cpu")
    left = said.count(processor.mask_token)
    assert 0 < left < 40
    assert said.endswith(f" {processor.mask_token} is red. ")
    assert said.count("is red.") == 40


# What is refused


def test_a_decoder_and_an_encoder_without_its_head_are_refused(built, tiny_llama, tmp_path):
    def refusal(folder):
        with pytest.raises(RecipeError) as caught:
            run_recipe(tmp_path / folder.name / "run-of-it", folder)
        assert caught.value.exit_code == 2
        return str(caught.value)

    said = refusal(tiny_llama)
    assert "is a LlamaForCausalLM: it cannot be used for the task completion, which needs AutoModelForMaskedLM" in said
    assert "Name an encoder with its masked-token head" in said
    bare = tmp_path / "bare"
    BertModel.from_pretrained(built("bert"), add_pooling_layer=False).save_pretrained(bare)
    AutoTokenizer.from_pretrained(built("bert")).save_pretrained(bare)
    assert "is a BertModel: it cannot be used for the task completion" in refusal(bare)
    causal = choose_variant(
        masked_recipe().model_copy(update={"completion": None}), AutoConfig.from_pretrained(tiny_llama), ""
    )
    assert causal.auto_class == "AutoModelForCausalLM"


def test_a_head_whose_weights_are_missing_does_not_start_at_random(built, tmp_path):
    folder = tmp_path / "bert"
    BertForMaskedLM.from_pretrained(built("bert")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(built("bert")).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("cls.predictions.transform.dense")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EnvironmentProblem, match="2 weights are missing in the files, cls"):
        run_recipe(tmp_path, folder)


def check_recipe(tmp_path, **sections):
    text = {"recipe_version": 1, "name": "t", "task": "completion", "model": {"name": "x/y"}}
    text |= {"data": {"train": "rows.jsonl", "test": 0.1}, "completion": {"objective": "masked"}}
    for name, section in sections.items():
        text[name] = {**text.get(name, {}), **section}
    (tmp_path / "recipe.yaml").write_text(json.dumps(text))
    return load_recipe(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("metric", ["bits_per_byte", "exact_match", "chrf", "choice_accuracy"])
def test_metrics_that_masked_tokens_do_not_have_are_refused_with_those_they_have(tmp_path, metric):
    with pytest.raises(RecipeError) as caught:
        check_recipe(tmp_path, evaluate={"metrics": ["loss", metric]})
    assert f"'{metric}' cannot be measured with completion.objective: masked" in str(caught.value)
    assert "What can be: loss, perplexity, accuracy." in str(caught.value)


def test_the_task_s_own_choice_of_metrics_leaves_them_out(tmp_path):
    loaded = check_recipe(tmp_path)
    assert loaded.recipe.evaluate.metrics == ("loss", "perplexity", "accuracy")
    text = loaded.to_yaml()
    (tmp_path / "again.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "again.yaml")).recipe == loaded.recipe
    with pytest.raises(RecipeError, match="about a metric that is not computed"):
        check_recipe(tmp_path, evaluate={"gates": ["bits_per_byte < base"]})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"generation": {"num_beams": 2}}, "'generation.num_beams' has no effect"),
        (
            {"completion": {"objective": "causal", "mask_probability": 0.2}},
            "'completion.mask_probability' has no effect",
        ),
    ],
)
def test_keys_without_effect_are_refused(tmp_path, sections, said):
    with pytest.raises(RecipeError) as caught:
        check_recipe(tmp_path, **sections)
    assert said in str(caught.value)
