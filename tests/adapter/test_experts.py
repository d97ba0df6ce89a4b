"""Fused experts: adapted, quantised, counted, saved as plain PEFT, merged; or reported as skipped."""

import pytest
import torch
from peft import PeftModel
from support.adapting import build_family, logits, open_model, quiet, recipe_with, train_a_little
from transformers import AutoModelForCausalLM

from llmtune.adapter.injection import describe_adapter, inject
from llmtune.adapter.merging import merge_adapter
from llmtune.adapter.saving import save_adapter
from llmtune.deploy.gguf_export import check_lora_only
from llmtune.errors import RecipeError
from llmtune.model.config import expert_parameters
from llmtune.model.experts import count_quantized, unpacked_experts

EXPERTS = ["gate_up_proj", "down_proj"]
SMALL = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
HEADS = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
RECURRENT = {
    "num_experts": 4,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
    **{f"linear_num_{part}_heads": 2 for part in ("key", "value")},
    **{f"linear_{part}_head_dim": 16 for part in ("key", "value")},
    **SMALL,
}
FAMILIES = {
    "qwen3_moe": {"num_experts": 4, **SMALL},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
}
MORE = {
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, **SMALL},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        **HEADS,
        "first_k_dense_replace": 0,
        **SMALL,
    },
    "deepseek_v2": {"n_routed_experts": 4, "kv_lora_rank": 16, "q_lora_rank": 16, **HEADS, **SMALL},
    "qwen3_next": RECURRENT,
    "qwen3_5_moe_text": RECURRENT,
}
APART = ("qwen3_next", "qwen3_5_moe_text")
"""Families with a recurrent state: their rows are not packed."""
SHARED = ("qwen2_moe", "qwen3_5_moe_text")
"""Families whose two shared experts are linear layers named like a fused weight."""
ALL = [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)]


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    made = {}

    def build(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = build_family(folder, family, **{**FAMILIES, **MORE}[family])
        return made[family]

    return build


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # of PEFT's own making
@pytest.mark.parametrize("family", ALL)
def test_experts_are_adapted_and_plain_peft_gives_the_same(moe, family, tmp_path):
    adapted = train_a_little(moe(family), target_parameters=EXPERTS, data={"packing": family not in APART})
    tuned = logits(adapted.model)
    with adapted.model.disable_adapter():
        assert (logits(adapted.model) - tuned).abs().max() > 0.01
    assert describe_adapter(adapted)["share_under_adapter"] > 0.4
    targets = describe_adapter(adapted)["targets"]
    assert (targets["gate_up_proj"], targets["down_proj"]) == (2, 4 if family in SHARED else 2)
    save_adapter(adapted, tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(moe(family)), tmp_path)
    torch.testing.assert_close(logits(plain.eval()), tuned, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(merge_adapter(adapted)), tuned, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ALL)
def test_in_4_bits_experts_are_quantised_too_and_adapted(moe, family, tmp_path):
    packing = {"packing": family not in APART}
    adapted = train_a_little(moe(family), method="qlora", target_parameters=EXPERTS, data=packing)
    facts, experts = describe_adapter(adapted), expert_parameters(AutoModelForCausalLM.from_pretrained(moe(family)))
    assert count_quantized(adapted.model) > sum(shape.numel() for name, shape in experts.items() if shape[1] > 8)
    assert facts["share_quantized"] > 0.5
    assert facts["quantized_bits"] == 4
    tuned = logits(adapted.model)
    assert torch.equal(logits(adapted.model), tuned), "what is unpacked is packed again"
    with adapted.model.disable_adapter():
        assert (logits(adapted.model) - tuned).abs().max() > 0.01
    assert unpacked_experts(adapted.model)
    torch.testing.assert_close(logits(merge_adapter(adapted, "dequantized")), tuned, atol=1e-3, rtol=1e-3)


def test_a_step_trains_the_experts_of_a_4_bit_base(moe):
    recipe = recipe_with(moe("qwen3_moe"), adapter={"method": "qlora", "r": 4, "target_parameters": EXPERTS})
    adapted = inject(open_model(recipe), recipe, quiet())
    packed = {name: weight.clone() for name, weight in unpacked_experts(adapted.model).items()}
    optimizer = torch.optim.SGD([p for p in adapted.model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        ids = torch.arange(5, 45)[None]
        loss = adapted.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(weight, packed[name]) for name, weight in unpacked_experts(adapted.model).items())


def test_all_linear_reports_that_it_skips_the_experts(moe, console):
    recipe = recipe_with(moe("qwen3_moe"))
    inject(open_model(recipe), recipe, console)
    said = " ".join(console.file.getvalue().split())
    assert "all-linear skips the experts" in said
    assert "set adapter.target_parameters: [gate_up_proj, down_proj] to adapt them" in said


def test_a_target_that_matches_no_parameter_is_refused(moe):
    recipe = recipe_with(moe("mixtral"), adapter={"target_parameters": ["gate_up_pro"]})
    with pytest.raises(RecipeError, match="Did you mean 'gate_up_proj'"):
        inject(open_model(recipe), recipe, quiet())


def test_llama_cpp_adapters_cannot_contain_experts(moe):
    with pytest.raises(RecipeError, match="fused experts"):
        check_lora_only(train_a_little(moe("qwen3_moe"), target_parameters=EXPERTS).model)
