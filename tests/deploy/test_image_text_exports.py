"""Exports of checkpoints that also read images: the rest of the checkpoint and its processor are the base's."""

import json
import re
import shutil

import pytest
import torch
from gguf import GGUFReader
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.architectures import build
from support.classifying import colour_rows
from support.exports import SILENT, export_tuned, judged, searched
from support.image_text import build_image_text, picture
from support.pairs import run_recipe
from support.runs import invoke, write_colours, write_recipe
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from llmtune.adapter.saving import save_adapter
from llmtune.deploy.gguf_converter import check_convertible
from llmtune.deploy.gguf_export import gguf_format
from llmtune.deploy.merged_model import merged_format
from llmtune.deploy.onnx_export import onnx_format
from llmtune.deploy.quantized_model import quantized_format
from llmtune.errors import EnvironmentProblem, RecipeError

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour is it?"}]}]


def stored(folder):
    """Return the tensors of all weight files in a folder."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(str(file), "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    return tensors


def outside_text(tensors):
    marks = ("vision", "visual", "projector", "connector")
    return {name: tensor for name, tensor in tensors.items() if any(mark in name for mark in marks)}


def open_complete(folder):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def inputs_of(folder):
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    return processor, processor(text=[text], images=[picture()], return_tensors="pt")


@torch.no_grad()
def see(model, folder):
    return model(**inputs_of(folder)[1]).logits


def assert_same_processor(folder, base):
    (processor, made), (expected, inputs) = inputs_of(folder), inputs_of(base)
    assert type(processor) is type(expected)
    assert made.keys() == inputs.keys()
    assert all(torch.equal(made[name], inputs[name]) for name in inputs)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "smolvlm"])
def test_a_merged_checkpoint_answers_a_picture_as_plain_peft_does_on_the_complete_base(tune, tmp_path, family):
    base, adapter, out = build_image_text(tmp_path / "base", family), tmp_path / "adapter", tmp_path / "merged"
    tuned = tune(base)
    save_adapter(tuned.adapted, adapter)
    certificate = export_tuned(tuned, merged_format(), out)
    others = outside_text(stored(base))
    merged = stored(out)
    assert certificate["checkpoint"]["towers"]["tensors"] == certificate["checkpoint"]["towers"]["equal"] == len(others)
    assert all(torch.equal(merged[name], tensor) for name, tensor in others.items())
    assert merged.keys() == stored(base).keys()
    assert_same_processor(out, base)
    assert_same_processor(adapter, base)
    expected = see(PeftModel.from_pretrained(open_complete(base), adapter).eval(), base)
    answered = see(open_complete(out), out)
    torch.testing.assert_close(answered, expected, atol=1e-4, rtol=1e-4)
    assert (answered - see(open_complete(base), base)).abs().max() > 0.1
    numbers = certificate["checkpoint"]["picture"]
    assert numbers["kl_mean"] < 1e-6 < 1e-3 < min(numbers["effect_kl"], numbers["other_kl"])


def test_a_merge_of_an_adapter_that_does_nothing_is_the_base(tune, tmp_path, console):
    base, out = build_image_text(tmp_path / "base", "gemma3"), tmp_path / "merged"
    certificate = export_tuned(tune(base, 0.0), merged_format(), out)
    equal = certificate["checkpoint"]["towers"]["equal"]
    line = f"towers: {equal} tensors equal to the base; processor files: 2; one picture: within its limit"
    assert line in " ".join(console.file.getvalue().split())
    before, after = stored(base), stored(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(see(open_complete(out), out), see(open_complete(base), base))


def test_towers_keep_their_bytes_in_a_merge_to_another_number_format_from_a_sharded_base(tune, tmp_path):
    base, out = build_image_text(tmp_path / "base", "gemma3"), tmp_path / "merged"
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    assert len([*base.glob("*.safetensors")]) > 2
    certificate = export_tuned(tune(base), merged_format(dtype="float32"), out)
    weights, index = stored(out), json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in weights.values())
    others = outside_text(stored(base))
    assert {one.dtype for one in others.values()} == {torch.bfloat16}
    assert all(weights[name].dtype == one.dtype and torch.equal(weights[name], one) for name, one in others.items())
    assert certificate["checkpoint"]["towers"]["equal"] == len(others)
    assert weights["language_model.model.norm.weight"].dtype == torch.float32
    assert open_complete(out).dtype == torch.float32


def rename_as_on_the_hub(base):
    """Rename the tower's tensors as in checkpoints of older versions of transformers."""
    tensors = load_file(base / "model.safetensors")
    tensors = {re.sub("^vision_tower.", "vision_tower.vision_model.", name): one for name, one in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_tensors_keep_older_names_of_a_base(tune, tmp_path):
    base, out = build_image_text(tmp_path / "base", "gemma3"), tmp_path / "merged"
    rename_as_on_the_hub(base)
    certificate = export_tuned(tune(base), merged_format(), out)
    assert stored(out).keys() == stored(base).keys()
    assert certificate["checkpoint"]["towers"]["equal"] == len(outside_text(stored(base)))
    open_complete(out)


@pytest.mark.parametrize("onto", [pytest.param("original", marks=pytest.mark.slow), "dequantized"])
def test_a_4_bit_adapter_is_merged_into_a_complete_checkpoint(tune, tmp_path, onto):
    base = build_image_text(tmp_path / "base", "gemma3", intermediate_size=128)
    tuned = tune(base, 3.0, adapter={"method": "qlora"})  # rounding changes few choices next to a strong adapter
    checked = export_tuned(tuned, merged_format(onto=onto), tmp_path / "merged")["checkpoint"]
    assert checked["towers"]["equal"] == len(outside_text(stored(base)))
    assert checked["picture"]["kl_mean"] < (1e-6 if onto == "dequantized" else checked["picture"]["limit"])


def test_a_quantised_checkpoint_keeps_its_towers_as_they_are(tune, tmp_path):
    base, out = build_image_text(tmp_path / "base", "qwen2_5_vl"), tmp_path / "fp8"
    certificate = export_tuned(tune(base), quantized_format("fp8"), out)
    weights, others = stored(out), outside_text(stored(base))
    assert all(torch.equal(weights[name], tensor) for name, tensor in others.items())
    assert certificate["checkpoint"]["towers"]["equal"] == len(others)
    assert certificate["checkpoint"]["picture"]["kl_mean"] < certificate["checkpoint"]["picture"]["limit"]
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert any(name.startswith("model.visual.") for name in ignored)


def test_a_gguf_file_of_the_language_model_has_one_with_the_towers_next_to_it(tune, tmp_path):
    base = build_image_text(tmp_path / "base", "gemma3", layer_types=["sliding_attention"] * 2)
    rename_as_on_the_hub(base)
    certificate = export_tuned(tune(base), gguf_format("f32"), tmp_path / "gguf")
    reader = GGUFReader(tmp_path / "gguf" / certificate["projector"]["file"])
    assert reader.get_field("general.type").contents() == "mmproj"
    assert certificate["projector"]["tensors"] == len(reader.tensors) > 30
    stem = next(one for one in reader.tensors if one.name == "v.patch_embd.weight")
    weight = stored(base)["vision_tower.vision_model.embeddings.patch_embedding.weight"]
    torch.testing.assert_close(torch.tensor(stem.data).float(), weight, atol=1e-3, rtol=1e-3)
    assert (
        export_tuned(tune(base), gguf_format("f32", adapter_only=True), tmp_path / "adapter")["adapter"]["modules"]
        == 14
    )


def test_towers_that_llama_cpp_does_not_know_are_named_next_to_the_language_model(tune, tmp_path, console):
    base = build_image_text(tmp_path / "base", "internvl")
    certificate = export_tuned(tune(base), gguf_format("f32"), tmp_path / "gguf")
    reason = "llama.cpp's converter does not know the towers of InternVLForConditionalGeneration"
    assert certificate["projector"] == {"not_written": reason}
    assert f"towers: {reason}" in console.file.getvalue()


def test_a_configuration_without_a_field_that_llama_cpp_reads_is_named_with_its_class(tmp_path):
    config = AutoConfig.from_pretrained(build_image_text(tmp_path, "gemma4"))
    for rope in config.text_config.rope_parameters.values():
        rope["rope_type"] = "default"
    with pytest.raises(EnvironmentProblem, match=r"a Gemma4\w+: it does not find 'global_head_dim'") as raised:
        check_convertible(config)
    assert raised.value.problems[0].where == "deploy"


def test_onnx_refuses_a_model_with_three_positions_for_a_token(tune, tmp_path):
    base = build_image_text(tmp_path / "base", "qwen2_5_vl")
    with pytest.raises(RecipeError, match="one position for each token, and qwen2_5_vl has three"):
        export_tuned(tune(base), onnx_format(), tmp_path / "onnx")


# Text alone


def test_the_text_alone_is_merged_into_a_folder_of_its_own_class(tune, tmp_path):
    base, out = build_image_text(tmp_path / "base", "gemma3"), tmp_path / "merged"
    certificate = export_tuned(tune(base), merged_format(text_only=True), out)
    assert certificate["text_only"]
    assert "checkpoint" not in certificate
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
    assert not outside_text(stored(out))
    assert not (out / "processor_config.json").exists()


def test_a_base_without_its_processor_is_named_and_merged_as_text_alone_only_on_request(tune, tmp_path):
    base = build_image_text(tmp_path / "base", "llava")
    for file in ("processor_config.json", "preprocessor_config.json"):
        (base / file).unlink()
    with pytest.raises(EnvironmentProblem, match=r"none of its processor's files: processor_config\.json") as raised:
        export_tuned(tune(base), merged_format(), tmp_path / "merged")
    assert "Or merge its text alone: llmtune deploy merge RUN --text-only" in str(raised.value)
    assert str(raised.value).count(str(base)) == 1
    assert export_tuned(tune(base), merged_format(text_only=True), tmp_path / "text")["passed"]


@pytest.mark.parametrize("product", ["merged", "fp8"])
@pytest.mark.parametrize(
    ("family", "files", "names"),
    [
        ("gemma3", ["preprocessor_config.json"], "cannot be opened: it has no preprocessor_config.json"),
        ("llava", ["preprocessor_config.json", "processor_config.json"], "none of its processor's files"),
    ],
)
def test_a_base_whose_processor_cannot_be_opened_is_named_before_training(tmp_path, product, family, files, names):
    base = build_image_text(tmp_path / "base", family)
    for file in files:
        (base / file).unlink()
    recipe = write_recipe(tmp_path / "recipe.yaml", base, write_colours(tmp_path / "rows.jsonl"), deploy=[product])
    result = invoke("run", recipe, "--out", tmp_path / "run")
    output = " ".join(result.output.split())
    assert result.exit_code == 4, output
    assert names in output
    assert f"remove '{product}' from `deploy`, run the recipe, and then: llmtune deploy merge RUN --text-only" in output
    assert not (tmp_path / "run/adapter").exists()


def test_a_base_without_a_part_for_images_needs_no_processor(tune, tmp_path):
    build("image-text", "mistral4", tmp_path / "base")  # transformers lists the class for images alone
    certificate = export_tuned(tune(tmp_path / "base"), merged_format(), tmp_path / "merged")
    assert certificate["passed"]
    assert "checkpoint" not in certificate


def test_text_alone_is_not_advised_where_transformers_has_no_class_for_it(tune, tmp_path):
    base = build_image_text(tmp_path / "base", "qwen2_5_vl")
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(EnvironmentProblem, match="its processor cannot be opened") as raised:
        export_tuned(tune(base), merged_format(), tmp_path / "merged")
    assert raised.value.problems[0].fix == "Download the model again with all files."


def test_text_alone_is_refused_where_it_means_nothing(tune, tiny_llama, tmp_path):
    with pytest.raises(RecipeError, match="reads text alone"):
        export_tuned(tune(tiny_llama), merged_format(text_only=True), tmp_path / "merged")
    base = build_image_text(tmp_path / "base", "qwen2_5_vl")
    with pytest.raises(RecipeError, match=r"no class for the text of .* \(qwen2_5_vl_text\) alone"):
        export_tuned(tune(base), merged_format(text_only=True), tmp_path / "merged")


def test_a_head_and_vectors_are_merged_into_a_complete_checkpoint_and_pairs_are_refused(tmp_path):
    base = build_image_text(tmp_path / "base", "gemma3")
    brief = {"train": {"max_steps": 1, "num_train_epochs": None}, "deploy": ["merged"], **SILENT}
    for task, rows in (("classify", colour_rows(40)), ("embed", searched(24))):
        run_recipe(tmp_path / task, base, rows, task, **brief)
        merged = stored(tmp_path / task / "run/merged")
        others = outside_text(stored(base))
        assert sum(any(torch.equal(one, other) for other in merged.values()) for one in others.values()) == len(others)
    with pytest.raises(
        RecipeError, match=r"pairs of texts to the model.s processor(.|\n)*without 'merged' in `deploy`"
    ):
        run_recipe(tmp_path / "rerank", base, judged(24), "rerank", **brief)


# Complete runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image-text")
    base = build_image_text(folder / "base", "gemma3")
    sections = {"train": {"max_steps": 2, "num_train_epochs": None, "learning_rate": 1e-2}, "deploy": ["merged"]}
    recipe = write_recipe(folder / "recipe.yaml", base, write_colours(folder / "rows.jsonl"), **sections)
    result = invoke("run", recipe, "--out", folder / "run")
    assert result.exit_code == 0, result.output
    return folder


def copy_merged(run, tmp_path):
    return shutil.copytree(run / "run/merged", tmp_path / "merged")


def change(folder, name, times=1.001):
    file = next(file for file in folder.glob("model*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name] = tensors[name] * times
    save_file(tensors, file, metadata={"format": "pt"})


def assert_named(run, folder, *messages):
    result = invoke("deploy", "certify", folder, "--run", run / "run")
    assert result.exit_code == 6, result.output
    for message in messages:
        assert message in " ".join(result.output.split())


def test_a_merged_checkpoint_of_a_run_passes_certify(run, tmp_path):
    result = invoke("deploy", "certify", copy_merged(run, tmp_path), "--run", run / "run", "--json")
    assert result.exit_code == 0, result.output


def test_a_changed_tensor_of_a_tower_fails_the_certificate(run, tmp_path):
    name, folder = "vision_tower.encoder.layers.1.mlp.fc1.weight", copy_merged(run, tmp_path)
    change(folder, name)
    assert_named(run, folder, f"1 of 48 tensors of model.vision_tower are not the base's bytes, such as model.{name}")


def test_a_projector_of_another_model_fails_the_certificate(run, tmp_path):
    folder = copy_merged(run, tmp_path)
    change(folder, "multi_modal_projector.mm_input_projection_weight", -1.0)
    assert_named(
        run,
        folder,
        "tensors of model.multi_modal_projector are not the base's bytes",
        "asked about a picture, its mean KL",
    )


@pytest.mark.slow
def test_a_merge_of_an_adapter_on_the_tower_fails_the_certificate(run, tmp_path):
    folder = copy_merged(run, tmp_path)
    for layer in (0, 1):
        change(folder, f"vision_tower.encoder.layers.{layer}.self_attn.q_proj.weight")
    assert_named(run, folder, "2 of 48 tensors of model.vision_tower are not the base's bytes")


@pytest.mark.parametrize(
    "name", ["processor_config.json", pytest.param("preprocessor_config.json", marks=pytest.mark.slow)]
)
def test_a_missing_processor_file_fails_the_certificate(run, tmp_path, name):
    folder = copy_merged(run, tmp_path)
    (folder / name).unlink()
    assert_named(run, folder, name)


@pytest.mark.parametrize("option", ["--merged", "--despite-gates"])
def test_a_card_says_that_the_model_was_tuned_on_text_and_its_code_loads_the_complete_model(run, tmp_path, option):
    result = invoke("deploy", "publish", run / "run", "--to", tmp_path / "hub", option)
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "hub/README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "It was tuned on text." in card.text
    assert (tmp_path / "hub/processor_config.json").is_file()
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert "AutoModelForImageTextToText.from_pretrained(" in code
    exec(code.replace('"base"', repr(str(run / "base"))).replace('"tiny"', repr(str(tmp_path / "hub"))), {})
