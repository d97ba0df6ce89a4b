"""An adapter of a text tune is read by plain PEFT on the complete class, under the names that vLLM 0.33 maps."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from safetensors import safe_open
from support.adapting import open_model, quiet, recipe_with
from support.image_text import FAMILIES, build_image_text
from transformers import AutoModelForImageTextToText

from llmtune.adapter.injection import inject
from llmtune.adapter.saving import save_adapter

FAST = ("gemma3", "qwen3_5", "llava", "smolvlm")
LANGUAGE_MODEL = {"smolvlm": "model.text_model.", "idefics3": "model.text_model.", "llama4": "language_model.model."}
"""The language model's name in the class of a checkpoint, if it is not `model.language_model.`."""
VLLM_PREFIXES = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
"""vLLM 0.33's `hf_to_vllm_mapper` of these families; the names of the others stay as they are."""
VLLM_MODULES = ("language_model.model.", "model.text_model.")
"""Where vLLM's classes have the language model."""
IN_TRANSFORMERS_CLASS = ("glm46v",)
"""vLLM has no class of its own for them, and runs that of transformers."""
TABLE = Path(__file__).parents[2] / "docs/adapter.md"


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in FAST else pytest.mark.slow) for f in FAMILIES])
def test_plain_peft_and_vllm_find_every_module_of_an_adapter(tmp_path, family):
    recipe = recipe_with(build_image_text(tmp_path, family), data={"packing": False})
    adapted = inject(open_model(recipe), recipe, quiet())
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    save_adapter(adapted, tmp_path / "adapter")
    with safe_open(str(tmp_path / "adapter/adapter_model.safetensors"), "pt") as file:
        names = [name.removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118 - not a dict
    prefix = LANGUAGE_MODEL.get(family, "model.language_model.")
    assert all(name.startswith(prefix) for name in names)
    if family not in IN_TRANSFORMERS_CLASS:
        mapped = VLLM_PREFIXES.get(prefix, prefix)
        assert mapped in VLLM_MODULES
        assert re.search(rf"\| `{prefix}` \| `{mapped}` \| yes \|", TABLE.read_text("utf-8"))

    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()  # warnings of missing weights are errors
    loaded = tuned.load_adapter(tmp_path / "adapter", "again")
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if ".again." in key]
    assert {name for name, _ in tuned.named_parameters() if ".default." in name} == {
        name for name, _ in adapted.model.named_parameters() if ".default." in name
    }
    if family == "llama4" and Version(transformers.__version__) < Version("5.25"):  # its complete class cannot run
        return
    ids = torch.arange(4, 24)[None]
    with torch.inference_mode():
        ours, theirs = adapted.model.eval()(input_ids=ids).logits, tuned(input_ids=ids).logits
        with tuned.disable_adapter():
            assert not torch.allclose(tuned(input_ids=ids).logits, theirs, rtol=1e-2, atol=1e-2)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
