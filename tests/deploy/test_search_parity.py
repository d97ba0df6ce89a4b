"""Products of embed and rerank compared by cosines and scores, as sentence-transformers opens them."""

import functools
import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from support.exports import SILENT, judged, searched, train_family
from support.runs import invoke

import llmtune.deploy.onnx_export as exporting
import llmtune.deploy.search_parity as search
from llmtune.adapter.merging import merge_adapter as really_merge
from llmtune.deploy.export import export
from llmtune.deploy.exported_model import open_folder
from llmtune.deploy.onnx_export import onnx_format
from llmtune.deploy.search_parity import SearchReference, make_reference
from llmtune.deploy.tuned_model import load_tuned
from llmtune.errors import GateFailed
from llmtune.plan import open_finished
from llmtune.store.atomic_files import read_json

PROMPTS = {"embed": {"query_prompt": "query: ", "passage_prompt": "passage: "}}
BARELY = {"train": {"max_steps": 1, "num_train_epochs": None, "learning_rate": 1e-5}}
TRAINED = {"train": {"num_train_epochs": 3, "learning_rate": 3e-3}}
RUNS = {
    "vectors": ("embed", searched(60), {**PROMPTS, **TRAINED}),
    "pairs": ("rerank", judged(60), TRAINED),
    "barely trained vectors": ("embed", searched(60), BARELY),
    "barely trained pairs": ("rerank", judged(60), BARELY),
}


def train(folder, kind):
    task, rows, sections = RUNS[kind]
    return train_family(folder, folder, "bert", task, rows, "run", **SILENT, **sections)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return functools.cache(lambda kind: train(tmp_path_factory.mktemp("run"), kind))


def halve(adapted, onto):
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.5)
    return really_merge(adapted, onto)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("int8", [False, True])
def test_an_onnx_export_is_certified_in_cosines_and_scores(kind, int8, trained, tmp_path, console):
    certificate = export(open_finished(trained(kind), console, offline=True), onnx_format(int8=int8), tmp_path / "out")
    print("INT8" if int8 else "FLOAT", kind, certificate["measured"])
    assert certificate["passed"]
    assert certificate["measured"]["unit"] == ("1 - cosine" if "vectors" in kind else "score")
    assert certificate["measured"]["difference_mean"] < (3e-2 if int8 else 1e-5)


def test_layers_are_compared_at_tokens_and_not_at_padding(trained, console):
    reference = make_reference(load_tuned(open_finished(trained("barely trained vectors"), console, offline=True)))
    texts, compared = reference.batches[0], exporting.example_inputs(reference)
    lengths = texts["attention_mask"].sum(1)
    assert lengths.min() < lengths.max()  # the batch is padded
    assert compared["attention_mask"].tolist() == [[1] * int(lengths.max())]
    assert torch.equal(compared["input_ids"][0], texts["input_ids"][lengths.argmax()])


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("int8", [False, True])
def test_an_onnx_export_with_half_of_the_adapter_fails(kind, int8, trained, tmp_path, console, monkeypatch):
    if int8 and "barely" in kind:
        pytest.skip("rounding to 8 bits hides an adapter that moves weights by less")
    monkeypatch.setattr(exporting, "merge_weights", halve)
    with pytest.raises(GateFailed) as raised:
        export(open_finished(trained(kind), console, offline=True), onnx_format(int8=int8), tmp_path / "out")
    print("HALVED", kind, int8, str(raised.value)[:500], read_json(tmp_path / "out.failed.json")["measured"])
    assert "of what tuning did" in str(raised.value)


@pytest.mark.parametrize("kind", ["barely trained vectors", "barely trained pairs"])
def test_half_of_an_adapter_that_hardly_moves_the_outputs_fails(kind, trained, tmp_path, console, monkeypatch):
    import llmtune.deploy.merged_model as merging

    run = trained(kind)
    monkeypatch.setattr(merging, "merge_weights", halve)
    with pytest.raises(GateFailed, match="its weights moved by 50% of what tuning did"):
        export(open_finished(run, console, offline=True), merging.merged_format(), tmp_path / "halved")


def plant(folder, fault):
    if fault == "pooling":
        modes = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
        path = folder / "1_Pooling/config.json"
        path.write_text(json.dumps({**read_json(path), **modes}))
    if fault == "prompt":
        path = folder / "config_sentence_transformers.json"
        path.write_text(json.dumps({"prompts": {"query": "fish fish ", "document": "river "}}))
    if fault == "length":
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 5}))
    if fault == "no modules":
        (folder / "modules.json").unlink()
    if fault == "normalisation":
        kept = [one for one in read_json(folder / "modules.json") if "Normalize" not in one["type"]]
        (folder / "modules.json").write_text(json.dumps(kept))
    if fault == "tokenizer length":
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**read_json(path), "model_max_length": 6}))


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("vectors", ""),
        *(pytest.param("vectors", fault, marks=pytest.mark.slow) for fault in ("pooling", "prompt", "length")),
        *(pytest.param("vectors", fault, marks=pytest.mark.slow) for fault in ("normalisation", "no modules")),
        pytest.param("pairs", "", marks=pytest.mark.slow),
        pytest.param("pairs", "tokenizer length", marks=pytest.mark.slow),
    ],
)
def test_a_folder_is_read_as_sentence_transformers_reads_it(kind, fault, trained, tmp_path, console, monkeypatch):
    """Without the package, llmtune reads the same files itself."""
    run = trained(kind)
    if not (run / "merged").exists():
        assert invoke("deploy", "merge", run).exit_code == 0
    folder = shutil.copytree(run / "merged", tmp_path / "merged")
    plant(folder, fault)
    tuned = load_tuned(open_finished(run, console, offline=True))
    reference = make_reference(tuned)
    assert isinstance(reference, SearchReference)
    exported = open_folder(folder, tuned)
    theirs, reader = reference.read_product(exported)
    assert reader.startswith("sentence-transformers")
    monkeypatch.setattr(search, "find_spec", lambda name: None if name == "sentence_transformers" else find_spec(name))
    ours, reader = reference.read_product(exported)
    assert reader.startswith("transformers")
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), atol=1e-5, rtol=1e-5)
    moved = float((torch.cat(ours) - torch.cat(reference.logits)).abs().max())
    assert moved > 1e-3 if fault else moved < 1e-5
