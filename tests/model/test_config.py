"""New and trained heads: named, distinguished, seeded, never in 4 bits, never given a LoRA."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import families
from support.adapting import open_model, quiet
from support.classifying import BUILDERS
from support.training import with_methods
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
)

from llmtune.adapter.injection import inject
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.config import (
    OTHER_CLASSES,
    OTHER_ORDER,
    head_is_new,
    head_names,
    in_heads,
    name_outputs,
    put_in_order,
    read_model_config,
    why_headless,
)
from llmtune.model.resolve import resolve_model
from llmtune.recipe.model_kind import CLASSES
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel
from llmtune.tasks.registry import choose_variant, get_task

HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "deberta": ["pooler", "classifier"],
    "modernbert": ["head", "classifier"],
    "llama": ["score"],
    "gpt2": ["score"],
}
CLASSIFY = get_task("classify")


def recipe_of(folder: Path, labels: tuple[str, ...] = ("a", "b", "c"), seed: int = 42, **adapter: Any) -> Recipe:
    kind = {"kind": "single", "labels": labels} if labels else {"kind": "regression"}
    content = {"task": "classify", "seed": seed, "data": {"train": "x.jsonl"}, "classify": kind}
    content["model"] = {"name": str(folder), "dtype": "float32"}
    content["adapter"] = adapter
    return Recipe.model_validate(content)


def adapt(recipe: Recipe) -> AdaptedModel:
    return inject(open_model(recipe), recipe, quiet())


def is_new(recipe: Recipe) -> bool:
    return head_is_new(resolve_model(str(recipe.model.name), recipe.model, quiet()), recipe, CLASSIFY)


def save_classifier(folder: Path, source: Path, names: list[str], seed: int = 1) -> Path:
    """Save a model with a head for `names`, as another tool would."""
    torch.manual_seed(seed)
    named = {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(source, **named)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("own", "names", "other", "order"),
    [
        (("x", "y"), ("x", "y"), False, None),
        (("x", "y"), ("y", "x"), False, [1, 0]),
        (("x", "y"), ("x", "z"), True, None),
        (("x", "y"), ("x", "y", "z"), True, None),
        (("LABEL_0", "LABEL_1"), ("x", "y"), True, None),
        (("NEGATIVE", "POSITIVE"), ("negative", "positive"), False, None),
        (("NEGATIVE", "POSITIVE"), ("positive", "negative"), False, [1, 0]),
        (("NEGATIVE", "POSITIVE"), ("0", "1"), False, None),  # numbers are those of the outputs
        (("LABEL_0", "LABEL_1"), ("1", "0"), False, [1, 0]),
        (("1", "0"), ("0", "1"), False, [1, 0]),  # the names, not the places
        (("NEGATIVE", "POSITIVE"), ("1", "2"), True, None),
        (("a", "A"), ("A", "b"), True, None),
        (("a", "A"), ("A", "a"), False, [1, 0]),
        (("O", "B-PER", "I-PER"), ("O", "B-per", "I-per"), False, None),
        (("LABEL_0",), ("value",), False, None),  # a number needs no name
    ],
)
def test_outputs_are_named_and_a_head_for_other_or_reordered_classes_is_recognized(own, names, other, order):
    config = BertConfig(id2label=dict(enumerate(own)), label2id={name: k for k, name in enumerate(own)})
    name_outputs(config, names, "single_label_classification")
    assert (config.num_labels, config.problem_type) == (len(names), "single_label_classification")
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: k for k, name in enumerate(names)}
    assert getattr(config, OTHER_CLASSES) is other
    assert getattr(config, OTHER_ORDER) == order


def test_a_head_with_the_same_classes_reordered_predicts_the_same_for_each(tmp_path):
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        id2label={0: "x", 1: "y", 2: "z"},
        label2id={"x": 0, "y": 1, "z": 2},
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = dict(zip("xyz", model(input_ids=ids).logits[0].tolist(), strict=True))
        name_outputs(config, ("z", "x", "y"), None)
        put_in_order(model, ["classifier"], getattr(config, OTHER_ORDER))
        after = dict(zip("zxy", model(input_ids=ids).logits[0].tolist(), strict=True))
    assert after == pytest.approx(before)


@pytest.mark.parametrize(
    ("task", "section", "own", "why"),
    [
        ("classify", {"kind": "single", "labels": ["negative", "positive"]}, ["NEGATIVE", "POSITIVE"], ""),
        ("classify", {"kind": "single", "labels": ["0", "1"]}, ["LABEL_0", "LABEL_1"], ""),
        ("classify", {"kind": "multi", "labels": ["a", "b"]}, ["A", "B"], ""),
        ("classify", {"kind": "single", "labels": ["bad", "good"]}, ["no", "yes"], "{no, yes}.*{bad, good}"),
        ("classify", {"kind": "regression"}, ["no", "yes"], "{no, yes}.*{value}"),
        ("classify", {"kind": "single", "labels": ["bad", "good"]}, None, "no trained head"),
        ("classify", {"kind": "single", "labels": ["0", "1"]}, None, "no trained head"),  # unnamed by default
        ("token-classify", {"labels": ["per"]}, ["O", "B-PER", "I-PER"], ""),
        ("token-classify", {"labels": ["org"]}, ["O", "B-PER", "I-PER"], "{O, B-PER, I-PER}.*{O, B-org, I-org}"),
        ("token-classify", {"labels": ["org"]}, None, "no trained head"),
        ("rerank", {}, ["no", "yes"], "{no, yes}.*{relevance}"),
        ("rerank", {}, ["LABEL_0", "LABEL_1"], "{LABEL_0, LABEL_1}.*{relevance}"),
        ("rerank", {}, ["score"], ""),
        ("preference", {"loss": "reward"}, ["no", "yes"], "{no, yes}.*{reward}"),
        ("qa", {}, None, "no trained head"),
    ],
)
def test_a_head_that_is_replaced_is_named_with_its_classes(task, section, own, why, built, tmp_path):
    folder = built("bert")
    if own:
        families.build_bert(tmp_path)  # its tokenizer
        kind = AutoModelForTokenClassification if task == "token-classify" else AutoModelForSequenceClassification
        kind.from_pretrained(folder, id2label=dict(enumerate(own))).save_pretrained(tmp_path)
        folder = tmp_path
    content = {"task": task, "data": {"train": "x.jsonl"}, "model": {"name": str(folder), "dtype": "float32"}}
    recipe = Recipe.model_validate(content | ({task.replace("-", "_"): section} if section else {}))
    place = resolve_model(str(folder), recipe.model, quiet())
    variant = choose_variant(recipe, read_model_config(place, recipe.model), "bert")
    reason = why_headless(place, recipe, variant)
    assert re.search(why, reason)
    assert bool(reason) == bool(why)
    assert why == "no trained head" or "no trained head" not in reason


@pytest.mark.parametrize("family", BUILDERS)
def test_a_new_head_is_found_fully_trained_without_lora_and_the_model_knows_the_padding(built, family):
    recipe = recipe_of(built(family), r=4)
    assert is_new(recipe)
    adapted = adapt(recipe)
    selected = adapted.selected
    assert selected.model.config.pad_token_id == selected.processor.pad_token_id is not None
    heads = head_names(selected.model)
    assert heads == HEADS[family]
    assert adapted.matched_modules
    assert not [name for name in adapted.matched_modules if in_heads(name.removeprefix("base_model.model."), heads)]
    trained = [name for name, p in adapted.model.named_parameters() if p.requires_grad and ".lora_" not in name]
    copies = {name.partition(".modules_to_save.")[0].rpartition("base_model.model.")[2] for name in trained}
    assert set(heads) <= copies
    assert all(".modules_to_save." in name for name in trained)


def test_a_pooling_layer_is_fully_trained_if_the_files_lack_it_and_otherwise_gets_a_lora(built, tmp_path):
    new = adapt(recipe_of(built("bert"), r=4))
    assert "bert.pooler.dense.weight" in new.selected.new_weights
    trained = [name for name, p in new.model.named_parameters() if p.requires_grad and "pooler" in name]
    assert trained
    assert all("pooler.dense.modules_to_save" in name for name in trained)
    families.build_bert(tmp_path)
    save_classifier(tmp_path, built("bert"), ["a", "b", "c"])
    known = adapt(recipe_of(tmp_path, r=4))
    assert known.selected.new_weights == ()
    assert [name for name in known.matched_modules if name.endswith("pooler.dense")]


@pytest.mark.parametrize("family", BUILDERS)
def test_new_layers_are_never_in_4_bits_and_learn(built, family):
    adapted = adapt(recipe_of(built(family), method="qlora", r=4))
    model = adapted.selected.model
    quantized = [n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"]
    assert quantized
    new = {name.rpartition(".")[0] for name in adapted.selected.new_weights}
    assert not [n for n in quantized if in_heads(n.removesuffix(".base_layer"), [*head_names(model), *new])]
    found = [p for n, p in adapted.model.named_parameters() if ".modules_to_save." in n]
    assert {p.dtype for p in found} == {torch.float32}
    assert all(p.requires_grad for p in found)


def test_a_target_that_is_a_head_is_refused_by_name(built):
    with pytest.raises(RecipeError, match="'classifier' is a head: it is fully trained"):
        adapt(recipe_of(built("bert"), r=4, target_modules=["query", "classifier"]))
    with pytest.raises(RecipeError, match="'out_proj' is a head"):
        adapt(recipe_of(built("roberta"), r=4, target_modules=["out_proj"]))
    body = adapt(recipe_of(built("roberta"), r=4, target_modules=["dense"]))  # an ending that the head has too
    assert len(body.matched_modules) == 6
    assert not [name for name in body.matched_modules if "classifier" in name]


@pytest.mark.parametrize("family", ["bert", "deberta", "llama"])
def test_a_new_heads_weights_depend_only_on_the_seed(built, family):
    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed)  # what was drawn before does not matter
        selected = open_model(recipe_of(built(family), seed=seed))
        state = selected.model.state_dict()
        return {name: state[name] for name in selected.new_weights}

    one, again, other = start(1), start(1), start(2)
    assert one.keys() == again.keys() == other.keys() != set()
    assert all(torch.equal(one[name], again[name]) for name in one)
    drawn = [name for name in one if one[name].dim() > 1]
    assert drawn
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_head_trained_for_these_classes_is_the_base_and_one_for_others_is_reset(built, tmp_path, family):
    BUILDERS[family](tmp_path)
    save_classifier(tmp_path, built(family), ["a", "b", "c"])
    head = f"{HEADS[family][0]}.weight"
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path).state_dict()[head]
    same = recipe_of(tmp_path)
    assert not is_new(same)
    kept = open_model(same)
    assert kept.new_weights == ()
    assert torch.equal(kept.model.state_dict()[head], stored)
    for labels in (("a", "b", "x"), ("a", "b"), ("a", "b", "c", "d"), ()):
        other = recipe_of(tmp_path, labels)
        assert is_new(other)
        drawn = open_model(other)
        assert head in drawn.new_weights
        weights = drawn.model.state_dict()[head]
        assert len(weights) == max(1, len(labels))
        assert not any(torch.equal(row, old) for row in weights for old in stored)
        assert weights.std() < 0.1
        assert torch.equal(open_model(other).model.state_dict()[head], weights)


def test_a_reinitialized_head_has_norms_of_one_and_biases_of_zero(built, tmp_path):
    families.build_modernbert(tmp_path)
    save_classifier(tmp_path, built("modernbert"), ["x", "y", "z"])
    state = open_model(recipe_of(tmp_path)).model.state_dict()
    assert torch.equal(state["head.norm.weight"], torch.ones(64))
    assert torch.equal(state["classifier.bias"], torch.zeros(3))


def test_a_missing_weight_of_the_body_is_not_a_new_head(built, tmp_path):
    families.build_bert(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EnvironmentProblem, match=r"bert\.encoder\.layer\.0\.output\.dense\.weight"):
        open_model(recipe_of(tmp_path))


def test_a_task_without_its_own_head_has_no_new_head(built):
    headless = with_methods(CLASSIFY, model_kind=replace(CLASSES, has_head=False))
    place = resolve_model(str(built("llama")), recipe_of(built("llama")).model, quiet())
    assert not head_is_new(place, recipe_of(built("llama")), headless)
