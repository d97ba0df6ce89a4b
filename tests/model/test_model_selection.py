"""Candidates are ranked by how well they know the user's rows; unusable ones are skipped with a reason."""

import json
import math
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from support.adapting import SHAPE, build_family, quiet
from support.families import build_bert
from support.models import build_llama, train_tokenizer
from support.rows import chat, write_jsonl
from support.runs import invoke, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from llmtune.data.preparation import prepare_rows
from llmtune.data.row_store import iterate_rows, load_rows
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.model_selection import rank_candidates
from llmtune.recipe.schema import Recipe
from llmtune.records import Rows
from llmtune.tasks.registry import get_task

COLOURS = ["red", "green", "blue", "black"]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    rows = [chat(f"Which colour has number {i}?", f"{COLOURS[i % 4]} {COLOURS[i % 3]}") for i in range(60)]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, rows_file) -> Path:
    """A tiny model that has seen the rows a few times."""
    folder = build_llama(tmp_path_factory.mktemp("taught"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [json.loads(line)["messages"] for line in rows_file.read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        ids = tokenizer(texts, return_tensors="pt", padding=True)
        labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)
        model(**ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory, taught) -> Path:
    folder = Path(shutil.copytree(taught, tmp_path_factory.mktemp("disturbed") / "m"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def recipe_for(rows_file: Path, *candidates: Path | str, **sections: dict[str, object]) -> Recipe:
    data = {"train": str(rows_file), "validation": 0.2, "test": 0.2, "deduplicate": "exact"}
    model = {"candidates": [str(candidate) for candidate in candidates], "dtype": "float32"}
    content = {"task": "chat", "data": data, "model": model}
    return Recipe.model_validate(
        {**content, **{name: {**content.get(name, {}), **keys} for name, keys in sections.items()}}
    )


def rank(recipe: Recipe, folder: Path, console=None, rows: Rows | None = None):
    rows = rows or prepare_rows(recipe, folder / "data", quiet())
    task = get_task("chat")
    return rank_candidates(recipe, lambda place: task, rows, console or quiet(), folder / "model", "cpu", offline=True)


def test_the_model_that_knows_the_rows_best_is_chosen(taught, disturbed, rows_file, tmp_path, console):
    fresh = build_llama(tmp_path / "fresh", seed=1)
    recipe = recipe_for(rows_file, fresh, disturbed, taught)
    ranking = rank(recipe, tmp_path, console)
    assert [Path(candidate.name) for candidate in ranking.candidates] == [taught, disturbed, fresh]
    assert ranking.chosen.path == taught
    bits = [candidate.score for candidate in ranking.candidates]
    assert bits == sorted(bits)
    assert bits[0] < 0.8 * bits[2]
    assert (ranking.split, ranking.rows) == ("validation", load_rows(tmp_path / "data").counts["validation"])
    assert json.loads((tmp_path / "model" / "ranking.json").read_text()) == ranking.to_dict()
    assert rank(recipe, tmp_path).to_dict() == ranking.to_dict()
    said = console.file.getvalue()
    assert "bits per byte" in said
    assert f"{bits[0]:.4f}" in said


def test_bits_per_byte_equal_those_of_the_textbook(taught, rows_file, tmp_path):
    """Compared with a plain model, row by row, with the byte count of the answers."""
    recipe = recipe_for(rows_file, taught)
    ranking = rank(recipe, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(taught)
    plain = AutoModelForCausalLM.from_pretrained(taught, attn_implementation="eager").eval()
    nats, size = 0.0, 0
    for _, row in iterate_rows(load_rows(tmp_path / "data"), "validation"):
        question, answer = row["messages"]
        prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        head, whole = (tokenizer(text).input_ids for text in (prompt, f"{prompt}{answer['content']}<|im_end|>"))
        with torch.no_grad():
            logs = plain(torch.tensor([whole])).logits[0].log_softmax(-1)
        nats -= float(sum(logs[i - 1, whole[i]] for i in range(len(head), len(whole))))
        size += len(answer["content"].encode())
    assert ranking.candidates[0].score == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_test_rows_are_never_read(taught, rows_file, tmp_path):
    recipe = recipe_for(rows_file, taught)
    rows = prepare_rows(recipe, tmp_path / "data", quiet())
    rows.files["test"].unlink()
    assert rank(recipe, tmp_path, rows=rows).rows > 0
    without = recipe_for(rows_file, taught, data={"validation": 0})
    assert rank(without, tmp_path / "without").split == "train"


def test_unusable_candidates_are_skipped_with_the_reason(taught, rows_file, tmp_path, console):
    short = build_family(tmp_path / "short", "llama", max_position_embeddings=8)
    train_tokenizer().save_pretrained(tmp_path / "bert")
    small = {**SHAPE, "hidden_size": 32, "head_dim": 8}
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **small)).save_pretrained(tmp_path / "bert")
    mute = build_llama(tmp_path / "mute", chat_template=None)
    ranking = rank(recipe_for(rows_file, short, tmp_path / "bert", taught, mute), tmp_path, console)
    assert ranking.chosen.path == taught
    reasons = {Path(candidate.name).name: candidate.reason for candidate in ranking.candidates}
    assert "context of 8 tokens" in reasons["short"]
    assert "BertForMaskedLM" in reasons["bert"]
    assert "template" in reasons["mute"]
    assert reasons[taught.name] is None
    assert "BertForMaskedLM" in console.file.getvalue()


def test_a_candidate_that_cannot_fit_is_skipped(taught, rows_file, tmp_path, monkeypatch):
    from llmtune.model import memory_plan as plan

    monkeypatch.setattr(plan, "device_memory", lambda device: 1000)
    with pytest.raises(EnvironmentProblem, match="no candidate remains") as caught:
        rank(recipe_for(rows_file, taught), tmp_path)
    assert "cpu has 1 kB" in str(caught.value)
    assert rank(recipe_for(rows_file, taught, model={"check_memory": False}), tmp_path).chosen.path == taught


def test_a_missing_candidate_is_skipped_with_a_note_and_an_error_lists_all_if_none_exists(
    taught, rows_file, tmp_path, console
):
    ranking = rank(recipe_for(rows_file, tmp_path / "no-1", taught), tmp_path, console)
    assert ranking.chosen.path == taught
    assert {Path(one.name).name for one in ranking.candidates if one.reason} == {"no-1"}
    assert "skipped because" in console.file.getvalue()
    with pytest.raises(EnvironmentProblem) as caught:
        rank(recipe_for(rows_file, tmp_path / "no-1", tmp_path / "no-2"), tmp_path)
    assert len(caught.value.problems) == 2


def test_a_candidate_with_own_code_is_reported(taught, rows_file, tmp_path):
    other = Path(shutil.copytree(taught, tmp_path / "own"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "m.Own"}}))
    with pytest.raises(RecipeError, match="trust_remote_code"):
        rank(recipe_for(rows_file, taught, other), tmp_path)


def test_a_candidate_with_a_forbidden_or_unknown_licence_is_skipped(taught, rows_file, tmp_path):
    free, closed = (Path(shutil.copytree(taught, tmp_path / name)) for name in ("free", "closed"))
    (free / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (closed / "README.md").write_text("---\nlicense: gemma\n---\n")
    recipe = recipe_for(rows_file, closed, taught, free, "google/gemma-2-2b-it", model={"licences": ("apache-2.0",)})
    ranking = rank(recipe, tmp_path)
    assert ranking.chosen.path == free
    reasons = {Path(candidate.name).name: candidate.reason for candidate in ranking.candidates}
    assert reasons["closed"] == reasons["gemma-2-2b-it"] == "its licence is gemma"
    assert reasons[taught.name] == "its licence is unknown"


def test_a_context_long_enough_for_99_of_100_rows_suffices_if_longer_rows_may_be_truncated(taught, tmp_path):
    short = build_family(tmp_path / "short", "llama", max_position_embeddings=48)
    rows = [chat(f"Which colour has number {i}?", COLOURS[i % 4]) for i in range(400)]
    rows[7] = chat("Which colour? " * 20, "red")
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    for share, overlong, reason in ((0, "truncate", None), (0, "error", "data.on_overlong is error")):
        recipe = recipe_for(file, short, taught, data={"on_overlong": overlong, "validation": share, "max_length": 512})
        found = {Path(one.name).name: one.reason for one in rank(recipe, tmp_path / overlong).candidates}
        assert found["short"] is None if reason is None else reason in found["short"]
    many = [chat("Which colour? " * (20 if i % 10 == 0 else 1) + str(i), "red") for i in range(100)]
    recipe = recipe_for(write_jsonl(tmp_path / "many.jsonl", many), short, taught, data={"on_overlong": "truncate"})
    left_out = next(one for one in rank(recipe, tmp_path / "many").candidates if one.reason)
    assert "context of 48 tokens is shorter than the 99th percentile of the rows" in left_out.reason


def test_a_query_finds_candidates_in_the_catalogue_and_a_dry_run_shows_them_with_reasons(rows_file, tmp_path):
    query = {"family": ["Qwen2.5", "Gemma 2"], "max_parameters": 8.0e9}
    model = {"name": None, "candidates": query, "licences": ["apache-2.0"]}
    recipe = write_recipe(tmp_path / "r.yaml", "none", rows_file, model=model)
    done = invoke("run", recipe, "--dry-run", "--json", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    plans = json.loads(done.stdout)["plan"]["plans"]
    assert "Qwen/Qwen2.5-0.5B-Instruct" in plans
    assert "google/gemma-2-2b-it" not in plans
    for words in ("would be downloaded first", "skipped: its licence is gemma"):
        assert words in " ".join(done.stderr.replace("│", " ").split())
    for changed, words in (
        ("{family: Qwenn2.5}", "Did you mean 'Qwen2.5'?"),
        ("{max_parameters: 1000}", "no model in the catalogue matches the query"),
    ):
        done = invoke("recipes", "check", recipe, "--set", f"model.candidates={changed}")
        assert (done.exit_code, words in done.stderr) == (2, True), done.stderr


def test_a_missing_candidate_does_not_end_a_run(taught, rows_file, tmp_path):
    model = {"name": None, "candidates": [str(tmp_path / "no"), str(taught)]}
    recipe = write_recipe(tmp_path / "r.yaml", "none", rows_file, model=model)
    planned = invoke("run", recipe, "--out", tmp_path / "out", "--dry-run", "--json")
    assert [*json.loads(planned.stdout)["plan"]["plans"]] == [str(taught)]
    assert "skipped:" in planned.stderr
    done = invoke("select", recipe, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["model"]["name"] == str(taught)
    done = invoke("select", recipe, "--out", tmp_path / "two", "--set", f"model.candidates=[{tmp_path / 'no'}]")
    assert (done.exit_code, "not found" in done.stderr) == (4, True)


def blend(folder: Path, weight: float) -> Path:
    """Build an encoder with sharp word vectors: at weight 0 they reach its output, at 1 every token gets one vector."""
    build_bert(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    bert = model.bert
    with torch.no_grad():
        words = bert.embeddings.word_embeddings.weight
        words.copy_((1 - weight) * torch.randn(words.shape, generator=torch.Generator().manual_seed(0)) + weight)
        bert.embeddings.position_embeddings.weight.zero_()
        for layer in bert.encoder.layer:
            for linear in (layer.attention.output.dense, layer.output.dense):
                linear.weight.zero_()
                linear.bias.zero_()
    model.save_pretrained(folder)
    return folder


ANIMALS = ["cat", "dog", "bird", "fish", "fox", "house", "river", "stone", "sky", "tree"]
EMBEDDED = {
    "ndcg@10": [{"query": f"{i} {one}?", "passage": f"The {one} {i} is red."} for i in range(6) for one in ANIMALS],
    "ndcg@10 of classes": [{"text": f"{one} number {i}", "label": one} for i in range(6) for one in ANIMALS],
    "spearman": [
        {"query": f"{a} {i}", "passage": f"the {b} {i}", "score": float(a == b)}
        for i, (a, b) in enumerate(product(ANIMALS[:5] * 4, ANIMALS[:5] + ANIMALS[:3]))
    ],
}


@pytest.mark.parametrize("kind", EMBEDDED)
def test_encoders_are_ranked_by_the_order_of_passages_before_tuning(kind, tmp_path):
    """One maps equal words to equal vectors; the vectors of the other are all equal."""
    metric = kind.removesuffix(" of classes")
    words, collapsed, wide = blend(tmp_path / "words", 0.0), blend(tmp_path / "collapsed", 1.0), tmp_path / "wide"
    build_bert(wide, hidden_size=128)
    rows = write_jsonl(tmp_path / "rows.jsonl", EMBEDDED[kind])
    model = {"name": None, "candidates": [str(wide), str(collapsed), str(words)]}
    data = {"validation": 0.3, "max_length": 64}
    more = {"evaluate": {"metrics": None}, "generation": {"max_new_tokens": None}, "embed": {"dimensions": [64, 16]}}
    recipe = write_recipe(tmp_path / "r.yaml", "none", rows, task="embed", model=model, data=data, **more)
    done = invoke("select", recipe, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["model"]["name"] == str(words)
    assert f"Candidates by {metric} on" in done.stderr
    assert "higher is better" in done.stderr
    ranking = json.loads((tmp_path / "out" / "model" / "ranking.json").read_text())
    assert (ranking["metric"], ranking["side"]) == (metric, "validation")
    first, second, last = ranking["candidates"]
    assert [first["name"], second["name"]] == [str(words), str(collapsed)]
    assert first[metric] > second[metric] + 0.1
    assert "the longest of embed.dimensions is 64" in last["reason"]
