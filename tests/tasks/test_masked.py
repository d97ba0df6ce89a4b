"""Completion with `objective: masked`: encoders predict masked words."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import pairs
from support.adapting import quiet
from support.variants import MASKED, predict
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM, BertModel

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.plan import open_finished
from llmtune.recipe.schema import Recipe
from llmtune.run_models import Models
from llmtune.tasks.registry import choose_variant

THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone")
ROWS = [
    {"text": f"The quick {thing} is {colour}. The sky is {colour}, and a {thing} has four legs."}
    for thing in THINGS
    for colour in ("red", "green", "blue", "black", "white")
]


def run_recipe(folder, model, rows=ROWS, **sections):
    return pairs.run_recipe(folder, model, rows, "completion", **described(sections))


def described(sections):
    completion = {"objective": "masked", "mask_probability": 0.3, **sections.pop("completion", {})}
    return {"completion": completion, "generation": {"max_new_tokens": None}, "data": {"max_length": 64}, **sections}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, built):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("finished")
    train = {"num_train_epochs": 3, "learning_rate": 2e-2}
    run_recipe(folder, built("modernbert"), adapter={"r": 16}, train=train)
    return folder / "run"


def test_different_words_are_masked_in_every_training_step(built, tmp_path):
    """One repeated row: if all steps drew the same masks, the loss would be constant at learning rate zero."""
    sections = {"data": {"max_length": 64, "validation": 0, "test": 0}, "evaluate": {"metrics": None}}
    train = {"num_train_epochs": None, "max_steps": 4, "learning_rate": 1e-12, "batch_size": 1}
    run_recipe(tmp_path, built("bert"), ROWS[:1], train=train, **sections)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(set(losses)) == len(losses) == 4


def test_evaluation_masks_the_same_words_whatever_the_seed(built):
    """Further seeds and champions are compared on them, and reuse the base's answers."""
    processor = AutoTokenizer.from_pretrained(built("bert"))
    recipes = [recipe_for_seed(seed) for seed in (7, 8)]
    text = {"prompt": "The quick brown fox jumps over the lazy dog. " * 4, "completion": ""}
    (example,) = MASKED.encode_row(text, processor, recipes[0])
    shown = {
        draw: [MASKED.collate([example], processor, one, False, draw)["predict_S"].tolist() for one in recipes]
        for draw in (0, 1)
    }
    assert shown[0][0] == shown[0][1] != shown[1][0]
    assert shown[1][0] != shown[1][1], "training depends on the seed"


def recipe_for_seed(seed):
    data = {"train": "rows.jsonl", "max_length": 64}
    completion = {"objective": "masked", "mask_probability": 0.3}
    return Recipe.model_validate(
        {"task": "completion", "seed": seed, "data": data, "model": {"name": "m"}, "completion": completion}
    )


# Filling in


def test_masks_in_a_text_are_filled_and_other_texts_are_unchanged(finished):
    context = open_finished(finished, quiet(), True)
    processor = context.plan.processor
    texts = [f"The quick {processor.mask_token} is red.", "The quick fox is red. ", ""]
    with Models(context).tuned() as model, torch.no_grad():
        rows = [MASKED.make_row({"prompt": text}) for text in texts]
        filled, whole, nothing = predict(MASKED, model, rows, processor, context.plan.recipe)
        logits = model(**processor(texts[0], return_tensors="pt")).logits[0]
    ids = processor(texts[0])["input_ids"]
    ids[ids.index(processor.mask_token_id)] = int(logits[ids.index(processor.mask_token_id)].argmax())
    assert filled == processor.decode(ids, skip_special_tokens=True)
    assert (whole, nothing) == (texts[1], "")


def test_masks_beyond_the_maximum_length_are_unchanged(finished):
    context = open_finished(finished, quiet(), True)
    processor = context.plan.processor
    text = f"The quick {processor.mask_token} is red. " * 40
    with Models(context).tuned() as model, torch.no_grad():
        (said,) = predict(MASKED, model, [MASKED.make_row({"prompt": text})], processor, context.plan.recipe)
    left = said.count(processor.mask_token)
    assert 0 < left < 40
    assert said.endswith(f" {processor.mask_token} is red. ")
    assert said.count("is red.") == 40


# Refused models


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
    recipe = {"task": "completion", "data": {"train": "rows.jsonl"}, "model": {"name": "tiny"}}
    causal = choose_variant(Recipe.model_validate(recipe), AutoConfig.from_pretrained(tiny_llama), "")
    assert causal.model_kind.auto_class == "AutoModelForCausalLM"


def test_a_head_whose_weights_are_missing_does_not_start_at_random(built, tmp_path):
    folder = tmp_path / "bert"
    BertForMaskedLM.from_pretrained(built("bert")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(built("bert")).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("cls.predictions.transform.dense")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EnvironmentProblem, match="2 weights are missing in the files, such as cls"):
        run_recipe(tmp_path, folder)
