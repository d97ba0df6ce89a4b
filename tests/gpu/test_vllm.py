"""vLLM next to our own loop: the same answers and scores, from an adapter and from complete weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.models import build_llama
from support.runs import FAST, finish_run, llmtune, write_colours, write_recipe

from llmtune.evaluate.generation import generate_completions
from llmtune.records import Prompt
from llmtune.serve.finished_run import FinishedRun

pytest.importorskip("vllm", reason="vLLM is not installed")
MINUTES = 900
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"r": 64, "lora_alpha": 128}, "train": {"num_train_epochs": 60, "learning_rate": 5e-3}},
    "full": {
        "adapter": {"method": "full", "r": None, "lora_alpha": None},
        "train": {"num_train_epochs": 25, "learning_rate": 2e-3},
    },
}


def read_answers(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation/predictions.jsonl").read_text().splitlines()]


def read_evaluation(run: Path) -> dict[str, Any]:
    evaluation: dict[str, Any] = json.loads((run / "evaluation/evaluation.json").read_text())
    return evaluation


@pytest.mark.timeout(2 * MINUTES)
@pytest.mark.parametrize("method", METHODS)
def test_vllm_gives_the_answers_and_scores_of_our_own_loop(tmp_path: Path, method: str) -> None:
    model = build_llama(tmp_path / "model", hidden_size=256, intermediate_size=256)
    write_colours(tmp_path / "rows.jsonl")
    evaluate = {"metrics": ["exact_match", "chrf"], "gates": []}
    data = {"test": 0.4, "validation": 0}
    write_recipe(tmp_path / "tiny.yaml", model, "rows.jsonl", data=data, evaluate=evaluate, **METHODS[method])
    done = llmtune("run", "tiny.yaml", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers, plain_scores = read_answers(tmp_path / "run"), read_evaluation(tmp_path / "run")
    assert len({row["tuned"] for row in answers}) > 1, "the model gives one answer to all rows: nothing is compared"
    done = llmtune("evaluate", "run", "--engine", "vllm", cwd=tmp_path, timeout=MINUTES)
    assert done.returncode == 0, done.stderr
    theirs, scores = read_answers(tmp_path / "run"), read_evaluation(tmp_path / "run")
    assert "vLLM" in scores["signatures"]["engine"]
    assert "vLLM" in scores["signatures"]["exact_match"]
    assert "vLLM" in (tmp_path / "run/report.md").read_text() + (tmp_path / "run/report.html").read_text()
    for name in ("base", "tuned"):
        same = sum(one[name] == other[name] for one, other in zip(answers, theirs, strict=True))
        assert same >= 0.9 * len(answers)
        assert scores[name]["exact_match"] == pytest.approx(plain_scores[name]["exact_match"], abs=0.1)
    again = llmtune("evaluate", "run", "--engine", "vllm", cwd=tmp_path, timeout=MINUTES)
    assert "evaluate unchanged, skipped" in again.stderr
    back = llmtune("evaluate", "run", cwd=tmp_path)
    assert "reusing" not in back.stderr, "answers of vLLM were taken for those of our own loop"
    assert read_answers(tmp_path / "run") == answers
    assert "engine" not in read_evaluation(tmp_path / "run")["signatures"]


@pytest.mark.timeout(2 * MINUTES)
def test_vllm_answers_the_rows_of_a_file_with_the_adapter(tmp_path: Path) -> None:
    model = build_llama(tmp_path / "model", hidden_size=256, intermediate_size=256)
    write_colours(tmp_path / "rows.jsonl")
    write_recipe(tmp_path / "tiny.yaml", model, "rows.jsonl", evaluate={"metrics": ["exact_match"]}, **METHODS["lora"])
    done = llmtune("run", "tiny.yaml", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    questions = [{"prompt": f"Which colour has the cat number {i}?"} for i in range(10)] + [{"prompt": "long " * 4000}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    plain = llmtune("generate", "run", "--input", "questions.jsonl", cwd=tmp_path)
    theirs = llmtune("generate", "run", "--input", "questions.jsonl", "--engine", "vllm", cwd=tmp_path, timeout=MINUTES)
    assert theirs.returncode == 0, theirs.stderr
    pairs = [*zip(plain.stdout.splitlines(), theirs.stdout.splitlines(), strict=True)]
    assert sum(one == other for one, other in pairs) >= 0.9 * len(pairs)
    assert "error" in json.loads(pairs[-1][1])


@pytest.mark.timeout(MINUTES)
@pytest.mark.filterwarnings("ignore")  # of vLLM
def test_the_progress_bar_advances_while_vllm_answers(tmp_path: Path) -> None:
    model = build_llama(tmp_path / "model", hidden_size=256, intermediate_size=256)
    run = FinishedRun(finish_run(tmp_path, model, train=FAST), offline=True, engine="vllm")
    served = run.load({"prompt": "text"}, base=False, max_new_tokens=40)
    prompts, advanced = [Prompt([token, 5, 6]) for token in range(10, 50)], list[int]()
    outputs = generate_completions(
        served.model, prompts, served.processor, served.recipe, device=served.device, advance=advanced.append
    )
    assert len(outputs) == sum(advanced) == len(prompts)
    assert len(advanced) > 1, "the bar advanced only at the end"
