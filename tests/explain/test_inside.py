"""docs/inside.md: each of its commands runs, and each of its pictures exists and is small."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from support.families import build_bert, build_whisper
from support.models import build_llama
from support.runs import finish_run
from typer.testing import CliRunner

from llmtune.cli.app import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/inside.md").read_text("utf-8")
COMMANDS = re.findall(r"^ {4}(llmtune explain .+)$", PAGE, flags=re.MULTILINE)
LINKED = re.findall(r"\]\(inside/([^)]+)\)", PAGE)
LARGEST_BYTES = 150_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by the page's names, with enough layers for its commands."""
    folder = tmp_path_factory.mktemp("models")
    llama = build_llama(folder / "llama", layers=8)
    return {
        "RUN": finish_run(folder, llama, train={"num_train_epochs": 1}, evaluate={"metrics": ["loss"]}),
        "builtin:minilm-l6-v2": build_bert(folder / "bert", num_hidden_layers=6),
        "builtin:whisper-tiny.en": build_whisper(folder / "whisper"),
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_of_the_page_runs_and_writes_self_contained_files(
    models: dict[str, Path], tmp_path: Path, monkeypatch, line
):
    monkeypatch.chdir(ROOT)  # the page names a recording of the repository
    words = [str(models.get(word, word)) for word in shlex.split(line)[1:]]
    quick = ["--no-measure"] if words[1] == "model" and "model-time" not in picture_of(line) else []
    result = CliRunner().invoke(app, [*words, *quick, "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert {Path(name).name for name in json.loads(result.stdout)["files"]} == {
        file.name for file in tmp_path.iterdir()
    }
    if picture_of(line):
        assert (tmp_path / picture_of(line)).stat().st_size > 500
    (page,) = (file.read_text("utf-8") for file in tmp_path.glob("*.html"))
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=.(?:https?:)?//", page)
    for drawing in tmp_path.glob("*.svg"):
        ElementTree.parse(drawing)


def picture_of(line: str) -> str:
    """The file of the picture below a command; empty if there is no picture."""
    found = re.search(rf"^    {re.escape(line)}\n\n!\[[^]]*\]\(inside/[^.]+\.([^)]+)\)", PAGE, flags=re.MULTILINE)
    return found[1] if found else ""


def test_the_page_uses_all_five_commands():
    assert {line.split()[2] for line in COMMANDS} == {"attention", "generation", "positions", "model", "adapter"}


def test_every_picture_exists_is_small_and_valid_and_belongs_to_a_command():
    assert sorted(LINKED) == sorted(path.name for path in (ROOT / "docs/inside").iterdir())
    for name in LINKED:
        path = ROOT / "docs/inside" / name
        assert path.stat().st_size < LARGEST_BYTES, name
        assert any(picture_of(line) and name.endswith(picture_of(line)) for line in COMMANDS)
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.size[0] > 600
        else:
            ElementTree.parse(path)
            assert not re.search(r'"[^"]*/(tmp|home|work|root)/', path.read_text("utf-8")), name
