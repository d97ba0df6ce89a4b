"""Conversations with pictures, compared with plain transformers."""


import pytest
import torch
from support.adapting import open_model, quiet, recipe_with
from support.image_text import FAMILIES, build_image_text
from support.pictures import PlainModel, mixed_rows
from transformers import AutoConfig

from llmtune.adapter.injection import inject
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.tasks.image_chat import ImageChat, open_images

TASK = ImageChat()
ONE_SIZE = {"lfm2_vl": (["square"] * 3,)}
"""Families whose own processor takes two pictures in a text only if they have the same size."""


def image_recipe(folder, **sections):
    return recipe_with(folder, **{"chat": {"images": True}, "adapter": {"method": "full"}, **sections})


def encode(rows, processor, recipe):
    encoded = TASK.encode(rows, processor, recipe)
    assert not [row for row in encoded if isinstance(row, str)]
    return [example for row in encoded for example in row]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_pixels_losses_and_gradients_are_those_of_plain_transformers(tmp_path, family):
    recipe = image_recipe(build_image_text(tmp_path / "model", family))
    selected, plain = open_model(recipe), PlainModel(tmp_path / "model")
    adapted = inject(selected, recipe, quiet())
    rows = mixed_rows(tmp_path, *ONE_SIZE.get(family, ()))
    examples = encode(rows, selected.processor, recipe)
    batch = TASK.collator(selected.processor, recipe)(examples, 0)
    loss = TASK.loss(adapted.model, batch, True)
    (loss.sum / loss.count).backward()

    expected = []
    media = {}
    for row, example in zip(rows, examples, strict=True):
        inputs = plain.inputs(row["messages"])
        assert inputs["input_ids"][0].tolist()[: len(example.input_ids)] == list(example.input_ids)
        expected.append(plain.loss(inputs, example.spans))
        for name in batch["media"]:
            if name in inputs and "type" not in name:
                media[name] = [*media.get(name, []), inputs[name]]
    (sum(expected) / loss.count).backward()
    for name, parts in media.items():
        parts = [part.flatten(0, 1) if part.dim() > 3 else part for part in parts]  # idefics: [rows, pictures, ...]
        ours = batch[name].flatten(0, 1) if batch[name].dim() > 3 else batch[name]
        if len({part.shape[1:] for part in parts}) == 1:
            assert torch.equal(ours, torch.cat(parts)), name
    torch.testing.assert_close(loss.row_sums.detach(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)
    trained = {name: one for name, one in adapted.model.named_parameters() if one.requires_grad}
    gradients = dict(plain.model.named_parameters())
    for name, parameter in trained.items():
        if parameter.grad is None:
            assert gradients[name].grad is None, name
            continue
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert any(one.grad is not None and one.grad.any() for one in trained.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_label_lies_on_a_picture_and_the_answers_have_theirs(tmp_path, family):
    folder = build_image_text(tmp_path / "model", family)
    processor = load_processor(resolve_model(str(folder), image_recipe(folder).model, quiet()), image_recipe(folder).model)
    image_token = AutoConfig.from_pretrained(folder).image_token_id
    answers = {
        "assistant": [["you"], ["yes it is"], ["no", "more words", "three"]],
        "last": [["you"], ["yes it is"], ["three"]],
    }
    for train_on in ("assistant", "last", "all"):
        recipe = image_recipe(folder, data={"train_on": train_on})
        examples = encode(mixed_rows(tmp_path), processor, recipe)
        for number, example in enumerate(examples):
            spans = list(zip(example.spans[::2], example.spans[1::2], strict=True))
            labels = [list(example.input_ids[start:end]) for start, end in spans]
            assert not any(image_token in ids for ids in labels)
            texts = [processor.decode(ids).removesuffix("<|im_end|>").strip() for ids in labels]
            if train_on != "all":
                assert texts == answers[train_on][number]
            else:
                special = open_images(processor, recipe).special_ids(example.list_pictures())
                others = [one for one in example.input_ids[1:] if one not in special]
                assert sum(map(len, labels)) == len(others)
