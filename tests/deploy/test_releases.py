"""A run as a file for git: its contents, its omissions, and its use as a champion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from support.runs import finish_run, invoke

from llmtune.deploy.releases import check_signature, diff_releases, make_release
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.champion import compare_with_champion, open_champion
from llmtune.evaluate.opened_runs import open_run_scores
from llmtune.evaluate.per_row_scores import load_measures, unpack_measures
from llmtune.evaluate.release_records import find_release, list_releases, open_release
from llmtune.recipe.loader import load_recipe
from llmtune.store.atomic_files import hash_file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    evaluate = {"gates": ["loss <= base + 100"]}
    return finish_run(tmp_path_factory.mktemp("release"), tiny_llama, train={"num_train_epochs": 1}, evaluate=evaluate)


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    return make_release(run, run.parent / "releases" / "one.json")


def test_a_release_has_scores_by_row_but_no_text_or_path(run: Path, file: Path) -> None:
    text = file.read_text()
    content = json.loads(text)
    assert content["lock"] == hash_file(run / "llmtune.lock")
    assert [gate["name"] for gate in content["gates"]] == ["loss <= base + 100"]
    assert str(run.parent.parent) not in text
    assert "What comes after" not in text
    opened = open_release(file, "one")
    own = load_measures(run / "evaluation")
    assert opened.measures.rows == own.rows
    assert opened.measures.base == {}
    for metric in ("loss", "accuracy", "exact_match"):
        measure = own.tuned[metric]
        assert (opened.measures.tuned[metric].sums_NK == measure.sums_NK).all()
        assert opened.evaluation.tuned[metric] == measure.value


@pytest.mark.parametrize("out", ["new/", "old"])
def test_a_folder_as_out_gets_a_file_with_the_name_of_the_run(run: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "old").mkdir()
    made = invoke("release", run, "--out", f"{tmp_path}/{out}")
    assert made.exit_code == 0, made.stderr
    assert [path.name for path in (tmp_path / out).iterdir()] == [f"{run.name}.json"]


@pytest.mark.parametrize("name", ["rows.jsonl", "runs/tiny/run.json", "pipe"])
def test_a_release_overwrites_only_releases(run: Path, name: str) -> None:
    target = run.parent.parent / name
    if name == "pipe":
        os.mkfifo(target)
    before = target.read_bytes() if target.is_file() else None
    with pytest.raises(RecipeError, match="the file exists and is not a release"):
        make_release(run, target)
    assert before == (target.read_bytes() if target.is_file() else None)


NESTED = "[" * 700 + "]" * 700


@pytest.mark.parametrize(
    ("key", "value"),
    [("recipe", "{}"), ("recipe", '{"task": []}'), ("verdict", "{}"), ("verdict", '{"word": 5}'), ("verdict", NESTED)],
)
def test_a_damaged_release_is_named(file: Path, here: Path, key: str, value: str) -> None:
    content = {**json.loads(file.read_text()), key: "VALUE"}
    (here / "damaged.json").write_text(json.dumps(content).replace('"VALUE"', value))
    for command in (("show", "damaged.json"), ("list", ".")):
        done = invoke("release", *command)
        assert done.exit_code == 2
        assert "damaged.json" in done.stderr


def test_releases_are_listed_and_compared_row_by_row(run: Path, file: Path) -> None:
    other = make_release(run, file.with_name("two.json"))
    (file.parent / "package.json").write_text("{}")
    (file.parent / "numbers.json").write_text("[1]")
    assert {path for path, _ in list_releases(file.parent)} == {file, other}
    difference, left_out = diff_releases(file, other)
    assert {change.value for change in difference.values()} == {0}
    assert left_out == {"answers_cut": "has no scores by row"}


def test_a_file_that_is_not_a_release_is_refused(file: Path, tmp_path: Path) -> None:
    for content, error in (
        ("{}", RecipeError),
        ("[1]", RecipeError),
        (file.read_text().replace('"release_version": 1', '"release_version": 9'), RecipeError),
        (json.dumps({**json.loads(file.read_text()), "measures": "UEsD"}), EnvironmentProblem),
        (json.dumps({**json.loads(file.read_text()), "measures": "é"}), RecipeError),
        (f"<<<<<<< ours\n{file.read_text()}", RecipeError),
    ):
        (tmp_path / "odd.json").write_text(content)
        with pytest.raises(error):
            open_release(tmp_path / "odd.json", "odd")
    with pytest.raises(RecipeError, match="file not found"):
        open_release(tmp_path / "gone.json", "gone")


def test_a_damaged_release_in_a_folder_does_not_make_an_older_one_the_champion(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / "old.json")
    (tmp_path / "new.json").write_text(f"<<<<<<< ours\n{file.read_text()}")
    with pytest.raises(RecipeError, match="damaged: not JSON"):
        find_release(tmp_path, "tiny")


def test_any_damaged_byte_in_scores_by_row_is_an_error_or_harmless(run: Path) -> None:
    path = run / "evaluation" / "measures.npz"
    packed, whole = path.read_bytes(), load_measures(path.parent)
    for at in range(0, len(packed), 37):
        damaged = packed[:at] + bytes([packed[at] ^ 0x5A]) + packed[at + 1 :]
        with suppress(EnvironmentProblem):
            assert unpack_measures(damaged, path, "").rows == whole.rows


def test_a_champion_with_edited_scores_is_judged_by_its_rows(run: Path, file: Path, tmp_path: Path) -> None:
    content = json.loads(file.read_text())
    (tmp_path / "edited.json").write_text(json.dumps({**content, "tuned": {}}))
    recipe = load_recipe(run.parent.parent / "tiny.yaml", [f"evaluate.champion={tmp_path / 'edited.json'}"]).recipe
    own = open_run_scores(run, "own")
    found = compare_with_champion(open_champion(recipe), recipe, own.evaluation, own.measures)
    assert found.scores["loss"] == content["tuned"]["loss"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "gone"])
def test_keys_and_signatures_must_be_regular_files(file: Path, tmp_path: Path, kind: str) -> None:
    places = {"device": Path("/dev/zero"), "folder": tmp_path, "gone": tmp_path / "gone", "pipe": tmp_path / "pipe"}
    os.mkfifo(tmp_path / "pipe")
    release = Path(shutil.copy(file, tmp_path / "one.json"))
    with pytest.raises(RecipeError, match="cannot be read"):
        check_signature(release, places[kind])
    if kind != "gone":
        (tmp_path / "one.json.sig").symlink_to(places[kind])
        with pytest.raises(RecipeError, match="cannot be read"):
            check_signature(release, None)


def test_a_release_is_a_champion_on_the_command_line(run: Path, file: Path, tmp_path: Path) -> None:
    made = invoke("release", run, "--out", tmp_path / "best.json")
    assert made.exit_code == 0, made.output
    assert "evaluate.champion" in made.stdout
    shown = invoke("release", "show", tmp_path / "best.json")
    assert "loss <= base + 100" in shown.stdout, shown.output
    listed = json.loads(invoke("release", "list", tmp_path, "--json").stdout)
    assert [one["name"] for one in listed] == ["tiny"]
    assert "measures" not in listed[0]
    compared = json.loads(invoke("release", "diff", tmp_path / "best.json", file, "--json").stdout)
    assert compared["difference"]["loss"]["value"] == 0
    sets = ["--set", f"evaluate.champion={tmp_path / 'best.json'}", "--set", "evaluate.gates=['loss <= champion']"]
    done = invoke("run", run.parent.parent / "tiny.yaml", "--out", tmp_path / "next", *sets)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "next" / "report.json").read_text())
    assert report["evaluation"]["champion"]["difference"]["loss"]["value"] == 0


def test_a_metric_missing_on_one_side_or_by_row_is_named(run: Path, file: Path, tmp_path: Path) -> None:
    content = json.loads(file.read_text())
    more = {**content, "tuned": {**content["tuned"], "chrf": 1.0}}
    (tmp_path / "more.json").write_text(json.dumps(more))
    assert "answers_cut" in content["tuned"]
    _, left_out = diff_releases(file, tmp_path / "more.json")
    assert left_out == {"answers_cut": "has no scores by row", "chrf": "measured only in more.json"}


def test_a_signature_identifies_the_signer_and_a_changed_file_fails(run: Path, tmp_path: Path) -> None:
    for name in ("key", "stranger"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{name}@example.org", "-f", str(tmp_path / name)]
        subprocess.run(words, check=True)
    signers = tmp_path / "signers"
    signers.write_text("key@example.org " + (tmp_path / "key.pub").read_text())
    file = tmp_path / "signed.json"
    made = invoke("release", run, "--out", file, "--sign", tmp_path / "key")
    assert made.exit_code == 0, made.output
    shown = invoke("release", "show", file, "--signers", signers)
    assert "signed.json.sig: signed by key@example.org" in shown.stdout, shown.output
    unknown = json.loads(invoke("release", "show", file, "--json").stdout)["signature"]
    assert (unknown["kind"], unknown["checked"]) == ("ssh", False)
    assert unknown["by"].startswith("SHA256:")
    file.write_text(file.read_text().replace('"tiny"', '"best"'))
    forged = invoke("release", "show", file)
    assert forged.exit_code == 6
    assert "changed since it was signed" in forged.stderr
    invoke("release", run, "--out", file, "--sign", tmp_path / "stranger")
    refused = invoke("release", "show", file, "--signers", signers)
    assert refused.exit_code == 6
    assert "signed by a key that is not in" in " ".join(refused.stderr.split())
    invoke("release", run, "--out", file)
    assert not (tmp_path / "signed.json.sig").exists()
    assert invoke("release", "show", file, "--signers", signers).exit_code == 6
    gone = invoke("release", run, "--out", file, "--sign", tmp_path / "no-key")
    assert gone.exit_code == 2
    assert "SSH key" in " ".join(gone.stderr.split())


def test_sigstore_signs_if_installed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = invoke("release", run, "--out", tmp_path / "one.json", "--sign", "sigstore")
    assert done.exit_code == 4
    assert "pip install sigstore" in done.stderr
    (tmp_path / "sigstore").write_text('#!/bin/sh\necho "$@" >"$3"\n')  # the program talks to a server
    (tmp_path / "sigstore").chmod(0o755)
    done = invoke("release", run, "--out", tmp_path / "one.json", "--sign", "sigstore")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "one.json.sigstore.json").read_text().startswith("sign --bundle")
    assert "sigstore verify identity" in invoke("release", "show", tmp_path / "one.json").stdout
