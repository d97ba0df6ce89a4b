"""Wheel and source archive: built, installed outside the checkout, and still able to find the shipped recipes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune import __version__

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = place.glob("llmtune_cli-*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(place / "site"), str(wheel)], check=True, capture_output=True)
    return place


def run_installed(place: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(place / "site"), "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=place, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def test_the_installed_wheel_lists_and_checks_the_shipped_recipes(installed: Path) -> None:
    where = run_installed(installed, "-c", "import llmtune; print(llmtune.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    listed = run_installed(installed, "-m", "llmtune", "recipes", "list")
    names = sorted(recipe.stem for recipe in (ROOT / "recipes").glob("*.yaml"))
    assert all(name in listed for name in names)
    checks = (
        f"from llmtune.recipe.loader import load_recipe; [print(load_recipe(name).recipe.name) for name in {names}]"
    )
    assert run_installed(installed, "-c", checks).split() == names
    assert "valid" in run_installed(installed, "-m", "llmtune", "recipes", "check", names[0])


def test_the_wheel_contains_its_run_time_files(installed: Path) -> None:
    names = {str(path.relative_to(installed / "site")) for path in (installed / "site").rglob("*")}
    assert {
        "llmtune/py.typed",
        "llmtune/__init__.pyi",
        "llmtune/report/page.html.jinja",
        "llmtune/deploy/model_card.md.jinja",
        "llmtune/serve/docs.html",
        "llmtune/recipes/data/debian-sections.jsonl",
        "llmtune/recipes/starters/chat.yaml",
    } <= names


@pytest.fixture(scope="module")
def built_by_make(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dist")
    command = ["make", "build", f"DIST={place}", f"VENV={sys.prefix}", f"--old-file={sys.prefix}/.ready"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return place


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["{}-py3-none-any.whl", "{}.tar.gz"], ids=["wheel", "source"])
def test_a_distribution_installs_into_an_empty_environment_and_runs(
    built_by_make: Path, tmp_path: Path, name: str
) -> None:
    file = built_by_make / name.format(f"llmtune_cli-{__version__}")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", file]
    done = subprocess.run(pip, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = {"PATH": f"{tmp_path / 'venv/bin'}:/usr/bin:/bin", "HOME": str(tmp_path), "COLUMNS": "200"}

    def run(*words: str) -> str:
        done = subprocess.run(["llmtune", *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout + done.stderr

    try:
        assert run("--version") == f"llmtune {__version__}\n"
        listed = run("recipes", "list")
        assert all(recipe.stem in listed for recipe in (ROOT / "recipes").glob("*.yaml"))
        assert run("doctor").endswith("ready\n")
        assert "valid" in run("recipes", "check", "quickstart")
        (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
        rows = {path.name for path in (site / "llmtune/recipes/data").glob("*.jsonl")}
        assert rows == {path.name for path in (ROOT / "recipes/data").glob("*.jsonl")}
    finally:
        shutil.rmtree(tmp_path / "venv")
