"""GGUF files read by llama.cpp itself; `make test-slow` installs llama-cpp-python, which compiles it."""

import importlib.metadata
from functools import partial
from pathlib import Path

import pytest
import torch
from support import families
from support.classifying import colour_rows, recipe_for
from support.classifying import run as run_classifier
from support.exports import export_tuned
from support.ggufs import CUTS, FAMILIES, TRICKY, make_family, train_cut, train_phi3, train_pieces
from transformers import GenerationConfig

import llmtune.deploy.gguf_converter as gguf_converter
from llmtune.adapter.merging import merge_adapter
from llmtune.deploy.gguf_converter import write_model
from llmtune.deploy.gguf_export import gguf_format
from llmtune.deploy.gguf_readers import LlamaReader, open_gguf_export
from llmtune.deploy.gguf_tokenizer import NAMES, describe_tokenizer, read_tokenizer
from llmtune.deploy.tuned_model import TransformersReader
from llmtune.errors import GateFailed, RecipeError
from llmtune.evaluate.generation import answer_ends, generate_batch
from llmtune.model.builtin_models import PACKAGED
from llmtune.records import Prompt

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytestmark = pytest.mark.slow

SMOLLM2 = "smollm2-135m-instruct"
COUNTRIES = """
Argentina Australia Austria Belgium Brazil Bulgaria Canada Chile China Colombia Croatia Cuba Denmark Egypt Estonia
Ethiopia Finland France Germany Ghana Greece Hungary Iceland India Indonesia Iran Iraq Ireland Israel Italy Jamaica
Japan Jordan Kenya Latvia Lebanon Lithuania Luxembourg Malaysia Malta Mexico Morocco Nepal Netherlands Nigeria Norway
Pakistan Peru Poland Portugal
"""
WORDS = """
anchor apple bridge candle castle cloud compass copper desert dragon eagle engine feather forest garden glacier hammer
harbor honey island jacket jungle kettle ladder lantern lemon library magnet marble mirror mountain needle ocean orchard
paper pepper pillow planet pocket river rocket saddle shadow silver spider temple thunder tunnel village window
"""
TOKENS = 32


@pytest.fixture
def smollm2(tune):
    """SmolLM2 with an adapter that changes its answers."""
    if not installed():
        pytest.skip(f"needs the model package: {PACKAGED[SMOLLM2].install}")
    return lambda: tune(f"builtin:{SMOLLM2}", strength=0.01, data={"max_length": 1024})


def installed() -> bool:
    return any(found.name == PACKAGED[SMOLLM2].distribution for found in importlib.metadata.distributions())


def test_first_32_tokens_of_smollm2_in_f16_are_those_of_the_merged_model_in_float32(smollm2, tmp_path, console):
    certificate = export_tuned(smollm2(), gguf_format(), tmp_path / "gguf")
    assert certificate["reader"].startswith("llama.cpp")
    assert certificate["measured"]["effect_kl"] > 1e-3
    assert certificate["measured"]["kl_mean"] < 1e-4
    tuned = smollm2()
    model, processor, task = merge_adapter(tuned.adapted), tuned.processor, tuned.task
    stops = answer_ends(model, processor)
    asked = [f"What is the capital of {country}?" for country in COUNTRIES.split()]
    asked += [f"What does the word {word} mean?" for word in WORDS.split()]
    prompts = [
        task.prompt_ids({"messages": [{"role": "user", "content": text}]}, processor, tuned.recipe) for text in asked
    ]
    settings = GenerationConfig(
        max_new_tokens=TOKENS, do_sample=False, eos_token_id=stops, pad_token_id=processor.pad_token_id
    )
    wanted = []
    for at in range(0, len(prompts), 25):
        wanted += generate_batch(model, [*map(Prompt, prompts[at : at + 25])], settings, "cpu")
    exported = open_gguf_export(tmp_path / "gguf" / certificate["file"], tuned, max(map(len, prompts)) + TOKENS)
    reader = TransformersReader(exported.model)
    got = [reader.answer(Prompt(prompt), stops, TOKENS) for prompt in prompts]
    same = sum(one == other[: len(one)] for one, other in zip(got, wanted, strict=True))
    print(f"{same} of {len(prompts)} answers are the same")
    assert len(set(asked)) == 100
    assert same >= 95  # the others part where the two likeliest tokens are nearer than F16 is exact


@pytest.mark.parametrize(("number_format", "kl"), [("q8_0", 0.015), ("q4_k_m", 0.15)])
def test_smollm2_in_fewer_bits_is_certified_by_wider_limits(smollm2, tmp_path, console, number_format, kl):
    certificate = export_tuned(smollm2(), gguf_format(number_format=number_format), tmp_path / "gguf")
    print(certificate["measured"])
    assert 1e-5 < certificate["measured"]["kl_mean"] < kl


