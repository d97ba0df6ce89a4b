"""Adapters of models that read pictures: towers stay frozen, plain PEFT agrees, and a projector can be trained."""

import pytest
import torch
from peft import PeftModel
from support.adapting import open_model, quiet, recipe_with
from support.image_text import FAMILIES, build_image_text
from support.plain_images import PlainModel, mixed_rows

from llmtune.adapter.injection import inject
from llmtune.adapter.saving import load_adapter, save_adapter
from llmtune.errors import LlmtuneError, RecipeError
from llmtune.model.quantized_base import is_quantized
from llmtune.model.towers import find_projectors, find_towers
from llmtune.tasks.image_chat import ImageChat

TASK = ImageChat()
FAST = ("gemma3", "qwen3_vl", "llava", "smolvlm")
SOME = [pytest.param(family, marks=[] if family in FAST else pytest.mark.slow) for family in FAMILIES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def build(family):
        if family not in made:
            made[family] = build_image_text(tmp_path_factory.mktemp(family), family)
        return made[family]

    return build


def adapt(folder, **adapter):
    recipe = recipe_with(folder, chat={"images": True}, adapter=adapter)
    return inject(open_model(recipe), recipe, quiet()), recipe


def encode_row(adapted, recipe, folder):
    """Return a row with two pictures of one size, which every family's processor joins, and its example."""
    row = mixed_rows(folder, ["wide", "wide", "tall"])[1]
    ((example,),) = TASK.encode([row], adapted.selected.processor, recipe)
    return row, example


def read_batch(adapted, recipe, folder):
    return TASK.collator(adapted.selected.processor, recipe)([encode_row(adapted, recipe, folder)[1]], 0)


@torch.no_grad()
def shake(model):
    """Move all trained weights."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("projector", [False, True], ids=["frozen", "projector"])
def test_plain_peft_on_the_complete_checkpoint_scores_pictures_as_we_do(tmp_path, folders, family, projector):
    adapted, recipe = adapt(folders(family), r=4, train_projector=projector)
    inner = adapted.selected.model
    trained = [name for name, one in adapted.model.named_parameters() if one.requires_grad]
    inside = [name for name in trained if any(f".{tower}." in name for tower in find_towers(inner))]
    assert bool(inside) == projector
    assert all(".modules_to_save." in name and "lora" not in name for name in inside)
    assert {part for part in find_projectors(inner) if any(f".{part}." in name for name in inside)} == (
        set(find_projectors(inner)) if projector else set()
    )
    shake(adapted.model)
    save_adapter(adapted, tmp_path / "adapter")
    loss = TASK.loss(adapted.model.eval(), read_batch(adapted, recipe, tmp_path), True)
    loss.sum.backward()
    gradients = [one.grad for name, one in adapted.model.named_parameters() if name in inside]
    assert all(one is not None for one in gradients)
    assert any(one.any() for one in gradients) == projector  # those of the last layer's deepstack are zero

    plain = PlainModel(folders(family))
    row, example = encode_row(adapted, recipe, tmp_path)
    inputs = plain.inputs(row["messages"])
    before = float(plain.loss(inputs, example.spans).detach())
    plain.model = PeftModel.from_pretrained(plain.model, tmp_path / "adapter").eval()
    expected = plain.loss(inputs, example.spans).detach()
    assert abs(float(expected) - before) > 1e-2
    torch.testing.assert_close(loss.row_sums.detach()[0], expected, rtol=1e-5, atol=1e-5)

    again = load_adapter(open_model(recipe, training=False), tmp_path / "adapter")
    reloaded = TASK.loss(again.model, read_batch(again, recipe, tmp_path), True)
    torch.testing.assert_close(reloaded.row_sums, loss.row_sums.detach(), rtol=1e-6, atol=1e-6)


def trained_towers(model):
    towers = find_towers(model.get_base_model() if isinstance(model, PeftModel) else model)
    return [n for n, p in model.named_parameters() if p.requires_grad and any(f".{t}." in f".{n}" for t in towers)]


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.(q_proj|fc1)"},
        {"bias": "all"},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"method": "ln_tuning", "r": None},
        {"method": "ia3", "r": None},
        {"method": "full", "r": None},
    ],
    ids=str,
)
def test_no_method_trains_a_tower(folders, adapter):
    stated = {key: value for key, value in {"r": 4, **adapter}.items() if value is not None}
    adapted, _ = adapt(folders("llava"), **stated)
    assert trained_towers(adapted.model) == []
    assert [name for name, one in adapted.model.named_parameters() if one.requires_grad]


@pytest.mark.parametrize("key", ["target_modules", "modules_to_save"])
def test_names_in_a_tower_alone_are_refused(folders, key):
    with pytest.raises(RecipeError, match=r"'vision_tower.*' matches only modules that read images.*stay frozen"):
        adapt(folders("gemma3"), **{key: ["vision_tower.encoder.layers.0.mlp.fc1"]})


def test_full_training_reaches_the_projector_on_request(folders):
    adapted, _ = adapt(folders("gemma3"), method="full", train_projector=True)
    names = trained_towers(adapted.model)
    assert names
    assert all(name.startswith("model.multi_modal_projector.") for name in names)


def test_the_adapter_says_what_is_frozen_and_what_is_trained(folders):
    recipe = recipe_with(folders("gemma3"), chat={"images": True}, adapter={"train_projector": True})
    console = quiet()
    inject(open_model(recipe), recipe, console)
    text = console.file.getvalue()
    assert (
        "Towers frozen: model.vision_tower, except model.multi_modal_projector, which are trained completely." in text
    )


def test_an_adapter_with_a_projector_continues_and_one_without_refuses_to_train_it(tmp_path, folders):
    for projector in (True, False):
        adapted, _ = adapt(folders("gemma3"), r=4, train_projector=projector)
        save_adapter(adapted, tmp_path / str(projector))
    continued, _ = adapt(folders("gemma3"), start_from=str(tmp_path / "True"), train_projector=True)
    assert trained_towers(continued.model)
    with pytest.raises(RecipeError, match="has no projector"):
        adapt(folders("gemma3"), start_from=str(tmp_path / "False"), train_projector=True)


def test_a_text_run_refuses_an_adapter_with_a_projector_and_takes_one_without(tmp_path, folders):
    for projector in (True, False):
        adapted, _ = adapt(folders("gemma3"), r=4, train_projector=projector)
        save_adapter(adapted, tmp_path / str(projector))
    recipe = recipe_with(folders("gemma3"), data={"packing": False})
    load_adapter(open_model(recipe, training=False), tmp_path / "False")
    with pytest.raises(LlmtuneError, match=r"chat.images: true"):
        load_adapter(open_model(recipe, training=False), tmp_path / "True")


def test_qlora_quantises_the_language_model_alone(tmp_path, folders):
    adapted, recipe = adapt(folders("llava"), method="qlora", r=4, train_projector=True)
    inner = adapted.selected.model
    packed = [name for name, one in inner.named_modules() if is_quantized(one)]
    assert packed
    assert all(".language_model." in f".{name}." for name in packed)
    loss = TASK.loss(adapted.model, read_batch(adapted, recipe, tmp_path), True)
    loss.sum.backward()
    assert all(one.grad is not None for one in adapted.model.parameters() if one.requires_grad)
