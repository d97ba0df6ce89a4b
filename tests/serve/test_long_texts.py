"""A text longer than the model reads is refused, or cut with a word about it, wherever a model predicts."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import httpx
import pytest
from support.classifying import colour_rows, recipe_for
from support.classifying import run as train
from support.families import build_bert
from support.runs import invoke
from support.serving import load_served, serving

POSITIONS = 24
LONG = "the red cat number 7 " * 20
SHORT = "the red cat number 7"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a classifier whose model has fewer positions than `data.max_length`."""
    folder = tmp_path_factory.mktemp("long")
    model = build_bert(folder / "bert", max_position_embeddings=POSITIONS)

    def run(way: str) -> Path:
        data = {"max_length": 64, "on_overlong": way}
        steps = {"max_steps": 1, "num_train_epochs": None}
        return train(recipe_for(folder / f"{way}.yaml", model, colour_rows(), data=data, train=steps))[1]

    return cache(run)


@pytest.mark.parametrize("way", ["error", pytest.param("drop", marks=pytest.mark.slow)])
def test_a_longer_text_is_refused_with_its_length(way: str, finished: Callable[[str], Path], tmp_path: Path) -> None:
    run, words = finished(way), f"tokens, but the model reads {POSITIONS}"
    done = invoke("generate", run, LONG)
    assert done.exit_code == 3, done.output
    assert words in " ".join(done.output.split())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (LONG, SHORT)))
    done = invoke("generate", run, "--input", tmp_path / "rows.jsonl")
    refused, answered = (json.loads(line) for line in done.stdout.splitlines())
    assert words in refused["error"]
    assert answered["answer"]
    with serving(*load_served(mine=run).values()) as url:
        response = httpx.post(f"{url}/v1/classify", json={"text": LONG})
        assert response.status_code == 400
        error = response.json()["error"]
        assert words in error["message"]
        assert (error["param"], error["code"]) == ("text", "context_length_exceeded")
        assert httpx.post(f"{url}/v1/classify", json={"text": SHORT}).status_code == 200


def test_a_longer_text_is_cut_with_a_word_about_it(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run = finished("truncate")
    done = invoke("generate", run, LONG)
    assert done.exit_code == 0, done.output
    assert f"Only its first {POSITIONS} tokens" in " ".join(done.stderr.split())
    assert "first" not in invoke("generate", run, SHORT).stderr
    assert json.loads(invoke("generate", run, LONG, "--json").stdout)["truncated"] is True
    assert "truncated" not in json.loads(invoke("generate", run, SHORT, "--json").stdout)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (LONG, SHORT)))
    lines = invoke("generate", run, "--input", tmp_path / "rows.jsonl").stdout.splitlines()
    assert [json.loads(line).get("truncated") for line in lines] == [True, None]
    with serving(*load_served(mine=run).values()) as url:
        bodies = [httpx.post(f"{url}/v1/classify", json={"text": text}).json() for text in (LONG, SHORT)]
        assert [body.get("truncated") for body in bodies] == [True, None]
