"""The steps of examples/ci as CI systems run them: no home, no terminal, the locale C, a checkout that is read only."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "examples" / "ci"
OWN_MOUNTS = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount"]
"""Gives a process mounts of its own."""
WRITABLE = ("runs", "releases", ".cache")
"""Of a checkout: what a job makes itself."""
STUB = '#!/bin/sh\necho "$(basename "$0") $*" >>"$CALLS"\n'
HOST = "https://tune:secret@gitlab.test/team/models.git"


@dataclass
class Place:
    """A repository on a server, and programs that stand in for those that talk to CI systems."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def calls(self) -> list[str]:
        """What was asked of gh and curl."""
        return (self.folder / "calls").read_text().splitlines()

    def run(self, line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a shell line as a job does, where the checkout is mounted to be read only, but for what jobs make."""
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
    """Where what jobs make in a checkout lies."""
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
    """Run the steps of GitHub's job on a fresh checkout; return how it ended, and what was printed."""
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
    """Put values in place of `${{ name }}`."""
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
    """Take everything away again."""
    shutil.rmtree(place.folder, ignore_errors=True)
