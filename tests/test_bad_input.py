"""Bad input at the command line: the right exit code, place, cause and cure, and never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.models import build_llama
from support.runs import write_recipe
from typer.testing import CliRunner, Result

from llmtune.cli.app import app


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(here: Path, tiny_llama: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_llama, here / "model")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def expect(result: Result, code: int, *words: str) -> None:
    shown = " ".join(result.stderr.split())
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert "Traceback" not in shown
    for word in words:
        assert word in shown, shown


def run_with(rows: Path, model: Path, *arguments: str, command: str = "run", **sections: Any) -> Result:
    write_recipe(Path("tiny.yaml"), model, rows, **sections)
    return invoke(command, "tiny.yaml", "--out", "run", *arguments)


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_match(here: Path, chat_rows: Path, model: Path) -> None:
    result = run_with(chat_rows, model, train={"learning_rat": 1e-3})
    expect(result, 2, "tiny.yaml:", "train.learning_rat", "learning_rate")


def test_a_wrong_type_is_named(here: Path, chat_rows: Path, model: Path) -> None:
    expect(run_with(chat_rows, model, train={"batch_size": "many"}), 2, "tiny.yaml:", "train.batch_size", "many")


def test_all_problems_of_a_recipe_come_at_once(here: Path, chat_rows: Path, model: Path) -> None:
    result = run_with(chat_rows, model, train={"batch_size": 0}, adapter={"r": -1}, data={"paking": True})
    expect(result, 2, "train.batch_size", "adapter.r", "data.paking")


def test_a_missing_recipe_is_a_usage_error(here: Path) -> None:
    expect(invoke("run", "quickstar"), 2, "quickstar", "quickstart")


def test_a_missing_data_file_is_named(here: Path, model: Path) -> None:
    expect(run_with(here / "missing.jsonl", model), 3, "missing.jsonl")


def test_an_empty_data_file_is_named(here: Path, model: Path) -> None:
    (here / "empty.jsonl").touch()
    expect(run_with(here / "empty.jsonl", model), 3, "empty.jsonl")


def rows_with(here: Path, chat_rows: Path, bad: bytes, at: int = 20) -> Path:
    lines = chat_rows.read_bytes().splitlines()
    lines[at - 1] = bad
    path = here / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_a_truncated_line_in_the_middle_of_a_file_is_named(here: Path, chat_rows: Path, model: Path) -> None:
    rows = rows_with(here, chat_rows, b'{"messages": [{"role": "user", "con')
    expect(run_with(rows, model, data={"max_dropped": 0.0}), 3, "rows.jsonl:20", "JSON")


def test_a_bad_row_within_the_allowance_is_dropped_and_counted(here: Path, chat_rows: Path, model: Path) -> None:
    rows = rows_with(here, chat_rows, b'{"messages": [{"role": "user", "con')
    result = run_with(rows, model, command="prepare")
    expect(result, 0, "rows.jsonl:20")
    report = json.loads((here / "run" / "report.json").read_text())
    assert sum(report["data"]["dropped"].values()) >= 1


def test_a_row_without_an_answer_is_named(here: Path, chat_rows: Path, model: Path) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "hello?"}]}).encode()
    expect(run_with(rows_with(here, chat_rows, row), model, data={"max_dropped": 0.0}), 3, "rows.jsonl:20", "assistant")


def test_bytes_that_are_not_utf_8_are_named(here: Path, chat_rows: Path, model: Path) -> None:
    row = b'{"messages": [{"role": "user", "content": "\xff\xfe"}, {"role": "assistant", "content": "x"}]}'
    expect(run_with(rows_with(here, chat_rows, row), model, data={"max_dropped": 0.0}), 3, "rows.jsonl:20", "UTF-8")


def test_a_template_that_cannot_be_split_into_turns_is_refused(here: Path, chat_rows: Path) -> None:
    template = "{% for m in messages | reverse %}{{ m['content'] | upper }}{% endfor %}"
    model = build_llama(here / "odd", chat_template=template)
    expect(run_with(chat_rows, model), 4, "template", "model.chat_template")


def long_rows(here: Path, chat_rows: Path) -> Path:
    long = {"role": "user", "content": "word " * 400}
    row = json.dumps({"messages": [long, {"role": "assistant", "content": "yes"}]}).encode()
    return rows_with(here, chat_rows, row)


def test_a_long_row_is_an_error_unless_the_recipe_says_otherwise(here: Path, chat_rows: Path, model: Path) -> None:
    expect(run_with(long_rows(here, chat_rows), model), 3, "rows.jsonl:20", "128", "on_overlong")


@pytest.mark.parametrize("remedy", ["drop", "truncate", "split"])
def test_a_long_row_is_handled_as_the_recipe_says(here: Path, chat_rows: Path, model: Path, remedy: str) -> None:
    result = run_with(long_rows(here, chat_rows), model, command="prepare", data={"on_overlong": remedy})
    expect(result, 0)
    assert json.loads((here / "run" / "report.json").read_text())["data"]["tokens"]


def test_an_output_folder_that_is_a_file_is_refused(here: Path, chat_rows: Path, model: Path) -> None:
    (here / "run").write_text("")
    expect(run_with(chat_rows, model), 2, "run", "--out")


def test_a_place_that_cannot_be_written_is_refused(here: Path, chat_rows: Path, model: Path) -> None:
    write_recipe(here / "tiny.yaml", model, chat_rows)
    expect(invoke("run", "tiny.yaml", "--out", "/sys/llmtune/run"), 4, "/sys/llmtune", "--out")


def test_a_missing_model_folder_is_named(here: Path, chat_rows: Path) -> None:
    expect(run_with(chat_rows, Path("./no-model")), 4, "no-model")


def test_a_missing_weight_file_is_named(here: Path, chat_rows: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    expect(run_with(chat_rows, model), 4, str(model))


def test_a_cut_weight_file_is_named(here: Path, chat_rows: Path, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    expect(run_with(chat_rows, model), 4, "model.safetensors")


def test_pickled_weights_are_refused_unless_asked_for(here: Path, chat_rows: Path, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    expect(run_with(chat_rows, model), 2, "pytorch_model.bin", "use_safetensors")


def test_a_model_that_wants_remote_code_is_refused(here: Path, chat_rows: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_odd.Odd"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_odd.py").write_text("raise SystemExit('this code ran')")
    expect(run_with(chat_rows, model), 2, "trust_remote_code")


def test_a_target_module_that_matches_nothing_is_refused(here: Path, chat_rows: Path, model: Path) -> None:
    expect(run_with(chat_rows, model, adapter={"target_modules": ["q_prj"]}), 2, "q_prj", "q_proj")


def test_a_gate_that_fails_is_exit_code_6(here: Path, chat_rows: Path, model: Path) -> None:
    result = run_with(chat_rows, model, evaluate={"metrics": ["loss"], "gates": ["loss <= 0.0001"]})
    expect(result, 6, "loss <= 0.0001")


def test_a_gate_on_an_unknown_metric_is_refused_before_anything_runs(here: Path, chat_rows: Path, model: Path) -> None:
    result = run_with(chat_rows, model, evaluate={"metrics": ["loss"], "gates": ["los <= 0.1"]})
    expect(result, 2, "tiny.yaml:", "los", "loss")
    assert not (here / "run").exists()


def test_resume_with_nothing_there_is_refused(here: Path, chat_rows: Path, model: Path) -> None:
    expect(run_with(chat_rows, model, "--resume"), 2, "resume")


def test_the_folder_of_another_recipe_is_refused(here: Path, chat_rows: Path, model: Path) -> None:
    expect(run_with(chat_rows, model, command="prepare"), 0)
    expect(run_with(chat_rows, model, command="prepare", seed=8), 2, "another recipe", "--out")


def test_a_model_that_gguf_has_no_place_for_is_refused_before_training(here: Path, tiny_gpt2: Path) -> None:
    rows = [json.dumps({"text": f"The quick brown fox number {k}."}) + "\n" for k in range(40)]
    (here / "text.jsonl").write_text("".join(rows))
    result = run_with(here / "text.jsonl", tiny_gpt2, task="completion", deploy=["gguf"])
    expect(result, 4, "'gpt2' cannot be written as GGUF", "qwen2")
    assert not (here / "run" / "checkpoints").exists()


def test_errors_come_as_json_too(here: Path, model: Path) -> None:
    result = run_with(here / "missing.jsonl", model, "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == 3
    assert "missing.jsonl" in json.dumps(error["problems"])
