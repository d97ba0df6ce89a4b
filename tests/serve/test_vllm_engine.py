import pytest
from peft import LoraConfig, MissConfig
from support.models import CHATML
from support.templates import ALWAYS_THINKS, HERMES

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
