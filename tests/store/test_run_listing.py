"""What the addresses of runs mean: folder, NAME, NAME@HASH, latest."""

from pathlib import Path
from typing import Any

import pytest

from llmtune.errors import RecipeError
from llmtune.store.atomic_files import write_json
from llmtune.store.run_listing import choose_run, find_run, list_names, list_runs, match_run


def make_run(folder: str, name: str, at: float, report: object = None, state: str = "done", **findings: Any) -> Path:
    """Write the files of a run that was trained at a time, and scored a second later."""
    path = Path("runs") / folder
    step = {"state": "done", "inputs": "", "outputs": {}, "facts": {}}
    steps = {"train": {**step, "state": state, "started": at, "facts": {"steps": 1}}}
    if state == "done":
        steps["evaluate"] = {**step, "started": at + 1}
    write_json(path / "run.json", {"fingerprint": "", "steps": steps, "findings": findings})
    (path / "recipe.yaml").write_text(f"recipe_version: 1\nname: {name}  # tickets.yaml:1\ntask: chat\n")
    if report is not None:
        write_json(path / "report.json", report)
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_name_means_the_run_trained_last_of_those_that_passed() -> None:
    first = make_run("tickets-00000001", "tickets", 100, gates="passed")
    second = make_run("tickets-00000002", "tickets", 200, gates="passed")
    for number, outcome in enumerate(("failed", "undecided", None)):
        make_run(f"tickets-1000000{number}", "tickets", 300 + number, gates=outcome)
    make_run("tickets-20000000", "tickets", 400, state="running", gates=None)
    make_run("tickets-00000002-reproduced", "tickets", 500, gates="passed", reproduces=str(second))
    make_run("mails-00000001", "mails", 600, gates="passed")
    assert find_run(Path("tickets")) == second
    assert find_run(Path("tickets@00000001")) == find_run(first) == find_run(Path("tickets-00000001")) == first
    assert list_names(list_runs())[second] == ["tickets"]
    assert list_names(list_runs())[first] == []


def test_scoring_an_older_run_again_does_not_make_it_the_newest() -> None:
    first = make_run("tickets-00000001", "tickets", 100, gates="passed")
    second = make_run("tickets-00000002", "tickets", 200, gates="passed")
    manifest = (first / "run.json").read_text().replace('"started": 101', '"started": 900')
    (first / "run.json").write_text(manifest)
    assert list_runs()[0].folder == first
    assert find_run(Path("tickets")) == second


def test_a_name_is_the_recipes_and_a_folder_of_the_users_own_is_found_by_its_own_name() -> None:
    run = make_run("weekly", "tickets", 100, gates="failed")
    assert match_run("weekly") == run
    with pytest.raises(RecipeError, match=r"runs/weekly \(gates failed\)"):
        match_run("tickets")
    assert (list_runs()[0].hash, list_runs()[0].address) == (None, "runs/weekly")
    quoted = make_run("off-00000001", "'off'", 200, gates="passed")
    assert match_run("off") == quoted


@pytest.mark.parametrize(
    ("report", "wanted"),
    [
        ({"gates": []}, "passed"),
        ({"gates": [{"passed": True}]}, "passed"),
        ({"gates": [{"passed": True}, {"passed": None}]}, "undecided"),
        ({"gates": [{"passed": False}, {"passed": None}]}, "failed"),
        (None, None),
        ([], None),
    ],
)
def test_the_outcome_of_runs_of_older_versions_comes_from_their_report(report: object, wanted: str | None) -> None:
    run = make_run("tickets-00000001", "tickets", 100, report)
    (listed,) = list_runs()
    assert listed.gates == wanted
    chosen = choose_run([listed], "tickets")
    assert (chosen.folder if chosen else None) == (run if wanted == "passed" else None)


def test_an_unknown_hash_is_refused_with_the_runs_of_the_name() -> None:
    make_run("tickets-00000001", "tickets", 100, gates="passed")
    make_run("tickets-00000002", "tickets", 200, gates="undecided")
    with pytest.raises(RecipeError, match="tickets has no run 12345678") as caught:
        find_run(Path("tickets@12345678"))
    assert "tickets@00000002 (gates undecided), tickets@00000001 (gates passed)" in str(caught.value)
    with pytest.raises(RecipeError, match="Did you mean 'tickets'"):
        find_run(Path("ticket"))
