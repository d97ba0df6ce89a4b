import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from support.adapting import build_family
from support.exports import export_tuned
from support.models import build_llama
from support.runs import finish_run
from support.templates import EMPTY_THOUGHTS
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmtune.deploy.merged_model as merging
import llmtune.model.processor as processor
from llmtune.adapter.injection import trained_parameters
from llmtune.adapter.merging import merge_adapter as really_merge
from llmtune.deploy.export import export
from llmtune.deploy.merged_model import merged_format
from llmtune.deploy.parity import LIMITS, Parity, find_breaches
from llmtune.deploy.search_parity import make_reference
from llmtune.errors import EnvironmentProblem, GateFailed, RecipeError
from llmtune.plan import open_finished

TEXT = "Which colour has the cat number 7?"


@torch.no_grad()
def logits_of(model, processor):
    return model(**processor(TEXT, return_tensors="pt")).logits


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = AutoTokenizer.from_pretrained(folder)(sys.argv[1], return_tensors="pt")
    torch.save(model(**ids).logits.detach(), folder + ".pt")
assert not any(name.split(".")[0] in ("llmtune", "peft") for name in sys.modules)
"""


def test_a_merged_folder_has_the_adapters_logits_in_plain_transformers(tune, tmp_path, console):
    expected = {}
    for name, adapter in {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}.items():
        tuned, out = tune(adapter=adapter), tmp_path / name
        expected[out] = logits_of(tuned.model, tuned.processor)
        certificate = export_tuned(tuned, merged_format(), out)
        assert certificate["passed"]
        assert certificate["measured"]["effect_kl"] > 0.001
        assert certificate["measured"]["kl_mean"] < 1e-6
        assert certificate["measured"]["answer_agreement"] == 1
        assert json.loads((out / "certificate.json").read_text()) == json.loads(json.dumps(certificate))
    subprocess.run([sys.executable, "-c", PLAIN, TEXT, *expected], check=True, capture_output=True)
    for out, logits in expected.items():
        torch.testing.assert_close(torch.load(f"{out}.pt"), logits, atol=1e-3, rtol=1e-3)
    assert "parity with the adapter is within all limits of its certificate" in console.file.getvalue()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's, of SHiRA
def test_an_adapter_of_a_method_without_biases_is_certified(tune, tmp_path, console):
    tuned = tune(adapter={"method": "shira", "r": 2, "lora_alpha": None})
    for parameter in trained_parameters(tuned.model):
        parameter.data.add_(0.1)
    certificate = export_tuned(tuned, merged_format(), tmp_path / "merged")
    assert certificate["passed"]
    assert certificate["measured"]["effect_kl"] > 1e-6


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT's
def test_prompt_vectors_are_refused_before_any_question(tune, tmp_path, console):
    tuned = tune(adapter={"method": "prompt_tuning", "r": None, "lora_alpha": None, "num_virtual_tokens": 4})
    with pytest.raises(RecipeError, match="an adapter of prompt_tuning cannot be merged: its vectors come before"):
        export_tuned(tuned, merged_format(), tmp_path / "merged")
    assert make_reference(tuned).effect > 0


def fails(tuned, out, message, **options):
    with pytest.raises(GateFailed, match=message) as raised:
        export_tuned(tuned, merged_format(**options), out)
    assert raised.value.exit_code == 6
    assert not out.exists()
    return json.loads(out.with_name(f"{out.name}.failed.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_expert_adapters_are_merged_and_a_reader_that_drops_them_fails(tune, tmp_path, monkeypatch, method):
    model = build_family(
        tmp_path / "moe", "qwen3_moe", num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2, vocab_size=512
    )
    adapter = {"method": method, "target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"]}
    onto = "dequantized" if method == "qlora" else "original"
    assert export_tuned(tune(model, 3.0, adapter=adapter), merged_format(onto=onto), tmp_path / "whole")["passed"]

    def merge_and_drop(adapted, onto):
        for module in adapted.model.modules():
            if isinstance(module, ParamWrapper):
                module.lora_B["default"].weight.data.zero_()
        return really_merge(adapted, onto)

    monkeypatch.setattr(merging, "merge_weights", merge_and_drop)
    fails(tune(model, 3.0, adapter=adapter), tmp_path / "dropped", "the merged model differs", onto=onto)


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 0.1), ("bfloat16", 2.0)])
def test_a_merge_with_one_weight_matrix_disturbed_fails(tune, tmp_path, monkeypatch, dtype, noise):
    def merge_and_disturb(adapted, onto):
        merged = really_merge(adapted, onto)
        weight = merged.model.layers[1].mlp.down_proj.weight
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
        weight.data += noise * weight.std() * drawn.to(weight)
        return merged

    monkeypatch.setattr(merging, "merge_weights", merge_and_disturb)
    fails(tune(), tmp_path / "merged", "the merged model differs", dtype=dtype)


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_a_qlora_merge_into_another_model_of_the_same_shape_fails(tune, tmp_path, onto):
    tuned = tune(adapter={"method": "qlora"})
    selected = tuned.adapted.selected
    other = replace(selected.model_ref, path=build_llama(tmp_path / "other", seed=9))
    swapped = replace(tuned.adapted, selected=replace(selected, model_ref=other))
    fails(replace(tuned, adapted=swapped), tmp_path / "merged", "mean KL", onto=onto)


def test_a_base_that_changed_since_training_is_refused_before_any_merge(tmp_path, console):
    base = build_llama(tmp_path / "base")
    brief = {"num_train_epochs": None, "max_steps": 1}
    run = finish_run(tmp_path, base, adapter={"method": "qlora"}, train=brief)
    build_llama(base, seed=9)
    with pytest.raises(EnvironmentProblem, match="the model's content differs from the lock"):
        export(open_finished(run, console, offline=True), merged_format(onto="original"))
    assert not (run / "merged").exists()


def test_nan_and_a_lost_weak_tuning_are_breaches():
    nan = Parity(float("nan"), float("nan"), float("nan"), 1.0, 8, 100, 1.0, True, 0.5, None)
    assert len(find_breaches(nan, LIMITS["exact"])) == 2
    lost = Parity(0.1, 8e-3, 0.1, 0.99, 8, 100, 1.0, True, effect_kl=8e-3, kl_from_base=None)
    assert len(find_breaches(lost, LIMITS["rounded"])) == 1
    assert find_breaches(replace(lost, kl_mean=4e-3), LIMITS["rounded"]) == []


def test_qlora_is_compared_with_its_quantised_base_and_reports_the_other_merge(tune, tmp_path, console):
    near = export_tuned(tune(adapter={"method": "qlora"}), merged_format(onto="dequantized"), tmp_path / "near")
    far = export_tuned(tune(adapter={"method": "qlora"}), merged_format(onto="original"), tmp_path / "far")
    assert near["measured"]["kl_mean"] < 1e-6 < far["measured"]["kl_mean"]
    assert "quantization_config" not in json.loads((tmp_path / "near/config.json").read_text())
    assert near["other"]["onto"] == "original"
    assert near["other"]["kl_mean"] == pytest.approx(far["measured"]["kl_mean"], rel=1e-3)
    assert far["other"]["kl_mean"] == pytest.approx(near["measured"]["kl_mean"], abs=1e-6)
    assert "merged onto the original weights instead it would be: mean KL" in console.file.getvalue()
    rounded = export_tuned(
        tune(adapter={"method": "qlora"}), merged_format(onto="dequantized", dtype="bfloat16"), tmp_path / "16"
    )
    assert rounded["measured"]["kl_mean"] < 1e-3


def test_qlora_on_a_distant_original_fails_and_names_the_fix(tune, tmp_path, console, monkeypatch):
    monkeypatch.setitem(merging.LIMITS, "other base", LIMITS["exact"])
    with pytest.raises(GateFailed, match="--onto dequantized"):
        export_tuned(tune(adapter={"method": "qlora"}), merged_format(onto="original"), tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_merged_dtype_is_the_requested_one(tune, tmp_path, console, dtype):
    certificate = export_tuned(tune(), merged_format(dtype=dtype), tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}" == f"torch.{certificate['dtype']}"


def test_large_models_are_split_into_files_with_an_index(tune, tmp_path, console, monkeypatch):
    monkeypatch.setattr(merging, "SHARD_SIZE", "100KB")
    certificate = export_tuned(tune(), merged_format(), tmp_path / "merged")
    assert len(certificate["files"]) > 1
    assert (tmp_path / "merged/model.safetensors.index.json").is_file()


def test_template_of_the_recipe_and_stop_tokens_go_into_the_folder(tune, tmp_path, console):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tuned = tune(model={"chat_template": str(template)})
    export_tuned(tuned, merged_format(), tmp_path / "merged")
    saved = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert saved.chat_template == template.read_text()
    settings = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert saved.eos_token_id in settings["eos_token_id"]
    assert "max_new_tokens" not in settings


def test_template_values_are_saved_in_the_folder_and_not_sent_when_certifying(tune, tmp_path, console):
    (tmp_path / "mine.jinja").write_text(EMPTY_THOUGHTS)
    kwargs = {"enable_thinking": False}
    tuned = tune(model={"chat_template": str(tmp_path / "mine.jinja"), "chat_template_kwargs": kwargs})
    certificate = export_tuned(tuned, merged_format(), tmp_path / "merged")
    assert certificate["measured"]["same_ids"]
    saved = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = {"conversation": [{"role": "user", "content": "two?"}], "add_generation_prompt": True, "tokenize": False}
    assert saved.apply_chat_template(**asked).endswith("<think>\n\n</think>\n\n")
    assert not saved.apply_chat_template(**asked, enable_thinking=True).endswith("</think>\n\n")


def test_a_merged_folder_whose_template_lost_its_values_fails(tune, tmp_path, monkeypatch):
    (tmp_path / "mine.jinja").write_text(EMPTY_THOUGHTS)
    model = {"chat_template": str(tmp_path / "mine.jinja"), "chat_template_kwargs": {"enable_thinking": False}}
    monkeypatch.setattr(processor, "with_defaults", lambda template, kwargs: template)
    tuned = tune(model=model)
    with pytest.raises(GateFailed, match="token ids"):
        export_tuned(tuned, merged_format(), tmp_path / "merged")


def test_all_problems_of_a_merge_call_are_reported_at_once(tune, tmp_path, console):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not lose me")
    with pytest.raises(RecipeError) as raised:
        export_tuned(tune(), merged_format(onto="dequantized", dtype="int3"), tmp_path / "mine")
    assert len(raised.value.problems) == 3
    with pytest.raises(RecipeError, match="expected a folder, found a file"):
        export_tuned(tune(), merged_format(), tmp_path / "mine/thesis.txt/merged")
    assert (tmp_path / "mine/thesis.txt").exists()
