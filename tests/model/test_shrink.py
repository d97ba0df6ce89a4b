"""Models with fewer layers: which are kept, that transformers opens them, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from support import families
from support.adapting import quiet
from support.models import build_gpt2, build_llama
from support.runs import invoke
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from llmtune.errors import RecipeError
from llmtune.model import shrink
from llmtune.model.shrink import shrink_model


def deepen(folder: Path, layers: int) -> Path:
    """Give a saved model more layers, with random weights."""
    config = AutoModel.from_pretrained(folder).config
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    import transformers

    setattr(config, key, layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % 2] for i in range(layers)]
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "build",
    [
        build_llama,
        build_gpt2,
        families.build_bert,
        families.build_distilbert,
        families.build_roberta,
        families.build_deberta,
        families.build_modernbert,
    ],
)
def test_a_cut_model_has_the_first_the_last_and_evenly_spaced_layers(tmp_path, build):
    base = deepen(build(tmp_path / "base"), 6)
    done = shrink_model(str(base), 3, tmp_path / "cut", quiet())
    assert done["kept"] == [0, 3, 5]
    original, cut = (AutoModel.from_pretrained(folder) for folder in (base, tmp_path / "cut"))
    assert cut.config.num_hidden_layers == 3
    stacks = [
        next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == count)
        for model, count in ((original, 6), (cut, 3))
    ]
    for i, place in enumerate(done["kept"]):
        for ours, theirs in zip(stacks[1][i].parameters(), stacks[0][place].parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert AutoTokenizer.from_pretrained(tmp_path / "cut")("a fox") == AutoTokenizer.from_pretrained(base)("a fox")


def test_half_of_thirty_layers_are_different_layers():
    for count in range(3, 60):
        for layers in range(2, count):
            kept = [(i * (count - 1) + (layers - 1) // 2) // (layers - 1) for i in range(layers)]
            assert kept[0] == 0
            assert kept[-1] == count - 1
            assert len(set(kept)) == layers


def test_the_command_saves_a_model_that_transformers_opens(tmp_path):
    base = deepen(build_llama(tmp_path / "base"), 5)
    result = invoke("models", "shrink", base, "--layers", 2, "--out", tmp_path / "cut", "--offline")
    assert result.exit_code == 0, result.output
    assert "2 of 5 layers (1, 5)" in result.output
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "cut").model.layers) == 2


@pytest.mark.parametrize("layers", [0, 1, 2, 7])
def test_a_number_of_layers_that_the_model_cannot_have_is_refused(tmp_path, layers):
    base = build_llama(tmp_path / "base")
    with pytest.raises(RecipeError, match=f"cannot be cut to {layers}"):
        shrink_model(str(base), layers, tmp_path / "cut", quiet())
    assert not (tmp_path / "cut").exists()


def test_an_encoder_decoder_and_a_full_folder_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="it has an encoder and a decoder"):
        shrink_model(str(families.build_t5(tmp_path / "t5")), 2, tmp_path / "cut", quiet())
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "file").touch()
    with pytest.raises(RecipeError, match="not empty"):
        shrink_model(str(deepen(build_llama(tmp_path / "base"), 4)), 2, tmp_path / "cut", quiet())


def test_a_model_that_computes_differently_once_it_is_saved_is_refused(tmp_path, monkeypatch):
    base = deepen(build_llama(tmp_path / "base"), 4)
    monkeypatch.setattr(shrink.torch, "equal", lambda first, second: False)
    with pytest.raises(Exception, match="would compute differently"):
        shrink_model(str(base), 2, tmp_path / "cut", quiet())
    assert not (tmp_path / "cut").exists()
