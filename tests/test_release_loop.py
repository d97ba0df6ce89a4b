"""The weekly loop: a recipe with `champion: release:NAME` and `deploy: [release]`, over weeks that pass and fail."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from ruamel.yaml import YAML
from support.families import build_bert
from support.runs import invoke, write_recipe, write_sums

from llmtune.errors import GateFailed
from llmtune.plan import RunContext
from llmtune.store.atomic_files import hash_folder
from llmtune.store.release_store import list_stored, read_current, read_history, resolve_release
from llmtune.store.run_folder import read_run

GATES = ["loss <= base + 100", "loss <= champion + 100"]
FAILS = "evaluate.gates=[loss <= 0.01]"


@pytest.fixture
def recipe(here: Path, tiny_llama: Path) -> Path:
    write_sums(here / "rows.jsonl", 40)
    evaluate = {"champion": "release:tiny", "gates": GATES}
    train = {"num_train_epochs": 1, "save_total_limit": 1}
    return write_recipe(
        here / "tiny.yaml", tiny_llama, "rows.jsonl", evaluate=evaluate, train=train, deploy=["release"]
    )


def week(recipe: Path, rows: int, *sets: str) -> tuple[int, str, Path]:
    """Grow the rows and run the recipe; return the exit code, what it printed, and the run folder."""
    write_sums(recipe.parent / "rows.jsonl", rows)
    known = {*Path("runs").glob("*")}
    done = invoke("run", recipe, "--offline", *(word for one in sets for word in ("--set", one)))
    (folder,) = ({*Path("runs").glob("*")} - known) or {max(known, key=lambda path: path.stat().st_mtime)}
    return done.exit_code, done.stderr, folder


def answer(address: str) -> str:
    done = invoke("generate", address, "What comes after 4 and before 6?", "--json", "--offline")
    assert done.exit_code == 0, done.stderr
    return re.sub(r'"run": ".*"', "", done.stdout)


def test_weeks_that_pass_are_promoted_those_that_fail_are_not_and_a_rollback_lasts(recipe: Path) -> None:
    code, printed, first_run = week(recipe, 40)
    assert code == 0, printed
    assert "release:tiny has no release yet" in printed.split("loss <= champion + 100", 1)[1]
    first = read_current("tiny")
    assert f"release tiny: {first}\n" in printed
    first_answer = answer("release:tiny")
    assert first_answer == answer(str(first_run))

    code, printed, second_run = week(recipe, 60)
    second = read_current("tiny")
    assert (code, second_run) != (0, first_run), printed
    assert f"release tiny: {second}, before {first}\n" in printed
    champion = json.loads((second_run / "report.json").read_text())["evaluation"]["champion"]
    assert champion["folder"] == f"release:tiny@{first}"
    assert champion["asked"] > 0, "the first week's model answers rows that it did not learn"
    assert champion["left_out"] == {}
    assert json.loads((second_run / "run.json").read_text())["findings"]["released"] == [f"release:tiny@{second}"]

    code, printed, third_run = week(recipe, 80, FAILS)
    assert code == 6, printed
    assert f"release tiny: stays at {second}, because of loss <= 0.01" in printed
    assert read_current("tiny") == second
    report = json.loads((third_run / "report.json").read_text())
    assert report["release"] | {"message": ""} == {"name": "tiny", "current": second, "promoted": False, "message": ""}
    suite = ElementTree.parse(third_run / "junit.xml").getroot()[0]
    (case,) = suite.findall("testcase[@classname='llmtune.release']")
    assert case.find("skipped") is not None
    assert "stays at" in (third_run / "report.md").read_text()
    assert invoke("release", third_run, "--offline").exit_code == 6
    assert read_current("tiny") == second

    rolled = invoke("release", "rollback", "tiny")
    assert rolled.stdout == f"tiny: {second} -> {first}\n"
    assert answer("release:tiny") == first_answer, "byte for byte"

    code, printed, again = week(recipe, 60)
    assert (code, again) == (0, second_run), printed
    assert read_current("tiny") == first, "what a person rolled back, the same command does not promote"
    for _ in range(2):
        assert f"stays at {first}, because {second} was rolled back" in printed
        assert json.loads((second_run / "report.json").read_text())["release"]["current"] == first
        suite = ElementTree.parse(second_run / "junit.xml").getroot()[0]
        assert suite.find("testcase[@classname='llmtune.release']/skipped") is not None
        code, printed, again = week(recipe, 60)
        assert (code, again) == (0, second_run), printed
    code, printed, again = week(recipe, 60, "evaluate.metrics=[loss]")
    assert (code, again) == (0, second_run), printed
    assert f"stays at {first}, because {second} was rolled back" in printed
    promoted = invoke("release", second_run, "--offline")
    assert f"release:tiny@{second} is current, before {first}" in promoted.stdout
    listed = invoke("release", "list").stdout.splitlines()
    assert [line[: len("* release:tiny@12345678")] for line in listed] == [
        f"  release:tiny@{first}",
        f"* release:tiny@{second}",
    ]
    assert [line["action"] for line in read_history("tiny")] == ["promote", "promote", "rollback", "promote"]
    code, printed, _ = week(recipe, 60)
    assert (code, f"release tiny: {second}\n" in printed) == (0, True), printed


def test_a_second_identical_command_compares_with_the_release_before_and_changes_nothing(recipe: Path) -> None:
    week(recipe, 40)
    code, printed, run = week(recipe, 60)
    assert code == 0, printed
    before = hash_folder(Path("releases")), json.loads((run / "report.json").read_text())["evaluation"]
    code, printed, again = week(recipe, 60)
    assert (code, again) == (0, run)
    assert printed.count("unchanged, skipped") >= 5
    assert f"release tiny: {read_current('tiny')}" in printed
    assert (hash_folder(Path("releases")), json.loads((run / "report.json").read_text())["evaluation"]) == before
    shutil.rmtree(resolve_release("release:tiny"))
    code, printed, _ = week(recipe, 60)
    assert code == 2
    assert "is gone" in printed
    assert invoke("release", run, "--offline").exit_code == 0
    assert answer("release:tiny") == answer(str(run))
    assert len(list_stored("tiny")) == 2


def test_the_champion_answers_new_rows_also_when_its_run_is_gone(recipe: Path) -> None:
    _, _, first_run = week(recipe, 40)
    with_run = week(recipe, 60)
    report = json.loads((with_run[2] / "report.json").read_text())
    shutil.rmtree(first_run)
    shutil.rmtree(with_run[2])
    invoke("release", "rollback", "tiny")
    code, printed, run = week(recipe, 60, "deploy=[]")
    assert code == 0, printed
    assert "champion: its run is gone" in printed
    without = json.loads((run / "report.json").read_text())
    assert without["evaluation"]["champion"] == report["evaluation"]["champion"]


def test_a_project_that_was_moved_goes_on_with_its_releases(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, run = week(recipe, 40)
    current = read_current("tiny")
    moved = recipe.parent.with_name("moved")
    recipe.parent.rename(moved)
    monkeypatch.chdir(moved)
    rows, released = (moved / run / "data" / "rows"), hash_folder(Path("releases"))
    before = hash_folder(rows), hash_folder(moved / run / "adapter")
    code, printed, again = week(moved / recipe.name, 40)
    assert (code, again) == (0, run), printed
    assert printed.count("unchanged, skipped") == 5, "all but prepare"
    assert (hash_folder(rows), hash_folder(moved / run / "adapter")) == before
    assert (read_current("tiny"), hash_folder(Path("releases"))) == (current, released)
    code, printed, again = week(moved / recipe.name, 40, "evaluate.slices=[messages]")
    assert (code, again) == (0, run), printed
    assert invoke("verify", run).exit_code == 0


def test_other_rows_are_never_written_over_those_of_a_released_run(recipe: Path) -> None:
    _, _, run = week(recipe, 40)
    rows, prepared = run / "data" / "rows", read_run(run).manifest["steps"]["prepare"]
    before = hash_folder(rows)
    write_sums(recipe.parent / "rows.jsonl", 60)
    done = invoke("run", recipe, "--offline", "--out", run)
    assert done.exit_code == 2
    assert "this run is released as" in done.stderr
    assert (hash_folder(rows), read_run(run).manifest["steps"]["prepare"]) == (before, prepared)


@pytest.mark.parametrize("words", [["run"], ["run", "--dry-run"], ["train"]])
def test_a_recipe_whose_releases_are_in_its_own_folder_is_not_run_elsewhere(
    recipe: Path, words: list[str], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = recipe.parent / "releases" / "tiny"
    (store / "0a1b2c3d").mkdir(parents=True)
    (store / "0a1b2c3d" / "release.json").write_text("{}")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    done = invoke(*words, recipe, "--offline")
    assert done.exit_code == 2
    assert "the working folder has no release of tiny" in done.stderr
    assert f"cd {recipe.parent}" in done.stderr


def test_a_champion_of_another_name_must_exist(recipe: Path) -> None:
    done = invoke("run", recipe, "--offline", "--set", "evaluate.champion=release:tinny")
    assert done.exit_code == 2
    assert "no release named tinny" in done.stderr


def test_releases_of_a_growing_test_set_are_compared_on_their_common_rows(recipe: Path) -> None:
    week(recipe, 40)
    week(recipe, 120)
    first, second = (one["after"] for one in read_history("tiny"))
    done = invoke("release", "diff", f"tiny@{first}", f"release:tiny@{second}", "--json")
    assert done.exit_code == 0, done.stderr
    compared = json.loads(done.stdout)
    assert compared["rows"]["only_second"] > 0
    assert compared["difference"]["loss"]["n"] == compared["rows"]["common"] > 0
    shown = invoke("release", "diff", f"tiny@{first}", f"tiny@{second}").stdout
    assert f"the {compared['rows']['common']} test rows of both" in shown


@pytest.mark.parametrize("corpus", [None, "pairs.jsonl"])
def test_rankings_are_compared_though_the_passages_grew_with_the_rows(here: Path, corpus: str | None) -> None:
    evaluate = {"metrics": ["ndcg@10"], "champion": "release:tiny", "gates": ["ndcg@10.low > champion - 1.1"]}
    sections: dict[str, Any] = {"task": "embed", "generation": None, "evaluate": evaluate}
    sections |= {"train": {"learning_rate": 1e-12}, "deploy": ["release"], "data": {"corpus": corpus}}
    recipe = write_recipe(here / "tiny.yaml", build_bert(here / "bert"), "pairs.jsonl", **sections)
    for count in (60, 120):
        pairs = [{"query": f"number {i}", "passage": f"The thing with the number {i} is here."} for i in range(count)]
        (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        done = invoke("run", recipe, "--offline")
        assert done.exit_code == 0, done.stderr
    run = max(Path("runs").glob("*"), key=lambda path: path.stat().st_mtime)
    evaluation = json.loads((run / "report.json").read_text())["evaluation"]
    champion = evaluation["champion"]
    assert champion["left_out"] == {}
    assert champion["difference"]["ndcg@10"]["n"] == champion["rows"] == evaluation["rows"]
    assert 0 < champion["new"]["rows"] == champion["asked"] < champion["rows"]
    assert champion["new"]["difference"]["ndcg@10"]["n"] == champion["new"]["rows"]
    scores = [champion["scores"], champion["tuned"], evaluation["tuned"], evaluation["base"]]
    assert len({round(one["ndcg@10"], 6) for one in scores}) == 1, "nothing was learned in both weeks"


def test_a_run_starts_from_the_release_that_was_current_and_keeps_it(recipe: Path) -> None:
    week(recipe, 40)
    first = resolve_release("release:tiny").absolute()
    start = "adapter.start_from=release:tiny", "adapter.r=null", "adapter.lora_alpha=null"
    code, printed, run = week(recipe, 60, *start)
    assert code == 0, printed
    assert f"start_from: {first}" in (run / "recipe.yaml").read_text()
    code, printed, again = week(recipe, 60, *start)
    assert (code, again) == (0, run), printed
    assert "train unchanged, skipped" in printed
    assert len(list_stored("tiny")) == 2
    missing = invoke("run", recipe, "--set", "adapter.start_from=release:other", "--offline")
    assert missing.exit_code == 2
    assert "no release named other" in missing.stderr


def test_a_failed_export_leaves_the_release_and_the_run_says_so(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    week(recipe, 40)
    first = read_current("tiny")

    def differ(context: RunContext, on_begin: object) -> None:
        raise GateFailed.of("the export differs", "merged", "See the certificate.")

    monkeypatch.setattr("llmtune.pipeline.make_products", differ)
    code, printed, run = week(recipe, 60, "deploy=[merged, release]")
    assert code == 6, printed
    assert f"release tiny: stays at {first}, because the export differs" in printed
    assert read_current("tiny") == first
    findings = json.loads((run / "run.json").read_text())["findings"]
    assert findings["release"]["promoted"] is False
    assert "released" not in findings


def test_a_run_that_was_compared_with_an_earlier_release_is_not_promoted(recipe: Path) -> None:
    week(recipe, 40)
    code, printed, slow = week(recipe, 60, "deploy=[]")
    assert code == 0, printed
    assert week(recipe, 80)[0] == 0
    second = read_current("tiny")
    refused = invoke("release", slow, "--offline")
    assert refused.exit_code == 2
    assert f"tiny is at {second} now, but the gates compared with" in refused.stderr
    assert read_current("tiny") == second
    assert "released" not in json.loads((slow / "run.json").read_text())["findings"]
    code, printed, again = week(recipe, 60)
    assert (code, again) == (0, slow), printed
    assert read_current("tiny") != second, "compared with the current one, and promoted"


KILLED = """
import os, signal, sys
from llmtune.store import release_store
setattr(release_store, {name!r}, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
from llmtune.cli import main
sys.argv = ["llmtune", "run", "tiny.yaml", "--offline", "--threads", "1"]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["staged", "sync_folder", "_move_pointer", "write_text"])
def test_a_run_killed_while_it_releases_leaves_the_old_release_and_the_same_command_completes(
    recipe: Path, name: str
) -> None:
    week(recipe, 40)
    first, said = read_current("tiny"), answer("release:tiny")
    write_sums(recipe.parent / "rows.jsonl", 60)
    ended = subprocess.run([sys.executable, "-c", KILLED.format(name=name)], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (read_current("tiny"), answer("release:tiny")) == (first, said)
    code, printed, run = week(recipe, 60)
    assert code == 0, printed
    assert "train unchanged, skipped" in printed
    assert read_current("tiny") != first
    assert answer("release:tiny") == answer(str(run))


@pytest.mark.slow
def test_the_guide_every_week_runs(here: Path, tiny_llama: Path) -> None:
    """Its recipe with gates that a tiny model passes, and its commands, but for the servers."""
    text = (Path(__file__).parents[1] / "docs" / "every-week.md").read_text(encoding="utf-8")
    stated, job = (YAML(typ="safe").load(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL))
    assert [step["run"] for step in job["jobs"]["tune"]["steps"] if "run" in step][-1] == "llmtune run tickets.yaml"
    gates = [
        gate.replace("0.7", "0").replace("0.6", "0").replace("0.03", "1.03") for gate in stated["evaluate"]["gates"]
    ]
    sections = {**stated, "evaluate": {**stated["evaluate"], "gates": gates}, "name": None}
    recipe = write_recipe(here / "tickets.yaml", tiny_llama, "rows.jsonl", **sections)
    recipe.write_text("".join(line for line in recipe.read_text().splitlines(True) if not line.startswith("name:")))
    lines = [line.partition("#")[0] for line in re.findall(r"^ {4}(llmtune .+)$", text, flags=re.MULTILINE)]
    assert len(lines) > 8
    for rows in (40, 60):
        write_sums(here / "rows.jsonl", rows)
        done = invoke(*lines[0].split()[1:], "--offline")
        assert done.exit_code == 0, done.output
    first, second = (line["after"] for line in read_history("tickets"))
    for line in lines[1:]:
        words = [first if word == "3f2a91bc" else word for word in shlex.split(line)[1:]]
        if "serve" not in words:
            done = invoke(*words, *(["--offline"] if words[0] == "generate" else []))
            assert done.exit_code in (0, 2), done.output
            assert done.exit_code == 0 or "no release was current before" in done.stderr, "a second rollback"
    assert read_current("tickets") == first != second
