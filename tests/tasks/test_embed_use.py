"""A finished embedding run in use: ranking, vectors of files, products, attention, and bases that are refused early."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.explaining import page_data
from support.families import build_bert
from support.pairs import recipe_of, run_recipe
from support.runs import invoke
from transformers import AutoModel

from llmtune.errors import DataError
from llmtune.serve.finished_run import FinishedRun

NO_TEXT = {"generation": {"max_new_tokens": None}}
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone", "sky")
PAIRS = [
    {"query": f"number {i} {THINGS[i % 9]}", "passage": f"The {THINGS[i % 9]} number {i} is red."} for i in range(60)
]
TEXTS = ["the red cat", "a house by the river", "The stone is red."]
STEPS = {"max_steps": 2, "num_train_epochs": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with prompts, in the device's own number format."""
    folder = tmp_path_factory.mktemp("used")
    section = {"query_prompt": "red red: ", "passage_prompt": "passage: "}
    base = build_bert(folder / "model")
    sections = {"model": {"dtype": "auto"}, "embed": section, "train": STEPS, **NO_TEXT}
    run_recipe(folder, base, PAIRS, "embed", **sections)
    return folder / "run"


def test_the_passages_of_a_file_are_ranked_by_their_cosine_with_the_query(run, tmp_path):
    (tmp_path / "passages.txt").write_text("\n".join(TEXTS))
    done = invoke("generate", run, "the red cat", "--passages", tmp_path / "passages.txt")
    assert done.exit_code == 0, done.output
    found = FinishedRun(run, offline=True).answer({"prompt": "the red cat", "passages": json.dumps(TEXTS)})
    query, *passages = found["prediction"].values()
    scores = np.array(passages) @ np.array(query)
    best = np.argsort(-scores, kind="stable")
    assert done.stdout.splitlines() == [f"{scores[i]:.3f}  {TEXTS[i]}" for i in best]
    alone = invoke("generate", run, "--passages", tmp_path / "passages.txt").stdout.splitlines()
    assert [len(json.loads(line)) for line in alone] == [64] * 3, "vectors, without a query to rank for"


def test_passages_of_a_file_get_the_vectors_of_passages(run, tmp_path):
    texts = [*TEXTS, "The title.\n\nThe text."]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"passage": text}) + "\n" for text in texts))
    done = invoke("generate", run, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "vectors.npy")
    assert done.exit_code == 0, done.output
    ours = FinishedRun(run, offline=True).answer({"passages": json.dumps(texts)})["prediction"]
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), [*ours.values()], atol=2e-3)
    (tmp_path / "rows.txt").write_text("\n".join(texts))
    refused = invoke("generate", run, "--input", tmp_path / "rows.txt", "--output", tmp_path / "vectors.npy")
    assert refused.exit_code == 2
    assert "whether its texts are queries or passages" in " ".join(refused.output.split())


def test_a_longer_passage_is_refused(run):
    with pytest.raises(DataError, match="tokens, but the model reads 128"):
        FinishedRun(run, offline=True).answer({"prompt": "red", "passages": json.dumps(["cat", "red cat " * 200])})


@pytest.fixture(scope="module")
def merged(run: Path) -> str:
    """What merging the run printed."""
    done = invoke("deploy", "merge", run)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_a_merged_encoder_keeps_float32_and_the_vectors_of_its_adapter(run, merged):
    assert "float32)" in merged
    assert "effective_rank is not compared" not in merged
    assert "effective_rank" in merged
    ours, adapted = (
        SentenceTransformer(str(run / name), device="cpu", local_files_only=True).encode_query(TEXTS)
        for name in ("merged", "adapter")
    )
    np.testing.assert_allclose(ours, adapted, atol=1e-6)


def test_a_published_folder_is_loaded_by_sentence_transformers_with_the_same_vectors(run, merged, tmp_path):
    for name, options in (("whole", ["--merged"]), ("adapter", [])):
        done = invoke("deploy", "publish", run, "--to", tmp_path / name, "--license", "mit", *options)
        assert done.exit_code == 0, done.output
        assert (tmp_path / name / "1_Pooling/config.json").is_file()
        card = (tmp_path / name / "README.md").read_text()
        assert "library_name: sentence-transformers" in card
    theirs, ours = (
        SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode_document(TEXTS)
        for folder in (tmp_path / "whole", run / "merged")
    )
    np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("place", ["adapter", "merged"])
def test_the_code_of_the_page_gives_the_vectors_of_a_bfloat16_base_to_1e_6(place, half):
    """Without `dtype`, an adapter's base is loaded in bfloat16."""
    page = (Path(__file__).parents[2] / "docs/embed.md").read_text()
    (code,) = (block for block in re.findall("```python\n(.*?)```", page, re.DOTALL) if "SentenceTransformer(" in block)
    names = {}
    exec(code.replace("runs/embed-offline-1a2b3c4d/adapter", str(half / place)), names)
    ours = FinishedRun(half, offline=True)
    vectors = [ours.answer({"prompt": text})["prediction"]["query"] for text in TEXTS]
    np.testing.assert_allclose(names["model"].encode_query(TEXTS), vectors, atol=1e-6)
    plain = SentenceTransformer(str(half / place), device="cpu", local_files_only=True)
    assert (np.abs(plain.encode_query(TEXTS) - vectors).max() > 1e-4) == (place == "adapter")


def test_the_card_of_an_adapter_on_a_bfloat16_base_loads_it_in_float32(half, tmp_path):
    done = invoke("deploy", "publish", half, "--to", tmp_path / "card", "--license", "mit")
    assert done.exit_code == 0, done.output
    assert 'model_kwargs={"dtype": "float32"}' in (tmp_path / "card/README.md").read_text()


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged run on a base whose files are in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    base = build_bert(folder / "model")
    AutoModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    run_recipe(folder, base, PAIRS, "embed", model={"dtype": "float32"}, train=STEPS, **NO_TEXT)
    assert invoke("deploy", "merge", folder / "run").exit_code == 0
    return folder / "run"


def test_explained_attention_is_that_of_a_query_after_its_prompt(run, tmp_path):
    done = invoke("explain", "attention", run, "--text", "the cat", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "the text is a query, after the prompt 'red red: '" in " ".join(done.output.split())
    [kind] = page_data(tmp_path / "out/attention.html")["kinds"]
    assert [token["text"] for token in kind["rows"]][1:3] == ["red", "red"]
    refused = invoke("explain", "attention", run, "--text", "the cat", "--pair", "a dog")
    assert (refused.exit_code, "--pair" in refused.output) == (2, True)


def test_a_local_base_that_cannot_be_trained_is_refused_before_the_rows_are_read(tmp_path):
    base = build_bert(tmp_path / "plain")
    SentenceTransformer(str(base), device="cpu", local_files_only=True).save(str(tmp_path / "model"))
    modules = json.loads((tmp_path / "model/modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "model/modules.json").write_text(json.dumps([*modules, dense]))
    shutil.rmtree(base)
    path = recipe_of(tmp_path, tmp_path / "model", PAIRS, "embed", **NO_TEXT)
    for options in ([], ["--dry-run"]):
        done = invoke("run", path, "--out", tmp_path / "run", *options)
        assert done.exit_code == 2
        assert "a module Dense, which llmtune does not train" in " ".join(done.output.split())
        assert not (tmp_path / "run/data").exists()
