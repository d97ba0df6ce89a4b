"""`verify`: every claim of a run against what is there now, each change named by its file."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from support.runs import finish_run, invoke

from llmtune.errors import RecipeError
from llmtune.report.junit import failures_in_junit
from llmtune.report.report_page import link_explanations
from llmtune.store.atomic_files import hash_file
from llmtune.store.run_folder import REPORTS
from llmtune.store.run_lock import LOCK, read_lock, read_pins
from llmtune.store.verification import Verification, verify_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Return a folder with rows, recipe, model and a finished run."""
    place = tmp_path_factory.mktemp("made") / "project"
    place.mkdir()
    shutil.copytree(tiny_llama, place / "model")
    finish_run(place, Path("./model"))
    return place


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    """Return a copy to change; the original is moved away so that its files cannot be found."""
    place = tmp_path / "elsewhere" / "project"
    shutil.copytree(made, place)
    lock = place / "runs/tiny" / LOCK
    for path in (lock, place / "runs/tiny/recipe.yaml"):
        path.write_text(path.read_text().replace(str(made), str(made / "gone")))
    manifest = place / "runs/tiny/run.json"
    known = json.loads(manifest.read_text())
    known["lock"] = hash_file(lock)
    manifest.write_text(json.dumps(known))
    return place


def failed(found: Verification) -> list[tuple[str, str, str]]:
    """Return kind, file name and state of all failed findings."""
    return [(finding.kind, Path(finding.name).name, finding.state) for finding in found.failed]


def flip_byte(path: Path, at: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_run_is_verified_in_place_and_in_a_copy_of_its_project(made: Path, project: Path) -> None:
    for place in (made, project):
        found = verify_run(place / "runs/tiny")
        assert failed(found) == []
        kinds = {finding.kind for finding in found.findings if finding.state == "same"}
        inputs = {"lock", "recipe", "data", "model", "template"}
        assert inputs | {"rows", "examples", "adapter", "evaluation", "evaluated"} <= kinds


def test_one_changed_byte_of_the_data_is_named_with_its_file_and_exit_code_6(project: Path) -> None:
    flip_byte(project / "rows.jsonl", 40)
    assert failed(verify_run(project / "runs/tiny")) == [("data", "rows.jsonl", "changed")]
    done = invoke("verify", project / "runs/tiny")
    assert done.exit_code == 6
    assert f"{project / 'rows.jsonl'}: data: changed since the run: its hash was" in done.stderr.replace("\n", "")
    assert "run the recipe again" in done.stderr


def test_one_changed_byte_of_any_other_file_is_named_with_its_file(project: Path) -> None:
    run = project / "runs/tiny"
    changes = [
        (project / "model/model.safetensors", "model"),
        (project / "model/tokenizer.json", "model"),
        (run / "data/rows/train.rows.arrow", "rows"),
        (run / "evaluation/evaluation.json", "evaluation"),
    ]
    for file, _ in changes:
        flip_byte(file)
    assert failed(verify_run(run)) == [(kind, file.name, "changed") for file, kind in changes]


def test_one_changed_byte_of_any_key_of_the_lock_is_named_or_makes_it_unreadable(project: Path) -> None:
    path = project / "runs/tiny" / LOCK
    content = path.read_bytes()
    places = {match[1]: match.start(1) for match in re.finditer(rb'"(\w+)":', content)}
    assert len(places) > 30
    for place in places.values():
        flip_byte(path, place)
        with suppress(RecipeError):  # it names the lock
            assert ("lock", LOCK, "changed") in failed(verify_run(project / "runs/tiny")), content[place : place + 20]
        path.write_bytes(content)


@pytest.mark.parametrize("name", REPORTS)
def test_an_edited_verdict_is_named_with_its_file(project: Path, name: str) -> None:
    run = project / "runs/tiny"
    (run / name).write_text((run / name).read_text() + " ")
    assert failed(verify_run(run)) == [("report", name, "changed")]


def test_files_that_llmtune_rewrites_are_verified_and_files_edited_before_are_named(project: Path) -> None:
    run = project / "runs/tiny"
    assert link_explanations(run)
    with pytest.raises(RecipeError), failures_in_junit(run, "tiny"):
        raise RecipeError.of("wrong", "x")
    assert "wrong" in (run / "junit.xml").read_text()
    assert failed(verify_run(run)) == []
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(report | {"verdict": {}}))
    assert link_explanations(run)
    assert failed(verify_run(run)) == [("report", "report.json", "changed")]


def test_a_changed_adapter_and_another_template_are_named(project: Path) -> None:
    adapter = project / "runs/tiny/adapter"
    flip_byte(adapter / "adapter_model.safetensors")
    (adapter / "chat_template.jinja").write_text("other")
    assert failed(verify_run(project / "runs/tiny")) == [
        ("template", "chat_template.jinja", "changed"),
        ("adapter", "adapter_model.safetensors", "changed"),
        ("adapter", "chat_template.jinja", "changed"),
        ("evaluated", "adapter", "changed"),
    ]


