"""Failures that must be impossible in deployment: each test provokes one without its guard, then sees it caught."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.runs import invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.deploy.merged_model import save_tokenizer

IDS = torch.arange(5, 25)[None]


@pytest.fixture
def finished(run, place: Path) -> Path:
    """A run whose adapter has an effect."""
    run("run", train={"num_train_epochs": 2, "learning_rate": 0.05})
    return place


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def merge(code: int) -> str:
    result = invoke("deploy", "merge", "run")
    assert result.exit_code == code, (result.stderr, result.exception)
    return result.stderr


@pytest.mark.guarantee(
    19,
    cannot="a merged, quantised or exported model that differs from the trained one",
    kept="Each export is read back from disk, compared with the trained model on its own rows, and gets a certificate; "
    "one that differs is not kept.",
    shows="error the merged model differs: the adapter is lost: its weights moved by ...% of what tuning did to the "
    "base model's -> The product was deleted; the numbers are in run/merged.failed.json.",
    also=["deploy/test_merged_model.py", "deploy/test_gguf_export.py", "deploy/test_endpoint_parity.py"],
    cases=["merged_adapter", "merged_into_four_bits", "merged_with_head", "gguf_metadata"],
)
def test_a_merge_without_the_adapter_fails_and_leaves_no_model(finished, without, shows):
    with without("llmtune.deploy.merged_model.merge_weights", lambda adapted, onto: adapted.model.unload()):
        with (
            without("llmtune.deploy.parity_reference.find_breaches", lambda parity, limits: []),
            without("llmtune.deploy.parity_reference.find_lost_steps", lambda *steps: []),
        ):
            merge(0)
        torch.testing.assert_close(logits(finished / "run/merged"), logits(finished / "model"))  # the tuning is lost
        (finished / "run/merged").rename(finished / "forgetful")
        shows(merge(6))
    assert not (finished / "run/merged").exists()
    merge(0)
    assert (logits(finished / "run/merged") - logits(finished / "model")).abs().max() > 0.1


@pytest.mark.guarantee(
    20,
    cannot="a different chat template in serving than in training",
    kept="Exports are read back as a user would read them, and must render the same token ids as in training.",
    shows="error the merged model differs: the saved tokenizer and chat template produce other token ids -> The "
    "product was deleted; the numbers are in run/merged.failed.json.",
    also=["serve/test_api.py::test_a_conversation_gets_the_ids_of_training_in_any_form"],
    cases=["template_in_the_folder", "thinking_switch"],
)
def test_an_export_with_another_template_fails(finished, without, shows):
    def save_another(processor, folder):
        save_tokenizer(processor, folder)
        other = AutoTokenizer.from_pretrained(folder)
        other.chat_template = other.chat_template.replace("assistant", "helper")
        other.save_pretrained(folder)

    def rendered(folder: str) -> str:
        question = [{"role": "user", "content": "Which colour?"}]
        tokenizer = AutoTokenizer.from_pretrained(finished / folder)
        return tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)

    with without("llmtune.deploy.merged_model.save_tokenizer", save_another):
        with (
            without("llmtune.deploy.parity_reference.find_breaches", lambda parity, limits: []),
            without("llmtune.deploy.parity_reference.find_lost_steps", lambda *steps: []),
        ):
            merge(0)
        assert rendered("run/merged") != rendered("model"), "a server's prompts differ from training"
        (finished / "run/merged").rename(finished / "other")
        shows(merge(6))
        with without("llmtune.deploy.exported_model.saved_processor", lambda *_: tuned_processor(finished)):
            shows(merge(6))  # correct for llmtune, wrong for a server


def tuned_processor(place: Path):
    return AutoTokenizer.from_pretrained(place / "run/adapter")
