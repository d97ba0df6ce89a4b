"""Text tunes of checkpoints that also read images: their own class, without its towers."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapting import open_model, quiet, recipe_with, task_for
from support.image_text import FAMILIES, build_image_text
from transformers import AutoModelForImageTextToText

from llmtune.adapter.injection import inject
from llmtune.adapter.saving import load_adapter, save_adapter
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.memory_plan import plan_memory
from llmtune.model.resolve import resolve_model
from llmtune.model.towers import describe_towers, drop_towers, dropped_modules, find_towers

VISION = ["model.vision_tower", "model.multi_modal_projector"]
TOWERS = dict.fromkeys(FAMILIES, VISION) | {
    "gemma4": ["model.vision_tower", "model.embed_vision"],
    "qwen3_5": ["model.visual"],
    "qwen3_5_moe": ["model.visual"],
    "qwen2_5_vl": ["model.visual"],
    "qwen3_vl": ["model.visual"],
    "glm46v": ["model.visual"],
    "llama4": ["vision_model", "multi_modal_projector"],
    "smolvlm": ["model.vision_model", "model.connector"],
    "idefics3": ["model.vision_model", "model.connector"],
    "granite4_vision": ["model.vision_tower", "model.layerwise_projectors", "model.spatial_projectors"],
}


def plain(folder: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", TOWERS)
def test_a_text_tune_loads_the_class_of_the_checkpoint_without_its_towers(tmp_path, family):
    complete = plain(build_image_text(tmp_path, family))
    assert find_towers(complete) == TOWERS[family]
    model = open_model(recipe_with(tmp_path, data={"packing": False})).model
    assert type(model) is type(complete)
    names = [name for name, _ in complete.named_parameters() if not name.startswith(tuple(TOWERS[family]))]
    assert [name for name, _ in model.named_parameters()] == names
    assert find_towers(model) == []
    assert describe_towers(model).startswith(f"Towers left out: {', '.join(TOWERS[family])}. ")


@pytest.mark.parametrize("family", ["gemma4", "llava", "qwen3_5"])
def test_scores_without_towers_are_equal_to_the_bit(tmp_path, family):
    complete, ids = plain(build_image_text(tmp_path, family)), torch.arange(20)[None] * 7
    with torch.inference_mode():
        before = complete(input_ids=ids).logits
        drop_towers(complete)
        assert torch.equal(complete(input_ids=ids).logits, before)
    assert dropped_modules(complete)


def test_towers_that_text_uses_stay_frozen(tmp_path):
    model = plain(build_image_text(tmp_path, "llava"))
    tower = model.model.vision_tower

    def read_tower(*_: object) -> None:
        assert model.model.vision_tower is not None

    model.model.language_model.register_forward_hook(read_tower)
    drop_towers(model)
    assert model.model.vision_tower is tower
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert all(parameter.requires_grad for parameter in model.model.language_model.parameters())
    assert not dropped_modules(model)
    assert describe_towers(model).startswith("Towers frozen: model.vision_tower, model.multi_modal_projector. ")


def test_a_model_of_text_alone_keeps_every_module(tiny_llama):
    model = open_model(recipe_with(tiny_llama)).model
    assert not dropped_modules(model)
    assert describe_towers(model) is None


@pytest.mark.parametrize("family", ["llava", "smolvlm", "llama4"])
def test_plain_peft_puts_the_adapter_on_the_language_model_of_the_complete_class(tmp_path, family):
    recipe = recipe_with(build_image_text(tmp_path, family), data={"packing": False})
    adapted = inject(open_model(recipe), recipe, quiet())
    save_adapter(adapted, tmp_path / "adapter")
    other = PeftModel.from_pretrained(plain(tmp_path), tmp_path / "adapter")
    assert sorted(other.targeted_module_names) == sorted(adapted.matched_modules)
    assert not any(tower in name for name in adapted.matched_modules for tower in TOWERS[family])
    ours = {name for name, _ in adapted.model.named_parameters() if "lora" in name}
    assert {name for name, _ in other.named_parameters() if "lora" in name} == ours


@pytest.mark.parametrize(
    "section",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["model.language_model.layers.0.self_attn.q_proj", "up_proj"]},
        {"target_modules": r".*\.layers\.0\..*_proj"},
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["vision_tower.encoder.layers.0.self_attn.q_proj"]},
    ],
)
def test_any_choice_of_modules_selects_the_same_ones_on_the_complete_class(tmp_path, section):
    recipe = recipe_with(build_image_text(tmp_path, "llava"), adapter=section)
    adapted = inject(open_model(recipe), recipe, quiet())
    save_adapter(adapted, tmp_path / "adapter")
    other = PeftModel.from_pretrained(plain(tmp_path), tmp_path / "adapter")
    ours = {name for name, _ in adapted.model.named_parameters() if ".default" in name}
    assert ours
    assert {name for name, _ in other.named_parameters() if ".default" in name} == ours


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("target_modules", ["q_proj", "fc1"]),
        ("target_modules", r".*vision_tower.*_proj"),
        ("modules_to_save", ["vision_tower.encoder.layers.0.self_attn.q_proj"]),
    ],
)
def test_a_recipe_that_names_modules_of_a_tower_is_refused(tmp_path, key, entry):
    recipe = recipe_with(build_image_text(tmp_path, "llava"), adapter={key: entry})
    with pytest.raises(
        RecipeError, match=r"only modules that read images or sound, such as model\.vision_tower"
    ) as error:
        inject(open_model(recipe), recipe, quiet())
    assert error.value.problems[0].where == f"adapter.{key}"


def test_an_adapter_on_a_tower_is_refused_by_name(tmp_path):
    recipe = recipe_with(build_image_text(tmp_path, "llava"))
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(plain(tmp_path), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(EnvironmentProblem, match="modules that read images"):
        load_adapter(open_model(recipe), tmp_path / "adapter")


def test_the_memory_plan_counts_the_language_model_alone(tmp_path):
    recipe = recipe_with(build_image_text(tmp_path, "llava"))
    plan = plan_memory(resolve_model(str(tmp_path), recipe.model, quiet()), recipe, task_for(recipe), 64, "cpu")
    assert plan.parts["weights"] == 4 * sum(parameter.numel() for parameter in open_model(recipe).model.parameters())


def test_the_memory_plan_counts_the_keys_of_each_layer_by_its_own_size(tmp_path):
    recipe = recipe_with(build_image_text(tmp_path, "gemma4"))
    selected = open_model(recipe, training=False)
    caches = [selected.model(input_ids=torch.arange(4, 4 + n)[None], use_cache=True).cache.layers for n in (5, 6)]
    sizes = [sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) for layers in caches]
    plans = [plan_memory(selected.model_ref, recipe, task_for(recipe), tokens, "cpu") for tokens in (5, 6)]
    assert plans[1].evaluated - plans[0].evaluated == sizes[1] - sizes[0]


def test_qlora_quantises_the_language_model_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("llmtune.model.loading.drop_towers", lambda model: None)
    model = open_model(recipe_with(build_image_text(tmp_path, "llava"), adapter={"method": "qlora"})).model
    quantized = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == 14
    assert all(name.startswith("model.language_model.") for name in quantized)


def test_llama_4_scores_as_its_language_model_alone(tmp_path):
    """Before transformers 5.25 the checkpoint's class cannot run: it reads an output that its language model lacks."""
    complete = plain(build_image_text(tmp_path, "llama4"))
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        scores = open_model(recipe_with(tmp_path), training=False).model(input_ids=ids).logits
        assert torch.allclose(scores, complete.language_model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def change_config(folder: Path, section: str | None = None, **keys: object) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    (config[section] if section else config).update(keys)
    path.write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("family", "architectures", "wanted"),
    [
        ("qwen3_5", ["Qwen3_5ForCausalLM"], "Qwen3_5ForCausalLM"),
        ("qwen3_5", [], "Qwen3_5ForConditionalGeneration"),
        ("llama4", ["Llama4ForCausalLM"], "Llama4ForCausalLM"),
    ],
)
def test_a_checkpoint_may_name_the_class_for_text_alone(tmp_path, family, architectures, wanted):
    change_config(build_image_text(tmp_path, family), architectures=architectures)
    assert type(open_model(recipe_with(tmp_path, data={"packing": False})).model).__name__ == wanted


