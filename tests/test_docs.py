"""README and docs are true: commands parse, recipes are valid, links resolve, and the tutorial runs."""

import csv
import json
import re
import shlex
import tomllib
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer
from support.runs import llmtune
from typer.main import get_command

from llmtune import __version__
from llmtune.cli.app import app
from llmtune.recipe.loader import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes/README.md",
    ROOT / "examples/ci/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMAND = get_command(app)
STAND_INS = {"RUN": "run", "RECIPE": "quickstart", "NAME": "quickstart", "FOLDER": "folder", "TEXT": "text", "N": "2"}


def commands() -> list[str]:
    """Every `llmtune ...` command on a page."""
    found = set()
    for page in PAGES:
        if page.name == "cli.md":
            continue  # made from the commands themselves
        text = page.read_text(encoding="utf-8")
        inline = re.findall(r"`(llmtune [^`\n]+)`", text)
        blocks = re.findall(r"^ {4}(llmtune .+)$", text, flags=re.MULTILINE)
        found.update(re.sub(r"\s+[#>].*$", "", line).strip() for line in inline + blocks)
    return sorted(line for line in found if "|" not in line and "..." not in line)


@pytest.mark.parametrize("line", commands())
def test_a_command_in_the_docs_parses(line: str) -> None:
    words = [STAND_INS.get(word, word) for word in shlex.split(re.sub(r"[\[\]]", "", line))[1:]]
    command = COMMAND
    while hasattr(command, "commands") and words:
        if words[0].startswith("-"):
            return
        _, command, words = command.resolve_command(typer.Context(command), words)  # fails for an unknown command
    if words:
        with suppress(typer.Exit):  # of an option that prints and ends
            assert command.make_context(line, list(words), resilient_parsing=False) is not None


def recipes() -> list[tuple[str, str]]:
    blocks = []
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            if block.startswith("recipe_version"):
                blocks.append((f"{page.name}:{len(blocks)}", block))
    return blocks


@pytest.mark.parametrize(("name", "block"), recipes())
def test_a_recipe_in_the_docs_is_valid(tmp_path: Path, name: str, block: str) -> None:
    (tmp_path / "recipe.yaml").write_text(block)
    assert load_recipe(str(tmp_path / "recipe.yaml")).recipe.task == "chat"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_modules_and_functions_named_on_a_page_exist() -> None:
    pages = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    named = sorted(set(re.findall(r"`(llmtune/[a-z_/]+\.py)(?:::(\w+))?`", text)))
    assert len([name for _, name in named if name]) > 30, "those of the tour"
    assert not [file for file, _ in named if not (ROOT / file).is_file()]
    for file, name in named:
        assert re.search(rf"^(def|class) {name}\b" if name else "", (ROOT / file).read_text(), re.M), f"{file}::{name}"


def test_badges_and_changelog_state_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    badges = dict(re.findall(r"img\.shields\.io/badge/(\w+)-(\S+)-\w+\)", text))
    python = project["requires-python"].removeprefix(">=") + "+"
    wanted = {"version": __version__, "python": python, "licence": project["license"]}
    assert {name: unquote(value).replace("--", "-") for name, value in badges.items()} == wanted
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert headings[1].startswith(f"[{__version__}] - ")


def test_the_map_of_the_support_code_names_every_file() -> None:
    folder = ROOT / "tests" / "support"
    named = re.findall(r"^\| `(\w+\.py)`", (folder / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, tiny_llama: Path) -> None:
    """From an empty folder with a CSV, with the tutorial's commands and a tiny model."""
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(recipe_version.*?)```", text, flags=re.DOTALL)
    rows = [(f"Order {i}", f"Where is order {i}?", "It is on its way.") for i in range(60)]
    rows += [(f"Bill {i}", f"I paid {i} twice", "You get it back.") for i in range(60)]
    with (tmp_path / "tickets.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("subject", "body", "answer"), *rows])
    (tmp_path / "open.csv").write_text("subject,body\nOrder 99,Where is order 99?\n")
    lines = re.findall(r"^ {4}(llmtune .*tickets.*)$", text, flags=re.MULTILINE)
    assert lines[0] == "llmtune init tickets.csv"
    for line in [*lines, "llmtune run tickets.yaml"]:
        words = shlex.split(line)[1:]
        if words[0] == "init":
            words += ["--model", str(tiny_llama)]
        elif words[0] in ("prepare", "run"):
            words += ["--set", "data.deduplicate=none"]
        if "runs/tickets-" not in line:
            done = llmtune(*words, cwd=tmp_path)
            assert done.returncode == 0, (line, done.stderr)
    (tmp_path / "shown.yaml").write_text(block)
    made, shown = (load_recipe(str(tmp_path / f"{name}.yaml")).recipe for name in ("tickets", "shown"))
    assert made.data.train[0].columns == shown.data.train[0].columns
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "report.html").exists()
    assert json.loads((tmp_path / "answers.jsonl").read_text())["subject"] == "Order 99"
