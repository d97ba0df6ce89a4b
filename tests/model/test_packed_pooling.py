"""Encoders with heads give packed texts the same result as single ones; otherwise rows are padded, with a note."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import families
from support.adapting import open_model, quiet, task_for
from support.models import build_llama
from transformers import AutoModelForSequenceClassification

from llmtune.adapter.injection import enable_checkpointing, inject
from llmtune.model.packed_attention import LENGTHS, PACKED, first_tokens, install_packed, means, pool_documents
from llmtune.model.self_checks import isolates_documents
from llmtune.recipe.schema import Recipe
from llmtune.tasks.class_targets import ClassExample

SECTIONS: dict[str, dict[str, Any]] = {
    "classify": {"classify": {"kind": "single", "labels": ["a", "b", "c"]}},
    "token-classify": {"token_classify": {"labels": ["PLACE", "NAME"]}},
    "qa": {"qa": {"style": "extractive"}},
    "completion": {"completion": {"objective": "masked"}},
}


def recipe_of(folder: Path, task: str, **sections: dict[str, Any]) -> Recipe:
    content: dict[str, Any] = {"task": task, "data": {"train": "/nowhere.jsonl"}, **SECTIONS.get(task, {})}
    content["model"] = {"name": str(folder), "dtype": "float32", **sections.pop("model", {})}
    content["data"] |= sections.pop("data", {})
    return Recipe.model_validate(content | sections)


@pytest.mark.parametrize("task", SECTIONS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
def test_encoders_pass_the_packing_check(built, family, task, console):
    selected = open_model(recipe_of(built(family), task), console=console)
    assert selected.packs
    assert selected.model.config._attn_implementation == PACKED
    assert "padded" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("build", "task", "reason"),
    [
        (families.build_deberta, "classify", "DebertaV2ForSequenceClassification does not use transformers' attention"),
        (families.build_deberta, "completion", "DebertaV2ForMaskedLM does not use transformers' attention interface"),
        (families.build_t5, "translate", "the model has an encoder and a decoder"),
        (build_llama, "classify", "a decoder reads a text's class at its last token"),
    ],
)
def test_rows_of_other_models_are_padded_with_a_note(tmp_path, build, task, reason, console):
    selected = open_model(recipe_of(build(tmp_path), task), console=console)
    assert not selected.packs
    assert selected.model.config._attn_implementation != PACKED
    said = " ".join(console.file.getvalue().split())
    assert f"Rows are padded, in batches of similar length, because {reason}" in said
    console.file.truncate(0)
    open_model(recipe_of(tmp_path, task, data={"packing": False}), console=console)
    assert "padded" not in console.file.getvalue()


def test_rows_are_padded_if_the_recipe_says_so_or_requests_another_attention(built, console):
    folder = built("bert")
    assert not open_model(recipe_of(folder, "classify", data={"packing": False}), console=console).packs
    assert console.file.getvalue() == ""
    selected = open_model(recipe_of(folder, "classify", model={"attn_implementation": "eager"}), console=console)
    assert not selected.packs
    assert "because model.attn_implementation requests another attention" in console.file.getvalue()


def load(folder: Path, **config: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=PACKED, **config).eval()


@pytest.mark.parametrize("pools", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_the_check_fails_without_pooling_by_document(built, family, pools):
    model = load(built(family), num_labels=3)
    install_packed(model)
    if pools:
        pool_documents(model)
    assert isolates_documents(model, torch.float32, decodes=False) == pools


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_the_check_fails_if_documents_see_one_another(built, family):
    model = load(built(family), num_labels=3)
    pool_documents(model)
    whole = model.base_model.register_forward_pre_hook(  # as if the lengths got lost on the way
        lambda module, args, kwargs: (args, {**kwargs, LENGTHS: [sum(kwargs[LENGTHS])]}) if LENGTHS in kwargs else None,
        with_kwargs=True,
    )
    install_packed(model)
    assert not isolates_documents(model, torch.float32, decodes=False)
    whole.remove()
    assert isolates_documents(model, torch.float32, decodes=False)


@pytest.mark.parametrize("given", [64, 12])
def test_the_check_fails_with_a_window_other_than_the_models_own(tmp_path, given):
    """The check's documents are longer than the window."""
    model = load(families.build_modernbert(tmp_path, local_attention=64), num_labels=3)
    install_packed(model)
    pool_documents(model)
    for layer in model.model.layers:
        if layer.attn.sliding_window is not None:
            layer.attn.sliding_window = given // 2 + 1
    assert isolates_documents(model, torch.float32, decodes=False) == (given == 64)


def test_first_tokens_and_means_equal_those_of_each_document():
    hidden_1TH = torch.arange(12.0).reshape(1, 6, 2)
    assert first_tokens(hidden_1TH, [1, 3, 2]).tolist() == [[[0, 1]], [[2, 3]], [[8, 9]]]
    assert means(hidden_1TH, [1, 3, 2]).tolist() == [[[0, 1]], [[4, 5]], [[9, 10]]]


@pytest.mark.parametrize("task", ["classify", "token-classify", "qa"])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_documents_stay_separate_within_an_adapter(built, family, task):
    """PEFT's classes for these tasks drop unknown arguments."""
    recipe = recipe_of(built(family), task)
    selected = open_model(recipe)
    adapted = inject(selected, recipe, quiet())
    task_of, processor = task_for(recipe), selected.processor
    texts = ["the fox is red", "the sky is blue and the fox has four legs .", "four", "two and two"]
    rows = {
        "classify": [{"text": text, "pair": None, "label": "b"} for text in texts],
        "token-classify": [{"tokens": text.split(), "tags": ["B-NAME", *["O"] * text.count(" ")]} for text in texts],
        "qa": [
            {"question": "what ?", "context": text, "answers": [{"text": text.split()[0], "start": 0}]}
            for text in texts
        ],
    }[task]
    encoded = task_of.encode(rows, processor, recipe)
    assert not [row for row in encoded if isinstance(row, str)], json.dumps(encoded, default=str)
    examples = [example for row in encoded for example in row]
    packed, padded = (task_of.collator(processor, recipe, packs)(examples, 0) for packs in (True, False))
    assert "cu_seq_lens_q" in packed
    assert "attention_mask" in padded
    with torch.no_grad():
        together, beside = (task_of.loss(adapted.model, batch, True) for batch in (packed, padded))
    torch.testing.assert_close(together.row_sums, beside.row_sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_recomputed_layers_keep_documents_separate_in_the_backward_pass(tmp_path, family):
    config = {"classifier_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    recipe = recipe_of(getattr(families, f"build_{family}")(tmp_path, **config), "classify")
    selected = open_model(recipe)
    model = selected.model.train()
    model.requires_grad_(True)
    examples = [ClassExample(list(range(5, 5 + size)), [], 0, class_ids=[size % 3]) for size in (4, 20, 7)]
    batch = task_for(recipe).collator(selected.processor, recipe, True)(examples, 0)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        model.zero_grad()
        task_for(recipe).loss(model, batch, False).sum.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
