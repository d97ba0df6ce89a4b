"""Quantised models in the format of compressed-tensors: read back by transformers, certified and scored, or refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from support.adapting import build_family
from support.exports import export_tuned
from support.models import CORPUS, build_gpt2, build_llama
from support.runs import finish_run, invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmtune.deploy.quantized_model as quantizing
from llmtune.deploy.export import export
from llmtune.deploy.gptq import find_scales, round_weights
from llmtune.deploy.merged_model import merge_to as really_merge
from llmtune.deploy.parity import Limits
from llmtune.deploy.quantized_model import SCHEMES, check_quantizable, quantized_format
from llmtune.errors import EnvironmentProblem, GateFailed, RecipeError
from llmtune.plan import open_finished
from llmtune.store.atomic_files import read_json, write_json
from llmtune.tasks.registry import get_task

STORED = {"w4a16": torch.int32, "w8a8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model that is sure of its choices."""
    folder = build_family(tmp_path_factory.mktemp("bases") / "sure", "llama", intermediate_size=128, vocab_size=512)
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(4 * model.lm_head.weight.detach())
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def quantize(tune, base, tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors")

    def make(scheme):
        tuned = tune(base)
        texts = [tuned.processor(text)["input_ids"] for text in CORPUS]
        monkeypatch.setattr(quantizing, "sample_texts", lambda tuned: texts)
        return export_tuned(tuned, quantized_format(scheme), tmp_path / scheme)

    return make


@pytest.mark.parametrize("scheme", STORED)
def test_plain_transformers_reads_a_quantised_folder_as_it_was_certified(quantize, tmp_path, monkeypatch, scheme):
    loose = replace(SCHEMES["w4a16"], limits=Limits(1, 1, 0))  # random weights of width 64 have nothing to spare
    monkeypatch.setitem(SCHEMES, "w4a16", loose)
    certificate, out = quantize(scheme), tmp_path / scheme
    assert certificate["passed"]
    assert certificate["measured"]["kl_mean"] < certificate["measured"]["effect_kl"] / 5
    state = load_file(out / "model.safetensors")
    packed = [name for name, tensor in state.items() if tensor.dtype == STORED[scheme]]
    assert len(packed) == 2 * 7  # linear layers
    assert {tensor.dtype for name, tensor in state.items() if "embed" in name or "scale" in name} == {torch.bfloat16}
    config = read_json(out / "config.json")["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["ignore"] == ["lm_head"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert read_json(out / "certificate.json") == json.loads(json.dumps(certificate))


def without(layers, kept=0.0):
    """Return a merge that scales the adapter of some layers by `kept` first."""

    def merge(tuned, onto, dtype):
        for name, module in tuned.model.named_modules():
            if isinstance(module, LoraLayer) and any(f"layers.{at}." in name for at in layers):
                module.scaling["default"] *= kept
        return really_merge(tuned, onto, dtype)

    return merge


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (without([0, 1]), "nearer to the base model .*: the adapter is lost"),
        (without([0, 1], kept=0.5), "mean KL is"),
        (without([1]), "mean KL is"),
    ],
    ids=["adapter dropped", "scale halved", "one layer with base weights"],
)
def test_a_planted_fault_fails_with_its_cause(quantize, tmp_path, monkeypatch, fault, cause):
    monkeypatch.setattr(quantizing, "merge_to", fault)
    with pytest.raises(GateFailed, match=cause):
        quantize("w8a8")
    assert not (tmp_path / "w8a8").exists()
    assert not read_json(tmp_path / "w8a8.failed.json")["passed"]


