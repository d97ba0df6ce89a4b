"""Losses of encoders: padding and packing do not change them in any family, and they equal torch's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.variants import CLASSIFY, EXTRACTIVE_QA, MASKED, TOKEN_CLASSIFY
from torch.nn import functional
from transformers import AutoTokenizer

from llmtune.data.collators import IGNORED
from llmtune.data.example import Example
from llmtune.model.packed_attention import PACKED, install_packed, pool_documents
from llmtune.recipe.schema import Recipe
from llmtune.records import Loss
from llmtune.tasks.qa import by_window

PACKING = ("bert", "roberta", "distilbert", "modernbert")
LENGTHS = (7, 23, 12, 4)
KINDS = [[0, 0, 0, 1, 1, 1, 1], [], [0] * 6 + [1] * 6, []]
CLASSES = [[0], [2], [1], [2]]
TARGETS: dict[str, dict[str, Sequence[Any]]] = {
    "classify": {"class_ids": CLASSES},
    "pairs": {"class_ids": CLASSES, "token_type_ids": KINDS},
    "multi": {"values": [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]},
    "regression": {"values": [[0.5], [-2.0], [3.25], [0.0]]},
    "token-classify": {"tag_ids": [[IGNORED, *(k % 3 for k in range(size - 2)), IGNORED] for size in LENGTHS]},
    "qa": {"answer": [[2, 4], [20, 22], [0, 0], [1, 1]]},
    "completion": {"spans": [[1, size - 1] for size in LENGTHS], "counted": [2] * 4},
}
VARIANT = {"token-classify": TOKEN_CLASSIFY, "qa": EXTRACTIVE_QA, "completion": MASKED}
OPTIONS: dict[str, dict[str, Any]] = {"regression": {"num_labels": 1}, "qa": {}, "completion": {}}


def recipe_of(name: str) -> Recipe:
    task = name if name in VARIANT else "classify"
    content: dict[str, Any] = {"task": task, "data": {"train": "x.jsonl"}, "model": {"name": "x/y"}}
    if task == "classify":
        kind = name if name in ("multi", "regression") else "single"
        content["classify"] = {"kind": kind, **({"labels": ["a", "b", "c"]} if kind == "single" else {})}
    return Recipe.model_validate(content)


def texts(name: str) -> list[Example]:
    """Random texts of LENGTHS with their targets."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i, size in enumerate(LENGTHS):
        ids = torch.randint(5, 200, (size,), generator=generator).tolist()
        targets = {field: values[i] for field, values in TARGETS[name].items()}
        kind = VARIANT.get(name, CLASSIFY).example_type
        examples.append(kind(ids, targets.pop("spans", []), 0, **targets))
    return examples


