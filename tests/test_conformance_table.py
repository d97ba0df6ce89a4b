"""The conformance suite's runs, statements and page."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def load(load_benchmark: Callable[[str], Any]) -> Callable[[str], Any]:
    """Import a module of the suite by its name."""
    return lambda name: load_benchmark(f"conformance.{name}")


def test_statements_name_cases_outcomes_and_addresses(load: Any) -> None:
    cases = load("run").list_cases()
    for name, tool in load("environments").list_tools(Path()).items():
        statements = load("statements").read_statements(tool.adapter.with_suffix(".toml"))
        assert statements.searches or tool.absent, name
        for choice in statements.choices:
            assert choice.column in load("run").COLUMNS, (name, choice)
            assert choice.address.startswith("https://"), (name, choice)
            assert choice.setting, (name, choice)
        for search in statements.searches:
            outcomes = [*cases[search.case].left_out, *cases[search.case].wrong]
            judged = cases[search.case].judge is not None and not outcomes
            assert judged or any(outcome.startswith(search.outcome) for outcome in outcomes), (name, search)


def test_a_job_states_clipping_weight_decay_warm_up_and_epochs(load: Any) -> None:
    case = dataclasses.replace(load("run").list_cases()["accumulation"], settings={"batch_size": 2})
    [job] = case.make_jobs().values()
    job["micro_batch_size"] = 1
    before = load("adapter").trainer_arguments(job)
    assert {before[name] for name in ("max_grad_norm", "weight_decay", "warmup_steps")} == {0}
    assert "num_train_epochs" not in before
    job |= {"max_grad_norm": 0.5, "weight_decay": 0.1, "warmup_steps": 2, "epochs": 3}
    after = load("adapter").trainer_arguments(job)
    assert {name: after[name] for name in ("max_grad_norm", "weight_decay", "warmup_steps", "num_train_epochs")} == {
        "max_grad_norm": 0.5, "weight_decay": 0.1, "warmup_steps": 2, "num_train_epochs": 3
    }  # fmt: skip
    assert "max_steps" not in after


def test_a_run_is_kept_with_its_log_until_its_jobs_or_its_tool_change(load: Any, tmp_path: Path) -> None:
    run, case = load("run"), load("run").list_cases()["accumulation"]
    folder = tmp_path / "runs" / "trl" / "default" / "accumulation"
    tool = load("environments").list_tools(tmp_path)["trl"]
    key = run.make_key(tool, case, {"trl": "1"})
    assert [job["out"] for job in run.place_jobs(case, key, folder, tmp_path, fresh=False)] == [str(folder / "run")]
    (folder / "run" / "result.json").write_text('{"status": "done", "message": ""}')
    (folder / "run" / "log.txt").write_text("step 1")
    judged_otherwise = dataclasses.replace(case, reason="another", title="Another")
    assert run.make_key(tool, judged_otherwise, {"trl": "1"}) == key
    assert run.place_jobs(case, key, folder, tmp_path, fresh=False) == []
    assert run.read_results(case, folder)["run"].log == "step 1"
    assert run.make_key(tool, case, {"trl": "2"}) != key
    assert run.make_key(tool, dataclasses.replace(case, settings={}), {"trl": "1"}) != key
    assert run.place_jobs(case, key, folder, tmp_path, fresh=True)
    assert not (folder / "run" / "log.txt").exists()


def test_llmtune_runs_again_after_a_change_of_its_code(load: Any, tmp_path: Path) -> None:
    run, case = load("run"), load("run").list_cases()["accumulation"]
    tool = load("environments").list_tools(tmp_path)["llmtune"]
    assert (BENCHMARKS.parent / tool.source / "__init__.py").exists()

    def key_of(name: str, code: str) -> str:
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "module.py").write_text(code)
        return str(run.make_key(dataclasses.replace(tool, source=str(tmp_path / name)), case, {"llmtune-cli": "1"}))

    before = key_of("before", "number = 1")
    assert key_of("comment", "number = 1  # one") == before
    assert key_of("after", "number = 2") != before


def test_absolute_paths_of_this_machine_are_hidden_and_addresses_are_not(load: Any) -> None:
    text = 'No rows in /home/me/x/rows.jsonl, see https://github.com/a/b/issues/1 and "/tmp/run-1/model"'
    hidden = 'No rows in rows.jsonl, see https://github.com/a/b/issues/1 and "model"'
    assert load("run").hide_folders(text) == hidden


def test_the_page_is_that_of_the_table_and_has_every_case(load: Any) -> None:
    page: ModuleType = load("page")
    table = json.loads(page.TABLE.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.render(table), "run `make conformance`"
    titles = {name: case.title for name, case in load("run").list_cases().items()}
    assert {name: case["title"] for name, case in table["cases"].items()} == titles
    wrong = [
        entry
        for case in table["cases"].values()
        for finding in case["findings"].values()
        for entry in finding["columns"].values()
        if entry["verdict"] == "silently wrong"
    ]
    assert all(entry["runs"] == 2 and entry["configuration"] and entry["searched"] for entry in wrong)


def test_a_case_that_llmtune_failed_names_the_commit_since_which_it_passes(load: Any) -> None:
    page: ModuleType = load("page")
    table, text = json.loads(page.TABLE.read_text(encoding="utf-8")), page.PAGE.read_text(encoding="utf-8")
    failed = {name: case for name, case in table["cases"].items() if case["added"]}
    assert {"repeated_passages", "passages_with_white_space", "answers_of_a_tuned_prompt"} <= failed.keys()
    for name, case in failed.items():
        verdict = page.final_verdict(page.columns_of(case, "llmtune"))
        assert (verdict in ("right", "refused")) == bool(case["passed"]), (name, verdict)
        assert case["failed"], name
        since = f" It passes since {case['passed']}.\n" if case["passed"] else "\n"
        assert f"Added {case['added']}, when llmtune failed it: {case['failed']}.{since}" in text, name


def test_the_page_shows_every_configuration(load: Any) -> None:
    page: ModuleType = load("page")
    table = json.loads(page.TABLE.read_text(encoding="utf-8"))
    flatten = load("statements").flatten
    shared = {tool: page.find_shared(table, tool) for tool in table["tools"]}
    assert shared["llmtune"]["data.deduplicate"] == "none"
    assert table["tools"]["llmtune"]["given"] in page.PAGE.read_text(encoding="utf-8")
    assert "private variable" in table["tools"]["llmtune"]["given"]
    for name, case in table["cases"].items():
        for tool, finding in case["findings"].items():
            for entry in finding["columns"].values():
                said = page.say_difference(entry["configuration"], shared[tool]) if entry.get("configuration") else ""
                other = {k: v for k, v in flatten(entry.get("configuration") or {}).items() if shared[tool].get(k) != v}
                assert all(json.dumps(value, ensure_ascii=False) in said for value in other.values()), (name, tool)


def test_a_run_of_some_tools_keeps_the_columns_of_the_others(load: Any, tmp_path: Path) -> None:
    page: ModuleType = load("page")
    before = json.loads(page.TABLE.read_text(encoding="utf-8"))
    cases, tools = load("run").list_cases(), load("environments").list_tools(tmp_path)
    columns = {"default": {"verdict": "stopped", "learned": "a new result", "configuration": {}}}
    finding = {"commit": "abc", "date": "2031-01-01", "versions": {"trl": "9.9"}, "columns": columns}
    (tmp_path / "findings" / "trl").mkdir(parents=True)
    (tmp_path / "findings" / "trl" / "seed.json").write_text(json.dumps(finding))
    after = page.collect(cases, tools, tmp_path, [("trl", "seed"), ("swift", "seed")])  # swift does not install
    assert after["cases"]["seed"]["findings"]["trl"]["columns"] == columns
    assert after["tools"]["trl"]["passes"][-1] == {
        "date": "2031-01-01", "version": "9.9", "commit": "abc", "cases": ["seed"]
    }  # fmt: skip
    after["cases"]["seed"]["findings"]["trl"] = before["cases"]["seed"]["findings"]["trl"]
    assert after["cases"] == before["cases"]


def test_a_finding_is_dropped_if_the_jobs_of_its_case_change(load: Any, tmp_path: Path) -> None:
    page: ModuleType = load("page")
    cases, tools = load("run").list_cases(), load("environments").list_tools(tmp_path)
    other = dataclasses.replace(cases["seed"], settings={"method": "lora", "batch_size": 2})
    after = page.collect({**cases, "seed": other}, tools, tmp_path, [])
    assert after["cases"]["seed"]["findings"] == {}
    assert after["cases"]["resume"]["findings"]


def test_the_page_claims_one_pass_only_for_results_of_one_clean_commit(load: Any) -> None:
    def say(*commits: str) -> str:
        passes = [{"date": "2026-11-30", "version": "1", "commit": commit, "cases": ["seed"]} for commit in commits]
        tool = {"title": "The Tool", "version": "1", "libraries": {"torch": "2"}, "passes": passes}
        return str(load("page").how_made({"machine": "x", "tools": {"tool": tool}}))

    assert "runs of commit abc, on x" in say("abc")
    assert "runs of commits abc, def" in say("abc", "def")
    assert "runs of commits abc-dirty" in say("abc-dirty")
    assert "- The Tool 1: torch 2. 1 cases: 2026-11-30, version 1, commit abc. `seed`: 2026-11-30" in say("abc", "def")


def test_the_readme_has_the_summary_of_the_table(load: Any) -> None:
    page: ModuleType = load("page")
    readme = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    table = json.loads(page.TABLE.read_text(encoding="utf-8"))
    assert "\n".join(page.short_summary(table)) in readme
    assert f"[{len(table['cases'])} " in readme