def test_gptq_changes_outputs_less_than_rounding_to_the_nearest():
    generator = torch.Generator().manual_seed(0)
    mixing_II = torch.randn(64, 64, generator=generator)
    inputs_NI = torch.randn(500, 64, generator=generator) @ mixing_II
    weight_OI = torch.randn(32, 64, generator=generator)
    scale_OG = find_scales(weight_OI, 32, bits=4)
    scale_OI = scale_OG.repeat_interleave(32, 1)
    nearest_OI = (weight_OI / scale_OI).round().clamp(-8, 7) * scale_OI
    rounded_OI = round_weights(weight_OI, scale_OG, inputs_NI.T @ inputs_NI, bits=4)
    steps_OI = rounded_OI / scale_OI
    torch.testing.assert_close(steps_OI, steps_OI.round(), atol=1e-4, rtol=0)
    assert steps_OI.abs().max() <= 8.001

    def error(other_OI):
        return float((inputs_NI @ (other_OI - weight_OI).T).square().mean())

    assert error(rounded_OI) < 0.7 * error(nearest_OI)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("compressed_tensors")
    folder = tmp_path_factory.mktemp("quantize")
    return finish_run(folder, build_llama(folder / "model"), deploy=["w8a8"])


def test_a_recipe_makes_and_scores_a_quantised_model(run):
    certificate = read_json(run / "quantized/w8a8/certificate.json")
    assert certificate["passed"]
    assert certificate["score"]["runtime"].startswith("transformers")
    assert set(certificate["score"]["difference"]) >= {"loss", "exact_match"}
    assert 0 < certificate["score"]["bytes"] == certificate["weights_bytes"] < certificate["score"]["tuned_bytes"] * 10


def test_the_command_quantises_to_four_bits_by_default(run):
    result = invoke("deploy", "quantize", run, "--json")
    assert result.exit_code == 0, result.output
    certificate = json.loads(result.stdout)
    assert (certificate["scheme"], certificate["group_size"]) == ("w4a16", 64)
    assert (run / "quantized/w4a16/config.json").is_file()


def test_an_unknown_scheme_exits_with_2(run):
    result = invoke("deploy", "quantize", run, "--scheme", "w4a166")
    assert result.exit_code == 2
    assert "'w4a166' is not a quantization scheme. Did you mean 'w4a16'?" in " ".join(result.output.split())


def test_a_missing_package_exits_with_4(run, console, monkeypatch):
    monkeypatch.setattr("llmtune.recipe.extras.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'llmtune-cli\[quantized\]'") as raised:
        export(open_finished(run, console, offline=True), quantized_format(scheme="w8a8"))
    assert raised.value.exit_code == 4


def test_bases_in_few_bits_and_models_with_heads_are_refused(run, console, tmp_path):
    plan = open_finished(run, console, offline=True).plan
    with pytest.raises(RecipeError, match="reads this format for models that continue a text"):
        check_quantizable(replace(plan, task=get_task("classify")), "w8a8")
    shutil.copytree(plan.model_ref.path, tmp_path / "fp8")
    config = read_json(tmp_path / "fp8/config.json") | {"quantization_config": {"quant_method": "fp8"}}
    write_json(tmp_path / "fp8/config.json", config)
    with pytest.raises(RecipeError, match="are already quantised; rounding them again would lose more"):
        check_quantizable(replace(plan, model_ref=replace(plan.model_ref, path=tmp_path / "fp8")), "w8a8")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (build_gpt2, "has no linear layers, which compressed-tensors cannot quantise"),
        (lambda folder: build_llama(folder, hidden_size=40), "have 40 inputs"),
        (lambda folder: build_family(folder, "qwen3_moe", num_experts=4, moe_intermediate_size=32), "fused experts"),
    ],
    ids=["gpt2", "narrow", "experts"],
)
def test_models_that_the_format_cannot_store_are_refused_before_training(tmp_path, build, said):
    pytest.importorskip("compressed_tensors")
    build(tmp_path / "model")
    with pytest.raises(RecipeError, match=said):
        finish_run(tmp_path, tmp_path / "model", deploy=["w4a16"])
    assert not (tmp_path / "runs/tiny/adapter").exists()
