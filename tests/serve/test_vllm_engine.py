import json

import pytest
from peft import LoraConfig, MissConfig
from support.models import CHATML
from support.templates import ALWAYS_THINKS, HERMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from llmtune.adapter.vllm_lora import UNMAPPED, WITHOUT_LORA, find_vllm_obstacle
from llmtune.errors import RecipeError
from llmtune.serve.vllm_engine import check_vllm_adapter, parser_options

CALLS = ["--enable-auto-tool-choice", "--tool-call-parser"]


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (CHATML, []),
        (HERMES, [*CALLS, "hermes"]),
        (HERMES + "{% if enable_thinking %}{% endif %}", [*CALLS, "hermes", "--reasoning-parser", "qwen3"]),
        (HERMES + "<function=", [*CALLS, "qwen3_xml"]),
        ("<｜Assistant｜>{% if thinking %}<think>{% endif %}", ["--reasoning-parser", "deepseek_v3"]),
        ("<｜Assistant｜>{{ content.split('</think>')[-1] }}", []),
        ("<|start|>assistant<|channel|>final", [*CALLS, "openai", "--reasoning-parser", "openai_gptoss"]),
        ("[TOOL_CALLS]", [*CALLS, "mistral"]),
        ("<|tool_call_start|>", [*CALLS, "lfm2"]),
        ("<minimax:tool_call>{{ '<think>' }}", [*CALLS, "minimax_m2", "--reasoning-parser", "minimax_m2"]),
        (ALWAYS_THINKS.replace("\n", r"\n"), ["--reasoning-parser", "deepseek_r1"]),
    ],
)
def test_vllm_gets_the_parsers_that_match_the_template(template, options):
    assert parser_options(template) == options


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(target_modules=["q_proj"], target_parameters=["gate_up_proj"]), "experts.*merge it"),
        (
            LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5]),
            "activated by tokens",
        ),
        (MissConfig(target_modules=["q_proj"]), "it is of miss"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "DoRA.*merge it"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules are fully trained"),
        (LoraConfig(target_modules=["q_proj"], bias="all"), "biases are trained"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5]), "tokens are trained"),
        (LoraConfig(target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 4}), "different scales"),
    ],
)
def test_adapters_that_vllm_would_not_apply_as_trained_are_refused(config, words):
    with pytest.raises(RecipeError, match=f"(?s){words}"):
        check_vllm_adapter(config, "adapter")
    check_vllm_adapter(LoraConfig(target_modules=["q_proj"]), "adapter")
    scaled = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 16}}
    check_vllm_adapter(LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "k_proj"], **scaled), "adapter")


def test_the_classes_without_adapters_in_vllm_are_classes_of_transformers():
    older_name = "Ernie4_5_VL_MoeForConditionalGeneration"
    assert {older_name} == {*WITHOUT_LORA, *UNMAPPED} - {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    assert not WITHOUT_LORA & UNMAPPED


@pytest.mark.parametrize(
    ("architectures", "says"),
    [
        (["Gemma3nForConditionalGeneration"], "has no LoRA for Gemma3n"),
        (["Molmo2ForConditionalGeneration"], "does not map the names"),
        (["Gemma3ForConditionalGeneration"], None),
        (None, None),
    ],
)
def test_the_class_that_a_checkpoint_names_decides_whether_vllm_applies_an_adapter(tmp_path, architectures, says):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any", "architectures": architectures}))
    obstacle = find_vllm_obstacle(tmp_path)
    assert obstacle is None if says is None else says in obstacle
