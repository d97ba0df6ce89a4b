"""Losses of classifiers equal torch's; padding and packing change none of them, nor what was right at first choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import audio, families
from support.models import build_gpt2, build_llama
from torch.nn import functional
from transformers import (
    AutoModelForCTC,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from llmtune.data.target_collators import (
    IGNORED,
    classes_collator,
    ctc_collator,
    ends_collator,
    masked_collator,
    seq2seq_collator,
    tags_collator,
)
from llmtune.model import causal_loss
from llmtune.model.packed_attention import PACKED, install_packed
from llmtune.model.packed_pooling import pool_documents
from llmtune.model.task_losses import by_text, classes_loss, ctc_loss, ends_loss, seq2seq_loss, tags_loss
from llmtune.recipe import Recipe
from llmtune.records import Collate, Example, Loss

ENCODERS = ("bert", "roberta", "distilbert", "deberta", "modernbert")
DECODERS: dict[str, Callable[..., Path]] = {"llama": build_llama, "gpt2": build_gpt2}
LENGTHS = (7, 23, 12, 4)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            builder = DECODERS.get(family) or getattr(families, f"build_{family}")
            made[family] = builder(tmp_path_factory.mktemp(family))
        return made[family]

    return build


def recipe_of(**sections: Any) -> Recipe:
    content = {"task": "classify", "data": {"train": "x.jsonl"}, "model": {"name": "x/y"}, **sections}
    return Recipe.model_validate(content)


def texts(**targets: Sequence[Any]) -> list[Example]:
    """Random texts of LENGTHS, with a part of each of `targets`."""
    generator = torch.Generator().manual_seed(0)
    return [
        Example(torch.randint(5, 200, (size,), generator=generator).tolist(), [], 0, **parts)
        for size, *values in zip(LENGTHS, *targets.values(), strict=True)
        for parts in [dict(zip(targets, values, strict=True))]
    ]


def open_model(auto: Any, folder: Path, **config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return auto.from_pretrained(folder, **config).eval()


def check_padding_changes_nothing(
    model: torch.nn.Module, loss: Callable[..., Loss], collate: Collate, examples: Sequence[Example]
) -> None:
    """Hold the loss of a batch against those of its rows alone, in sum, count, by row and in gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    together = loss(model, collate(examples, 0), True)
    alone = [loss(model, collate([example], 0), True) for example in examples]
    assert together.count == sum(one.count for one in alone)
    torch.testing.assert_close(together.sum, torch.stack([one.sum for one in alone]).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.row_sums, torch.cat([one.row_sums for one in alone]), rtol=1e-4, atol=1e-4)
    assert together.row_correct.tolist() == [one.row_correct.item() for one in alone]
    assert len({round(one.sum.item(), 5) for one in alone}) == len(examples)  # rows that could be told apart
    plain = loss(model, collate(examples, 0), False)
    torch.testing.assert_close(plain.sum, together.sum)
    grads = [
        torch.autograd.grad(total, parameters, allow_unused=True)
        for total in (plain.sum, torch.stack([one.sum for one in alone]).sum())
    ]
    length = torch.stack([g.norm() for g in grads[1] if g is not None]).norm()
    assert length > 0
    for batch, single in zip(*grads, strict=True):
        if single is not None:
            torch.testing.assert_close(batch, single, rtol=1e-3, atol=1e-5 * float(length))


