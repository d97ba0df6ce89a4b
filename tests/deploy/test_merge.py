from __future__ import annotations

import json
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmtune.deploy.merge as merging
from llmtune.deploy.merge import merge_model
from llmtune.deploy.parity import LIMITS, Parity, find_breaches
from llmtune.errors import EnvironmentProblem, GateFailed, RecipeError
from llmtune.tasks import get_task

TEXT = "Which colour has the cat number 7?"


def merge(tuned, out, console, **options):
    adapted, recipe = tuned
    return merge_model(adapted, recipe, get_task(recipe.task), out, console, **options)


@torch.no_grad()
def logits_of(model, processor):
    return model(**processor(TEXT, return_tensors="pt")).logits


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_merged_folder_gives_the_adapters_logits_in_plain_transformers(tune, tmp_path, console, adapter):
    tuned = tune(adapter=adapter)
    wanted = logits_of(tuned[0].model, tuned[0].selected.processor)
    certificate = merge(tuned, tmp_path / "merged", console)
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')\n"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2], return_tensors='pt')\n"
        "torch.save(model(**ids).logits.detach(), sys.argv[3])\n"
        "assert not any(name.split('.')[0] in ('llmtune', 'peft') for name in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "merged", TEXT, tmp_path / "logits.pt"]
    subprocess.run(command, check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-3, rtol=1e-3)
    assert certificate["passed"]
    assert certificate["measured"]["effect_kl"] > 0.001
    assert certificate["measured"]["kl_mean"] < 1e-6
    assert certificate["measured"]["answer_agreement"] == 1
    assert json.loads((tmp_path / "merged/certificate.json").read_text()) == json.loads(json.dumps(certificate))
    assert "parity with the adapter" in console.file.getvalue()


def test_a_merge_that_forgets_the_adapter_fails_and_leaves_no_model(tune, tmp_path, console, monkeypatch):
    monkeypatch.setattr(merging, "merge", lambda adapted, onto: adapted.model.unload())
    with pytest.raises(GateFailed, match="mean KL") as raised:
        merge(tune(), tmp_path / "merged", console)
    assert raised.value.exit_code == 6
    assert not (tmp_path / "merged").exists()
    certificate = json.loads((tmp_path / "merged.failed.json").read_text())
    assert not certificate["passed"]
    assert certificate["measured"]["kl_mean"] > certificate["limits"]["kl_mean"]


def save_with_another_template(processor, folder):
    other = AutoTokenizer.from_pretrained(processor.name_or_path)
    other.chat_template = other.chat_template.replace("assistant", "helper")
    other.save_pretrained(folder)


def test_a_template_that_is_saved_differently_fails(tune, tmp_path, console, monkeypatch):
    monkeypatch.setattr(merging, "save_tokenizer", save_with_another_template)
    with pytest.raises(GateFailed, match="other token ids"):
        merge(tune(), tmp_path / "merged", console)


def test_a_good_merge_after_a_failed_one_clears_its_certificate(tune, tmp_path, console, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(merging, "merge", lambda adapted, onto: adapted.model.unload())
        with pytest.raises(GateFailed):
            merge(tune(), tmp_path / "merged", console)
    assert (tmp_path / "merged.failed.json").exists()
    assert merge(tune(), tmp_path / "merged", console)["passed"]
    assert not (tmp_path / "merged.failed.json").exists()
    assert merge(tune(strength=0.2), tmp_path / "merged", console)["passed"]


@pytest.mark.parametrize(
    ("onto", "dtype"), [("original", "auto"), ("dequantized", "auto"), ("dequantized", "bfloat16")]
)
def test_qlora_is_held_to_the_quantised_base_it_was_trained_on(tune, tmp_path, console, onto, dtype):
    tuned = tune(adapter={"method": "qlora"})
    measured = merge(tuned, tmp_path / "merged", console, onto=onto, dtype=dtype)["measured"]
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization_config" not in config
    if onto == "dequantized":
        assert measured["kl_mean"] < (1e-6 if dtype == "auto" else 1e-3)
    else:
        assert measured["kl_mean"] > 1e-6


def test_qlora_on_an_original_too_far_away_fails_and_names_the_cure(tune, tmp_path, console, monkeypatch):
    monkeypatch.setitem(merging.LIMITS, "other base", LIMITS["exact"])
    with pytest.raises(GateFailed, match="--onto dequantized"):
        merge(tune(adapter={"method": "qlora"}), tmp_path / "merged", console)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_number_format_is_the_one_that_was_asked_for(tune, tmp_path, console, dtype):
    certificate = merge(tune(), tmp_path / "merged", console, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}" == f"torch.{certificate['dtype']}"


def test_large_models_are_cut_into_files_with_an_index(tune, tmp_path, console, monkeypatch):
    monkeypatch.setattr(merging, "SHARD_SIZE", "100KB")
    certificate = merge(tune(), tmp_path / "merged", console)
    assert len(certificate["files"]) > 1
    assert (tmp_path / "merged/model.safetensors.index.json").is_file()


def test_template_of_the_recipe_and_stop_tokens_go_into_the_folder(tune, tmp_path, console):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tuned = tune(model={"chat_template": str(template)})
    merge(tuned, tmp_path / "merged", console)
    saved = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert saved.chat_template == template.read_text()
    settings = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert saved.eos_token_id in settings["eos_token_id"]
    assert "max_new_tokens" not in settings


def test_all_mistakes_of_a_call_are_told_at_once(tune, tmp_path, console):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not lose me")
    with pytest.raises(RecipeError) as raised:
        merge(tune(), tmp_path / "mine", console, onto="dequantized", dtype="int3")
    assert len(raised.value.problems) == 3
    assert (tmp_path / "mine/thesis.txt").exists()


def test_nan_is_a_breach():
    parity = Parity(8, 100, float("nan"), float("nan"), float("nan"), 1.0, 1.0, True, 0.5)
    assert len(find_breaches(parity, LIMITS["exact"])) == 2


def test_completion_merges_as_well(tune, tiny_gpt2, tmp_path, console):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "The quick brown fox."}\n')
    certificate = merge(tune(tiny_gpt2, task="completion", data={"train": str(rows)}), tmp_path / "merged", console)
    assert certificate["passed"]
    assert certificate["measured"]["effect_kl"] > 0.001


@contextmanager
def files_of_at_most(size: int):
    """What writes beyond `size` bytes fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_for_the_weights_is_explained_and_nothing_is_left(tune, tmp_path, console):
    with files_of_at_most(50_000), pytest.raises(EnvironmentProblem, match=r"cannot be written .* are free") as raised:
        merge(tune(), tmp_path / "out" / "merged", console)
    assert "--out" in str(raised.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a place where not even root may write")
def test_a_place_where_one_may_not_write_is_explained(tune, console):
    with pytest.raises(EnvironmentProblem, match="cannot be read or written"):
        merge(tune(), Path("/sys/merged"), console)


def test_a_file_where_a_folder_is_needed_is_told_before_the_work(tune, tmp_path, console):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(RecipeError, match="a file stands where a folder is needed"):
        merge(tune(), tmp_path / "notes" / "merged", console)


def test_a_template_that_a_server_would_render_otherwise_fails(tune, tmp_path, console, monkeypatch):
    tuned = tune()
    with monkeypatch.context() as patch:
        patch.setattr(
            merging, "load_processor", lambda place, model: tuned[0].selected.processor
        )  # ours is right, the saved one is not
        patch.setattr(merging, "save_tokenizer", save_with_another_template)
        with pytest.raises(GateFailed, match="other token ids"):
            merge(tuned, tmp_path / "merged", console)