def test_the_tokenizer_of_smollm2_is_described_as_in_the_official_file(smollm2, tmp_path, console):
    package = importlib.metadata.distribution(PACKAGED[SMOLLM2].distribution)
    theirs = read_tokenizer(Path(str(package.locate_file(PACKAGED[SMOLLM2].file))))
    certificate = export_tuned(smollm2(), gguf_format(), tmp_path / "gguf")
    ours = read_tokenizer(tmp_path / "gguf" / certificate["file"])
    for key in (NAMES.MODEL, NAMES.PRE, NAMES.ADD_BOS, NAMES.LIST, NAMES.TOKEN_TYPE, NAMES.MERGES, NAMES.EOS_ID):
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize("name", list(FAMILIES))
def test_llama_cpp_reproduces_the_logits_of_every_family(name, tmp_path):
    tokenizer, model = make_family(name)
    write_model(model, tokenizer, describe_tokenizer(tokenizer, [[1, 100]], [2]), tmp_path / "model.gguf", "f32", name)
    ids = tokenizer(TRICKY)["input_ids"]
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # else in F16
    reading = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=512, logits_all=True, verbose=False, **exact)
    reading.eval(ids)
    got = torch.from_numpy(reading.scores[: len(ids)].copy())
    reading.close()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    # llama.cpp takes Gemma's activation from a table in F16
    torch.testing.assert_close(got, wanted, atol=1e-2 if "gemma" in name else 1e-3, rtol=0)
    assert wanted.std() > 1


TRAINED = {"pieces": lambda: train_pieces(False), "pieces behind a space": lambda: train_pieces(True)}
TRAINED |= {"phi": train_phi3} | {name: partial(train_cut, name) for name in CUTS}


@pytest.mark.parametrize("name", list(TRAINED))
def test_llama_cpp_splits_text_into_the_same_tokens(name, tmp_path):
    tokenizer = TRAINED[name]()
    _, model = make_family("qwen2", vocab_size=len(tokenizer))
    described = describe_tokenizer(tokenizer, [[5, 100]], [tokenizer.eos_token_id])
    write_model(model, tokenizer, described, tmp_path / "model.gguf", "f16", name)
    reader = LlamaReader(tmp_path / "model.gguf", 64)
    texts = (TRICKY, "cat", " 12 cats\n", "<|user|>\n cats<|end|>\n")
    got = [reader.encode(text) for text in texts]
    reader.llm.close()
    assert got == [tokenizer(text)["input_ids"] for text in texts]


def test_an_adapter_on_its_base_answers_like_the_tuned_model(tune, tmp_path, console):
    certificate = export_tuned(tune(adapter={"use_rslora": True}), gguf_format(adapter_only=True), tmp_path / "lora")
    measured = certificate["measured"]
    assert certificate["reader"].startswith("llama.cpp")
    assert measured["effect_kl"] > 0.01
    assert measured["kl_mean"] < 1e-5
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "Modelfile",
        "certificate.json",
        "tiny-lora-F16.gguf",
    ]


def classified(name, count=40):
    rows = colour_rows(count)
    if name == "several":
        return [{**row, "label": [row["label"]] if i % 4 else ["red", "blue"]} for i, row in enumerate(rows)]
    if name == "number":
        return [{**row, "label": i / 4} for i, row in enumerate(rows)]
    return rows


@pytest.mark.parametrize(
    ("family", "labels"), [("bert", "one"), ("bert", "several"), ("bert", "number"), ("roberta", "one")]
)
def test_an_encoder_with_a_head_has_the_tuned_models_scores(family, labels, tmp_path):
    model = getattr(families, f"build_{family}")(tmp_path / "model")
    path = recipe_for(tmp_path / "r.yaml", model, classified(labels), deploy=["gguf"], adapter={"r": 4})
    report, out = run_classifier(path)
    certificate = report["deploy"]["exports"]["gguf"]
    measured = certificate["measured"]
    assert certificate["reader"].startswith("llama.cpp")
    assert measured["effect_kl"] > 100 * measured["kl_mean"]
    assert (measured["same_ids"], measured["answer_agreement"]) == (True, 1)
    assert {file.name for file in (out / "gguf/f16").iterdir()} == {
        certificate["file"],
        "certificate.json",
        "measures.npz",
    }


def test_a_bert_head_without_its_pooler_fails(tmp_path, monkeypatch):
    """Without llmtune the converter drops that layer, and llama.cpp computes other scores."""
    monkeypatch.setattr(gguf_converter, "POOLER", "no such layer.")
    path = recipe_for(tmp_path / "r.yaml", families.build_bert(tmp_path / "model"), classified("one"), deploy=["gguf"])
    with pytest.raises(GateFailed, match="the GGUF file differs"):
        run_classifier(path)


def test_texts_in_pairs_are_refused(tmp_path):
    rows = [{**row, "pair": "and another text"} for row in classified("one")]
    path = recipe_for(tmp_path / "r.yaml", families.build_bert(tmp_path / "model"), rows, deploy=["gguf"])
    with pytest.raises(RecipeError, match="read one text"):
        run_classifier(path)