@pytest.mark.parametrize(
    ("family", "task", "wanted"),
    [
        ("gemma3", "classify", "Gemma3ForSequenceClassification"),
        ("qwen3_5", "rerank", "Qwen3_5ForSequenceClassification"),
        ("llava", "embed", "LlavaModel"),
        ("qwen2_5_vl", "embed", "Qwen2_5_VLModel"),
    ],
)
def test_heads_and_pooling_are_put_on_the_language_model(tmp_path, family, task, wanted):
    recipe = recipe_with(build_image_text(tmp_path, family)).model_copy(update={"task": task})
    model = open_model(recipe).model
    assert type(model).__name__ == wanted
    assert find_towers(model) == []
    assert dropped_modules(model)


@pytest.mark.parametrize(
    ("family", "task"),
    [("llava", "classify"), ("llava", "rerank"), ("llama4", "embed"), ("qwen3_vl", "token-classify")],
)
def test_a_task_without_a_class_of_transformers_is_refused_by_name(tmp_path, family, task):
    recipe = recipe_with(build_image_text(tmp_path, family)).model_copy(update={"task": task})
    with pytest.raises(RecipeError, match=f"ForConditionalGeneration: it cannot be used for the task {task}"):
        task_for(recipe)


@pytest.mark.parametrize(
    ("task", "fix"),
    [
        ("classify", "Name a model of text alone, or set `task: chat` with the classes in evaluate.choices."),
        ("rerank", "Name a model of text alone."),
    ],
)
def test_a_decoder_without_a_class_for_a_head_is_not_told_to_be_a_decoder(tmp_path, task, fix):
    recipe = recipe_with(build_image_text(tmp_path, "qwen2_5_vl")).model_copy(update={"task": task})
    with pytest.raises(RecipeError, match="no class for sequence classification of the type qwen2_5_vl") as error:
        task_for(recipe)
    assert error.value.problems[0].fix == fix


def test_a_configuration_that_transformers_reads_is_not_called_damaged(tmp_path):
    change_config(build_image_text(tmp_path, "llava"), "text_config", pad_token_id=99_999)
    with pytest.raises(EnvironmentProblem, match="Padding_idx must be within num_embeddings") as error:
        open_model(recipe_with(tmp_path, adapter={"method": "qlora"}))
    assert "damaged" not in error.value.problems[0].fix


def test_a_configuration_that_transformers_refuses_is_explained(tmp_path):
    change_config(build_image_text(tmp_path, "llava"), "text_config", hidden_size=63)
    with pytest.raises(EnvironmentProblem, match=r"hidden size .63. is not a multiple"):
        open_model(recipe_with(tmp_path))