def open_model(name: str, folder: Path, **config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    auto = getattr(transformers, VARIANT.get(name, CLASSIFY).model_kind.auto_class)
    return auto.from_pretrained(folder, **{**OPTIONS.get(name, {"num_labels": 3}), **config}).eval()


@pytest.mark.parametrize(
    ("name", "family", "config"),
    [
        *((name, family, {}) for name in ("classify", "token-classify", "qa", "completion") for family in PACKING),
        *((name, "deberta", {}) for name in ("classify", "token-classify", "qa", "completion")),
        *(("classify", family, {}) for family in ("llama", "gpt2")),
        *((name, "bert", {}) for name in ("pairs", "multi", "regression")),
        ("classify", "modernbert", {"classifier_pooling": "mean"}),
    ],
)
def test_padding_and_packing_change_neither_loss_nor_gradient(built, name, family, config):
    task, recipe, examples = VARIANT.get(name, CLASSIFY), recipe_of(name), texts(name)
    tokenizer, folder = AutoTokenizer.from_pretrained(built(family)), built(family)
    packs = family in PACKING
    attention = {"attn_implementation": "eager"} if packs else {}
    plain = open_model(name, folder, **attention, **config)
    plain.config.pad_token_id = tokenizer.pad_token_id
    alone = [task.loss(plain, task.collator(tokenizer, recipe)([example], 0), True) for example in examples]
    assert len({round(one.sum.item(), 5) for one in alone}) == len(examples)  # all rows differ
    parameters = [p for p in plain.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(torch.stack([one.sum for one in alone]).sum(), parameters, allow_unused=True)
    longest = max(float(g.norm()) for g in wanted if g is not None)
    assert longest > 0
    models = [(plain, False)]
    if packs:
        packed = open_model(name, folder, attn_implementation=PACKED, **config)
        packed.load_state_dict(plain.state_dict())
        install_packed(packed)
        if task is CLASSIFY:
            pool_documents(packed)
        models.append((packed, True))
    for model, packing in models:
        batch = task.collator(tokenizer, recipe, packing)(examples, 0)
        assert ("cu_seq_lens_q" in batch) == packing
        together = task.loss(model, batch, True)
        assert together.count == sum(one.count for one in alone)
        torch.testing.assert_close(together.row_sums, torch.cat([one.row_sums for one in alone]), rtol=1e-4, atol=1e-4)
        assert together.row_correct.tolist() == [one.row_correct.item() for one in alone]
        torch.testing.assert_close(task.loss(model, batch).sum, together.row_sums.sum())
        own = [p for p in model.parameters() if p.requires_grad]
        for ours, single in zip(torch.autograd.grad(together.sum, own, allow_unused=True), wanted, strict=True):
            assert (ours is None) == (single is None)
            if ours is not None:
                torch.testing.assert_close(ours, single, rtol=1e-3, atol=1e-5 * longest)


def test_logits_of_a_packed_row_are_split_into_one_row_per_window():
    logits_BT = torch.arange(1.0, 7.0)[None]
    packed = by_window(logits_BT, {"document_lengths": [2, 1, 3]})
    lowest = torch.finfo(torch.float32).min
    assert packed.tolist() == [[1, 2, lowest], [3, lowest, lowest], [4, 5, 6]]


# The definition of a classifier's loss


class Fixed(torch.nn.Module):
    """A classifier that returns given logits."""

    def __init__(self, logits_RK: torch.Tensor) -> None:
        super().__init__()
        self.logits_RK = logits_RK

    def forward(self, input_ids: torch.Tensor) -> Any:
        return type("Output", (), {"logits": self.logits_RK})()


def loss_of(logits_RK: torch.Tensor, by_row: bool = True, **batch: Any) -> Loss:
    return CLASSIFY.loss(Fixed(logits_RK), {"input_ids": torch.zeros(len(logits_RK), 1).long(), **batch}, by_row)


def test_the_single_label_loss_is_torchs_cross_entropy_with_weights_only_in_the_sum():
    logits_RK, classes_R = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 0])
    loss = loss_of(logits_RK, classes_R=classes_R)
    assert loss.count == 6
    assert loss.correct == (logits_RK.argmax(-1) == classes_R).sum()
    torch.testing.assert_close(loss.row_sums, functional.cross_entropy(logits_RK, classes_R, reduction="none"))
    assert loss_of(logits_RK, by_row=False, classes_R=classes_R).row_correct is None
    weight_K = torch.tensor([0.5, 2.0, 3.0, 1.0])
    weighted = loss_of(logits_RK, classes_R=classes_R, weights_R=weight_K[classes_R])
    wanted = functional.cross_entropy(logits_RK, classes_R, weight=weight_K, reduction="sum")
    torch.testing.assert_close(weighted.sum, wanted)
    assert (weighted.count, weighted.correct) == (6, loss.correct)


def test_the_multi_label_loss_is_torchs_binary_cross_entropy_and_regression_squared_error():
    logits_RK, values_RK = torch.randn(4, 3), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    loss = loss_of(logits_RK, values_RK=values_RK, many=True)
    torch.testing.assert_close(loss.sum / 4, functional.binary_cross_entropy_with_logits(logits_RK, values_RK))
    assert loss.correct == ((logits_RK > 0) == values_RK.bool()).all(-1).sum()
    alone = loss_of(logits_RK[:, :1], values_RK=values_RK[:, :1], many=True)
    wanted = functional.binary_cross_entropy_with_logits(logits_RK[:, :1], values_RK[:, :1])
    torch.testing.assert_close(alone.sum / 4, wanted)
    number = loss_of(logits_RK[:, :1], values_RK=values_RK[:, :1], many=False)
    torch.testing.assert_close(number.sum / 4, functional.mse_loss(logits_RK[:, :1], values_RK[:, :1]))
    assert (number.count, number.correct) == (4, 0)


@pytest.mark.parametrize("name", ["classify", "token-classify", "qa", "completion"])
def test_the_loss_matches_transformers(built, name):
    model, task = open_model(name, built("bert")), VARIANT.get(name, CLASSIFY)
    batch = task.collator(AutoTokenizer.from_pretrained(built("bert")), recipe_of(name))(texts(name)[1:2], 0)
    if name == "qa":  # a single row: transformers lets padding be an answer
        labels = {"start_positions": batch["first_R"], "end_positions": batch["last_R"]}
    elif name == "classify":
        labels = {"labels": batch["classes_R"]}
    else:
        labels = {"labels": torch.full_like(batch["input_ids"], IGNORED)}
        labels["labels"].view(-1)[batch["predict_S"]] = batch["targets_S"]
    with torch.no_grad():
        loss = task.loss(model, batch)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        wanted = model(**inputs, **labels).loss
    torch.testing.assert_close(loss.sum / loss.count, wanted)