def test_a_changed_model_that_mined_negatives_is_named(project: Path) -> None:
    run, miner = project / "runs/tiny", shutil.copytree(project / "model", project / "miner")
    lock, manifest = read_lock(run / LOCK), json.loads((run / "run.json").read_text())
    lock["miner"] = {**lock["model"], "name": str(miner), "folder": str(miner)}
    (run / LOCK).write_text(json.dumps(lock))
    (run / "run.json").write_text(json.dumps(manifest | {"lock": hash_file(run / LOCK)}))
    assert failed(verify_run(run)) == []
    flip_byte(miner / "model.safetensors")
    assert failed(verify_run(run)) == [("model", "model.safetensors", "changed")]


def test_missing_and_added_files_are_named(project: Path) -> None:
    (project / "rows.jsonl").unlink()
    (project / "model/generation_config.json").unlink()
    (project / "model/vocab.txt").write_text("new")
    wanted = {("data", "rows.jsonl", "missing"), ("model", "generation_config.json", "missing")}
    assert set(failed(verify_run(project / "runs/tiny"))) == wanted | {("model", "vocab.txt", "added")}


def test_a_changed_recipe_key_is_named_but_not_a_changed_gate(project: Path) -> None:
    path = project / "runs/tiny/recipe.yaml"
    text = path.read_text()
    path.write_text(text.replace("gates: []", 'gates: ["accuracy >= 0"]'))
    assert failed(verify_run(project / "runs/tiny")) == []
    path.write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    assert failed(verify_run(project / "runs/tiny")) == [("recipe", "recipe.yaml: train", "changed")]
    path.write_text(text.replace("max_new_tokens: 8", "max_new_tokens: 9"))
    assert failed(verify_run(project / "runs/tiny")) == [("recipe", "recipe.yaml: generation", "changed")]


def test_another_package_version_is_reported_and_fails_only_with_strict(project: Path) -> None:
    path = project / "runs/tiny" / LOCK
    lock = json.loads(path.read_text())
    now, lock["packages"]["torch"] = lock["packages"]["torch"], "1.0"
    path.write_text(json.dumps(lock))
    found = verify_run(project / "runs/tiny")
    assert failed(found) == [("lock", LOCK, "changed")]
    assert [(one.state, one.was, one.now) for one in found.findings if one.name == "torch"] == [("differs", "1.0", now)]
    assert ("packages", "torch", "changed") in failed(verify_run(project / "runs/tiny", strict=True))


def test_a_file_added_to_a_folder_of_rows_is_named(tmp_path: Path, project: Path) -> None:
    (tmp_path / "rows").mkdir()
    (project / "rows.jsonl").rename(tmp_path / "rows" / "rows.jsonl")
    path = project / "runs/tiny" / LOCK
    lock = json.loads(path.read_text())
    for source in (tmp_path / "rows", tmp_path / "rows" / "*.jsonl", tmp_path / "r*" / "*.jsonl"):
        (tmp_path / "rows" / "more.jsonl").unlink(missing_ok=True)
        lock["data"]["files"][0] |= {"source": str(source), "path": str(tmp_path / "rows" / "rows.jsonl")}
        path.write_text(json.dumps(lock))
        assert [kind for kind, _, _ in failed(verify_run(project / "runs/tiny"))] == ["lock"]
        (tmp_path / "rows" / "more.jsonl").write_text("{}\n")
        (tmp_path / "rows" / "more.txt").write_text("no data")
        assert failed(verify_run(project / "runs/tiny"))[1:] == [("data", "more.jsonl", "added")]


def test_a_lock_of_an_older_llmtune_is_read_and_its_gaps_are_reported(project: Path) -> None:
    path = project / "runs/tiny" / LOCK
    lock = json.loads(path.read_text())
    for key in ("lock_version", "folder", "recipe", "start_from", "trained"):
        del lock[key]
    del lock["model"]["files"], lock["model"]["folder"], lock["data"]["files"]
    path.write_text(json.dumps(lock))
    manifest = json.loads((project / "runs/tiny/run.json").read_text())
    del manifest["lock"]
    (project / "runs/tiny/run.json").write_text(json.dumps(manifest))
    found = verify_run(project / "runs/tiny")
    assert found.failed == []
    unknown = {finding.kind for finding in found.findings if finding.state == "unknown"}
    assert unknown == {"lock", "recipe", "data", "model"}
    assert read_pins(path).model_hash == lock["model"]["sha256"]


def test_a_later_lock_and_a_run_without_one_are_refused(project: Path, tmp_path: Path) -> None:
    path = project / "runs/tiny" / LOCK
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lock_version": 99}))
    with pytest.raises(RecipeError, match="version 99"):
        verify_run(project / "runs/tiny")
    path.unlink()
    with pytest.raises(RecipeError, match=r"no llmtune\.lock"):
        verify_run(project / "runs/tiny")
    with pytest.raises(RecipeError, match="run folder not found"):
        verify_run(tmp_path / "nothing")


def test_json_is_one_document_and_torch_is_not_imported(project: Path) -> None:
    code = "import sys\nfrom llmtune.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    flip_byte(project / "rows.jsonl", 40)
    command = [sys.executable, "-c", code, "verify", str(project / "runs/tiny"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    found = json.loads(done.stdout)
    assert not found["verified"]
    assert [problem["where"] for problem in found["problems"]] == [str(project / "rows.jsonl")]