def check_packing_changes_nothing(
    auto: Any,
    folder: Path,
    loss: Callable[..., Loss],
    collator: Any,
    recipe: Recipe,
    examples: Sequence[Example],
    **config: Any,
) -> None:
    """Hold the loss of a packed row against those of its texts one by one in the plain model, as above, to 1e-5."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = open_model(auto, folder, attn_implementation="eager", **config)
    model = open_model(auto, folder, attn_implementation=PACKED, **config)
    model.load_state_dict(plain.state_dict())
    install_packed(model)
    if auto is AutoModelForSequenceClassification:
        pool_documents(model)
    batch = collator(tokenizer, recipe, True)(examples, 0)
    assert batch["input_ids"].shape == (1, sum(len(example.input_ids) for example in examples))
    together = loss(model, batch, True)
    alone = [loss(plain, collator(tokenizer, recipe, False)([example], 0), True) for example in examples]
    assert together.count == sum(one.count for one in alone)
    assert together.row_correct.tolist() == [one.row_correct.item() for one in alone]
    torch.testing.assert_close(together.row_sums, torch.cat([one.row_sums for one in alone]), rtol=1e-5, atol=1e-5)
    together.sum.backward()
    torch.stack([one.sum for one in alone]).sum().backward()
    longest = max(p.grad.norm() for p in plain.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(longest), msg=name)


PACKING = ("bert", "roberta", "distilbert", "modernbert")
CLASSES = {"kind": "single", "labels": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("family", "config"), [*((family, {}) for family in PACKING), ("modernbert", {"classifier_pooling": "mean"})]
)
def test_packing_does_not_change_the_loss_of_a_classifier(built, family, config):
    examples = texts(target_ids=[[0], [2], [1], [2]])
    recipe = recipe_of(classify=CLASSES)
    model, folder = AutoModelForSequenceClassification, built(family)
    check_packing_changes_nothing(
        model, folder, classes_loss, classes_collator, recipe, examples, num_labels=3, **config
    )


def test_packing_does_not_change_the_loss_of_pairs_beside_single_texts(built):
    kinds = [[0, 0, 0, 1, 1, 1, 1], [], [0] * 6 + [1] * 6, []]
    examples = texts(target_ids=[[0], [2], [1], [2]], third_ids=kinds)
    recipe = recipe_of(classify=CLASSES)
    model, folder = AutoModelForSequenceClassification, built("bert")
    check_packing_changes_nothing(model, folder, classes_loss, classes_collator, recipe, examples, num_labels=3)


@pytest.mark.parametrize("family", PACKING)
def test_packing_does_not_change_the_loss_of_tags(built, family):
    tags = [[IGNORED, *(k % 5 for k in range(size - 2)), IGNORED] for size in LENGTHS]
    model, examples = AutoModelForTokenClassification, texts(target_ids=tags)
    check_packing_changes_nothing(model, built(family), tags_loss, tags_collator, recipe_of(), examples, num_labels=5)


@pytest.mark.parametrize("family", PACKING)
def test_packing_does_not_change_the_loss_of_the_ends_of_answers(built, family):
    model, examples = AutoModelForQuestionAnswering, texts(target_ids=[[2, 4], [20, 22], [0, 0], [1, 1]])
    check_packing_changes_nothing(model, built(family), ends_loss, ends_collator, recipe_of(), examples)


@pytest.mark.parametrize("family", PACKING)
def test_packing_does_not_change_the_loss_of_hidden_tokens(built, family):
    examples = [Example(e.input_ids, [1, len(e.input_ids) - 1], 0, counted=2) for e in texts()]
    recipe = recipe_of(task="completion")
    check_packing_changes_nothing(AutoModelForMaskedLM, built(family), causal_loss, masked_collator, recipe, examples)


def test_logits_of_a_packed_row_stand_in_a_row_for_each_text():
    logits_BT = torch.arange(1.0, 7.0)[None]
    packed = by_text(logits_BT, {"cu_seq_lens_q": torch.tensor([0, 2, 3, 6], dtype=torch.int32)})
    lowest = torch.finfo(torch.float32).min
    assert packed.tolist() == [[1, 2, lowest], [3, lowest, lowest], [4, 5, 6]]


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_padding_does_not_change_the_loss_of_a_classifier(built, family):
    model = open_model(AutoModelForSequenceClassification, built(family), num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(built(family))
    model.config.pad_token_id = tokenizer.pad_token_id
    collate = classes_collator(tokenizer, recipe_of(classify={"kind": "single", "labels": ["a", "b", "c"]}))
    check_padding_changes_nothing(model, classes_loss, collate, texts(target_ids=[[0], [2], [1], [2]]))


def test_padding_does_not_change_the_loss_of_pairs_beside_single_texts(built):
    model = open_model(AutoModelForSequenceClassification, built("bert"), num_labels=3)
    collate = classes_collator(
        AutoTokenizer.from_pretrained(built("bert")), recipe_of(classify={"kind": "single", "labels": ["a", "b", "c"]})
    )
    kinds = [[0, 0, 0, 1, 1, 1, 1], [], [0] * 6 + [1] * 6, []]
    check_padding_changes_nothing(model, classes_loss, collate, texts(target_ids=[[0], [2], [1], [2]], third_ids=kinds))


@pytest.mark.parametrize("kind", ["multi", "regression"])
def test_padding_does_not_change_the_loss_of_many_labels_or_a_number(built, kind):
    width = 3 if kind == "multi" else 1
    model = open_model(AutoModelForSequenceClassification, built("bert"), num_labels=width)
    collate = classes_collator(AutoTokenizer.from_pretrained(built("bert")), recipe_of(classify={"kind": kind}))
    values = [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]] if width == 3 else [[0.5], [-2.0], [3.25], [0.0]]
    check_padding_changes_nothing(model, classes_loss, collate, texts(values=values))


@pytest.mark.parametrize("family", ENCODERS)
def test_padding_does_not_change_the_loss_of_tags(built, family):
    model = open_model(AutoModelForTokenClassification, built(family), num_labels=5)
    tags = [[IGNORED, *(k % 5 for k in range(size - 2)), IGNORED] for size in LENGTHS]
    collate = tags_collator(AutoTokenizer.from_pretrained(built(family)), recipe_of())
    check_padding_changes_nothing(model, tags_loss, collate, texts(target_ids=tags))


@pytest.mark.parametrize("family", ENCODERS)
def test_padding_does_not_change_the_loss_of_the_ends_of_answers(built, family):
    model = open_model(AutoModelForQuestionAnswering, built(family))
    collate = ends_collator(AutoTokenizer.from_pretrained(built(family)), recipe_of())
    check_padding_changes_nothing(model, ends_loss, collate, texts(target_ids=[[2, 4], [20, 22], [0, 0], [1, 1]]))


@pytest.mark.parametrize("family", ENCODERS)
def test_padding_does_not_change_the_loss_of_hidden_tokens(built, family):
    model = open_model(AutoModelForMaskedLM, built(family))
    tokenizer = AutoTokenizer.from_pretrained(built(family))
    examples = [Example(e.input_ids, [1, len(e.input_ids) - 1], 0, counted=2) for e in texts()]
    collate = masked_collator(tokenizer, recipe_of(task="completion"))
    check_padding_changes_nothing(model, tags_loss, collate, examples)


@pytest.mark.parametrize("family", ["t5", "mt5", "bart", "mbart"])
def test_padding_does_not_change_the_loss_of_an_encoder_decoder(built, family):
    model = open_model(AutoModelForSeq2SeqLM, built(family))
    answers = [[9, 10, 11, 2], [12, 2], list(range(20, 38)), [30, 31, 2]]
    spans = [[0, 4], [0, 2], [0, 5, 9, 18], [1, 3]]
    collate = seq2seq_collator(AutoTokenizer.from_pretrained(built(family)), recipe_of())
    check_padding_changes_nothing(model, seq2seq_loss, collate, texts(target_ids=answers, target_spans=spans))


def test_padding_does_not_change_the_loss_of_alignments(built):
    model = open_model(AutoModelForCTC, built("wav2vec2"))
    model.freeze_feature_encoder()
    tokenizer = AutoTokenizer.from_pretrained(built("wav2vec2"))
    sounds = [(audio.make_tone(s, pitch_hz=p) * 20_000).astype("int16").tolist() for s, p in ((0.5, 300), (1.0, 900))]
    said = [[8, 9, 10], [11, 8, 8, 12, 13]]
    examples = [Example([], [], 0, target_ids=ids, audio=sound) for ids, sound in zip(said, sounds, strict=True)]
    check_padding_changes_nothing(model, ctc_loss, ctc_collator(tokenizer, recipe_of()), examples)


class Fixed(torch.nn.Module):
    """A classifier that gives the logits it was made with."""

    def __init__(self, logits_RK: torch.Tensor) -> None:
        super().__init__()
        self.logits_RK = logits_RK

    def forward(self, input_ids: torch.Tensor) -> Any:
        return type("Output", (), {"logits": self.logits_RK})()


def loss_of(logits_RK: torch.Tensor, by_row: bool = True, **batch: Any) -> Loss:
    return classes_loss(Fixed(logits_RK), {"input_ids": torch.zeros(len(logits_RK), 1).long(), **batch}, by_row)


def test_the_loss_of_one_label_is_torchs_cross_entropy_over_rows():
    logits_RK, classes_R = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 0])
    loss = loss_of(logits_RK, classes_R=classes_R)
    assert loss.count == 6
    torch.testing.assert_close(loss.sum / loss.count, functional.cross_entropy(logits_RK, classes_R))
    assert loss.correct == (logits_RK.argmax(-1) == classes_R).sum()
    torch.testing.assert_close(loss.row_sums, functional.cross_entropy(logits_RK, classes_R, reduction="none"))
    assert loss_of(logits_RK, by_row=False, classes_R=classes_R).row_sums is None


def test_weights_multiply_the_sum_and_leave_the_count():
    logits_RK, classes_R = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 0, 0])
    weight_K = torch.tensor([0.5, 2.0, 3.0])
    loss = loss_of(logits_RK, classes_R=classes_R, weights_R=weight_K[classes_R])
    wanted = functional.cross_entropy(logits_RK, classes_R, weight=weight_K, reduction="sum") / 6
    torch.testing.assert_close(loss.sum / loss.count, wanted)
    assert loss.correct == (logits_RK.argmax(-1) == classes_R).sum()


def test_the_loss_of_many_labels_is_torchs_binary_cross_entropy():
    logits_RK, values_RK = torch.randn(5, 3), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]])
    loss = loss_of(logits_RK, values_RK=values_RK, many=True)
    wanted = functional.binary_cross_entropy_with_logits(logits_RK, values_RK)
    torch.testing.assert_close(loss.sum / loss.count, wanted)
    assert loss.count == 5
    assert loss.correct == ((logits_RK > 0) == values_RK.bool()).all(-1).sum()


def test_one_of_many_labels_alone_is_no_number():
    logits_RK, values_RK = torch.randn(4, 1), torch.tensor([[1.0], [0], [1], [0]])
    many = loss_of(logits_RK, values_RK=values_RK, many=True)
    torch.testing.assert_close(many.sum / 4, functional.binary_cross_entropy_with_logits(logits_RK, values_RK))
    number = loss_of(logits_RK, values_RK=values_RK, many=False)
    torch.testing.assert_close(number.sum / 4, functional.mse_loss(logits_RK, values_RK))
    assert number.correct == 0


def test_the_loss_of_a_model_with_labels_is_the_one_of_transformers(built):
    model = open_model(AutoModelForSequenceClassification, built("bert"), num_labels=3)
    collate = classes_collator(
        AutoTokenizer.from_pretrained(built("bert")), recipe_of(classify={"kind": "single", "labels": ["a", "b", "c"]})
    )
    batch = collate(texts(target_ids=[[0], [2], [1], [2]]), 0)
    with torch.no_grad():
        loss = classes_loss(model, batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        wanted = model(**inputs, labels=batch["classes_R"]).loss
    torch.testing.assert_close(loss.sum / loss.count, wanted)
