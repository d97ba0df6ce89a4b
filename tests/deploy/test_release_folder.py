"""A release as a folder: it opens wherever a run does, holds no text of rows, and never changes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support.adapting import quiet
from support.runs import finish_run, invoke

import llmtune
from llmtune.deploy.release_folder import promote_run
from llmtune.errors import RecipeError
from llmtune.evaluate.release_records import read_release
from llmtune.store.atomic_files import hash_folder, list_folder
from llmtune.store.release_store import RECORD_FILE, resolve_release

QUESTION = "What comes after 3 and before 5?"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with a run and its release."""
    place = tmp_path_factory.mktemp("project")
    (place / "mine.jinja").write_text((tiny_llama / "chat_template.jinja").read_text())
    run = finish_run(
        place,
        tiny_llama,
        train={"num_train_epochs": 1},
        model={"chat_template": "mine.jinja"},
        evaluate={"gates": ["loss <= base + 100"]},
        deploy=["merged"],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        promote_run(run, quiet(), offline=True)
    return place


@pytest.fixture
def release(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The release in a copy of the project, which is the working folder."""
    place = shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(place)
    return resolve_release("release:tiny")


def test_a_release_has_what_serves_and_no_text_of_rows(release: Path) -> None:
    names = {path.name for path in release.iterdir()}
    assert names >= {"adapter", "merged", "evaluation", "llmtune.lock", "recipe.yaml", "serving.json", RECORD_FILE}
    assert not names & {"data", "checkpoints", "row_losses.npz"}
    for path in release.rglob("*"):
        if path.is_file():
            assert b"What comes after" not in path.read_bytes(), path.name
    text = (release / RECORD_FILE).read_text()
    files = json.loads(text)["files"]
    assert files.items() <= list_folder(release).items()
    assert {"adapter/adapter_model.safetensors", "merged/model.safetensors", "learned_inputs.bin"} <= files.keys()
    assert str(Path.cwd()) not in text
    assert read_release(release / RECORD_FILE)["run"] == "tiny"


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "release:tiny", QUESTION),
        ("compare", "release:tiny", "runs/tiny"),
        ("explain", "adapter", "release:tiny"),
        ("explain", "model", "release:tiny"),
        ("explain", "attention", "release:tiny", "--text", QUESTION),
        ("deploy", "merge", "release:tiny", "--out", "elsewhere"),
        ("deploy", "certify", "runs/tiny/merged", "--run", "release:tiny"),
        ("deploy", "publish", "release:tiny", "--to", "published"),
        ("deploy", "publish", "release:tiny", "--to", "published", "--merged"),
        ("release", "show", "tiny"),
        ("release", "show", "release:tiny", "--json"),
        ("release", "diff", "tiny", "release:tiny"),
        ("release", "list", "--json"),
        ("verify", "release:tiny"),
        ("reproduce", "release:tiny"),
        ("runs",),
    ],
    ids=" ".join,
)
def test_a_release_opens_wherever_a_run_does_and_what_serves_stays_the_same(
    release: Path, command: tuple[str, ...]
) -> None:
    served = json.loads((release / RECORD_FILE).read_text())["files"]
    done = invoke(*command, *(["--offline"] if command[0] in ("generate", "explain", "deploy") else []))
    assert done.exit_code == 0, done.output
    assert served.items() <= list_folder(release).items()


def test_python_opens_a_release_and_it_answers_as_its_run(release: Path) -> None:
    run, released = llmtune.load_run("runs/tiny"), llmtune.load_run("release:tiny")
    assert released.generate(QUESTION) == run.generate(QUESTION)
    assert released.scores == run.scores
    assert released.gates == run.gates
    assert released.report["verdict"]["word"] == run.report["verdict"]["word"]


def test_a_release_keeps_the_users_own_template(project: Path, release: Path) -> None:
    said = llmtune.load_run("release:tiny").generate(QUESTION)
    template = project / "mine.jinja"
    original = template.read_text()
    template.write_text("{{ 'something else' }}")
    try:
        assert llmtune.load_run("release:tiny").generate(QUESTION) == said
    finally:
        template.write_text(original)


@pytest.mark.parametrize("words", [("run", "tiny.yaml", "--out"), ("evaluate",)])
def test_nothing_is_trained_or_evaluated_in_a_release(release: Path, words: tuple[str, ...]) -> None:
    before = hash_folder(release)
    refused = invoke(*words, release, "--offline")
    assert refused.exit_code == 2
    assert "this folder is a release, which never changes" in refused.stderr
    assert hash_folder(release) == before
    with pytest.raises(RecipeError, match="a release already"):
        promote_run(release, quiet(), offline=True)


def test_a_run_with_a_failed_export_or_gate_or_without_scores_is_not_released(release: Path) -> None:
    run, before = Path("runs/tiny"), hash_folder(Path("releases"))
    (run / "merged" / "config.json").write_text("{}")
    refused = invoke("release", run, "--offline")
    assert refused.exit_code == 2
    assert "the exports merged are not made yet" in refused.stderr
    report = json.loads((run / "report.json").read_text())
    for passed, code in ((False, 6), (None, 7)):
        report["gates"][0]["passed"] = passed
        (run / "report.json").write_text(json.dumps(report))
        assert invoke("release", run, "--offline").exit_code == code
    shutil.rmtree(run / "evaluation")
    report["gates"][0]["passed"] = True
    (run / "report.json").write_text(json.dumps(report))
    refused = invoke("release", run, "--offline")
    assert refused.exit_code == 4
    assert hash_folder(Path("releases")) == before


def test_a_clone_without_weights_says_so_and_still_is_a_champion(release: Path) -> None:
    for path in release.iterdir():
        if path.name != RECORD_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused = invoke("generate", "release:tiny", QUESTION, "--offline")
    assert refused.exit_code in (2, 4)
    assert str(release) in refused.stderr
    champion = "evaluate.champion=release:tiny"
    done = invoke("run", "tiny.yaml", "--offline", "--set", champion, "--set", "deploy=[]", "--set", "seed=8")
    assert done.exit_code == 0, done.stderr
    assert "Against the champion" in done.stderr


def test_a_damaged_serving_recipe_is_named(release: Path) -> None:
    (release / "serving.json").write_text("{")
    refused = invoke("generate", "release:tiny", QUESTION, "--offline")
    assert refused.exit_code == 4
    assert "serving.json" in refused.stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evaluate.champion", "release:x@YZ"),
        ("evaluate.champion", "release:a/b"),
        ("adapter.start_from", "release:tiny@1"),
    ],
)
def test_an_address_that_is_none_is_refused_by_the_recipe(release: Path, key: str, value: str) -> None:
    refused = invoke("recipes", "check", "tiny.yaml", "--set", f"{key}={value}")
    assert refused.exit_code == 2
    assert f"'{value}' is not the address of a release" in refused.stderr
    assert "release:NAME@HASH" in refused.stderr


def test_a_release_needs_test_rows(release: Path) -> None:
    refused = invoke("recipes", "check", "tiny.yaml", "--set", "deploy=[release]", "--set", "data.test=0.0")
    assert refused.exit_code == 2
    assert "'release' needs scores, but there are no test rows" in refused.stderr


def test_a_signed_release_is_checked(release: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    shutil.rmtree("releases")
    made = invoke("release", "runs/tiny", "--sign", key, "--offline")
    assert made.exit_code == 0, made.stderr
    (tmp_path / "signers").write_text(f"me {key.with_suffix('.pub').read_text()}")
    shown = invoke("release", "show", "tiny", "--signers", tmp_path / "signers")
    assert shown.exit_code == 0, shown.stderr
    assert "signed by me" in shown.stdout
