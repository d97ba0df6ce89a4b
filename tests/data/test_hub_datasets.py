"""Data sets by name, against a small local hub: the rows read come from the hashed commit."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, Features, List, Value
from rich.console import Console
from support.audio import write_tone
from support.http_server import Headers, answering, read_repository
from support.rows import make_recipe, read_file

from llmtune.data.hub_datasets import as_files_hold_it
from llmtune.data.preparation import prepare_rows
from llmtune.data.sources import hash_sources
from llmtune.errors import EnvironmentProblem

OLD, NEW = "a" * 40, "b" * 40
CODE = """
import json, sys
from pathlib import Path
from rich.console import Console
from llmtune.data.preparation import prepare_rows
from llmtune.data.row_store import iterate_rows
from llmtune.data.sources import hash_sources
from llmtune.errors import LlmtuneError
from llmtune.recipe.loader import load_recipe
for number, file in enumerate(sys.argv[2:]):
    data = load_recipe(file).recipe
    try:
        lines = [hash_sources(data.data, data.task)]
        rows = prepare_rows(data, Path(sys.argv[1]) / str(number), Console(stderr=True))
        for origin, row in iterate_rows(rows, "train"):
            lines.append(f"{origin} {row['messages'][1]['content'] if 'messages' in row else json.dumps(row)}")
    except LlmtuneError as error:
        lines = [type(error).__name__, *str(error).split()]
    print(json.dumps(lines))
"""


@dataclass
class Hub:
    """Data sets whose branches move after the first request."""

    address: str = ""
    asked: list[str] = field(default_factory=list)
    train: bytes | None = None
    """Replace the rows with a Parquet file."""

    def answer(self, verb: str, path: str, headers: Headers, body: bytes) -> tuple[int, Any, Headers]:
        if verb != "POST":
            self.asked.append(path)
        commit = next((commit for commit in (OLD, NEW) if commit in path), None)
        if commit is None:
            name = re.search("owner/[a-z]+", path)[0]
            asked = [before for before in self.asked if name in before and OLD not in before and NEW not in before]
            commit = OLD if len(asked) <= 1 else NEW
        answer = "old" if commit == OLD else "new"
        rows = [{"prompt": f"question {i}", "completion": answer} for i in range(8)]
        files = {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}
        return read_repository(path, body, {"train.parquet": self.train} if self.train else files, commit)


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    with answering(found.answer) as found.address:
        yield found


def read(hub, folder, *sources: object, offline: bool = False, task: str = "chat") -> list[list[str]]:
    """Read the sources one after the other in a separate process; return the hash and rows of each, or the error."""
    files = []
    for number, source in enumerate(sources):
        make_recipe(folder, source, task, deduplicate="none")
        files.append((folder / "recipe.yaml").rename(folder / f"{number}.yaml"))
    off = "1" if offline else "0"
    switches = {"HF_HUB_OFFLINE": off, "HF_DATASETS_OFFLINE": off, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, folder / "out", *files],
        env={**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "cache"), **switches},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_rows_come_from_the_hashed_commit_even_if_the_branch_moves(hub, tmp_path):
    sources = "hub:owner/whole", {"path": "hub:owner/streamed", "limit": 3}
    (_, *rows), (_, *streamed) = read(hub, tmp_path, *sources)
    assert rows == [f"hub:owner/whole/train:row {i} old" for i in range(1, 9)]
    assert streamed == [f"hub:owner/streamed/train:row {i} old" for i in range(1, 4)]
    later = read(hub, tmp_path, *sources)
    assert [rows[1] for rows in later] == ["hub:owner/whole/train:row 1 new", "hub:owner/streamed/train:row 1 new"]


def test_cached_rows_are_read_offline(hub, tmp_path):
    (first,) = read(hub, tmp_path, "hub:owner/name")
    hub.asked.clear()
    again, limited = read(hub, tmp_path, "hub:owner/name", {"path": "hub:owner/name", "limit": 3}, offline=True)
    assert again == first
    assert limited[1:] == first[1:4]
    assert not hub.asked


def test_rows_of_another_commit_are_refused_offline(hub, tmp_path):
    read(hub, tmp_path, {"path": "hub:owner/name", "revision": NEW}, "hub:owner/name")
    (cached,) = (tmp_path / "cache/datasets").rglob(OLD)
    shutil.rmtree(cached)
    (said,) = read(hub, tmp_path, "hub:owner/name", offline=True)
    assert f"the rows of another commit: {NEW[:12]}, not {OLD[:12]}" in " ".join(said)


def test_a_missing_split_is_reported(hub, tmp_path):
    (said,) = read(hub, tmp_path, {"path": "hub:owner/name", "split": "nosuch"})
    assert "Check `config`, `split`" in " ".join(said)


def test_an_uncached_data_set_is_an_environment_problem_offline(tmp_path):
    recipe = make_recipe(tmp_path, "hub:owner/absent")
    with pytest.raises(EnvironmentProblem, match="offline switch"):
        hash_sources(recipe.data, recipe.task)
    with pytest.raises(EnvironmentProblem, match="offline switch"):
        prepare_rows(recipe, tmp_path / "out", Console(quiet=True))


# Columns other than texts and numbers

TAGS = ClassLabel(names=["O", "B-PERSON", "I-PERSON"])


def sounds_of(cells: list[object], texts: list[str]) -> Dataset:
    """A data set of recordings; declared afterwards, because `datasets` needs torchcodec to encode them."""
    features = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}, "text": Value("string")})
    rows = Dataset.from_dict({"audio": cells, "text": texts}, features=features)
    return rows.cast_column("audio", Audio(sampling_rate=16_000))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> bytes:
    """A Parquet file with the bytes of two recordings, as the hub makes it from uploaded folders."""
    folder = tmp_path_factory.mktemp("sounds")
    paths = [write_tone(folder / "one.flac", rate=22_050, channels=2), write_tone(folder / "two.mp3")]
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    sounds_of(cells, ["one", "two"]).to_parquet(folder / "train.parquet")
    return (folder / "train.parquet").read_bytes()


def test_recordings_of_a_data_set_become_files_named_by_their_hash(hub, sounds, tmp_path):
    hub.train = sounds
    whole = "hub:owner/name"
    (_, *rows), (_, *streamed) = read(hub, tmp_path, whole, {"path": whole, "limit": 2}, task="speech")
    assert streamed == rows
    found = []
    for row in rows:
        origin, _, text = row.partition(" {")
        assert origin.startswith("hub:owner/name/train:row")
        found.append(json.loads("{" + text))
    paths = [Path(row["audio"]) for row in found]
    assert [(row["text"], path.suffix) for row, path in zip(found, paths, strict=True)] == [
        ("one", ".flac"),
        ("two", ".mp3"),
    ]
    assert all(path.stem == row["content"] for row, path in zip(found, paths, strict=True))
    assert [soundfile.info(str(path)).samplerate for path in paths] == [22_050, 16_000]
    assert {path.parent for path in paths} == {tmp_path / "cache" / "llmtune-recordings"}
    assert len(list(paths[0].parent.iterdir())) == 2
    assert read(hub, tmp_path, whole, offline=True, task="speech")[0][1:] == rows


def plain_rows(rows):
    rows, plain = as_files_hold_it(rows)
    return [plain(row) for row in rows]


@pytest.mark.parametrize("source", ["hub", "streamed", "file"])
def test_class_numbers_become_class_names_in_lists_too(source, tmp_path):
    columns = {"label": [1, 0, -1, None], "tags": [[0, 1, 2], [], [0], None], "n": [5, 6, 7, 8]}
    features = {"label": ClassLabel(names=["bad", "good"]), "tags": List(TAGS), "n": Value("int64")}
    made = Dataset.from_dict(columns, features=Features(features))
    if source == "file":
        made.to_parquet(tmp_path / "rows.parquet")
        rows = [row for _, row in read_file(tmp_path / "rows.parquet", "rows.parquet", "parquet")]
    else:
        rows = plain_rows(made.to_iterable_dataset() if source == "streamed" else made)
    assert [row["label"] for row in rows] == ["good", "bad", None, None]
    assert [row["tags"] for row in rows] == [["O", "B-PERSON", "I-PERSON"], [], ["O"], None]
    assert [row["n"] for row in rows] == [5, 6, 7, 8]


def test_a_recording_in_a_file_stays_there_and_a_missing_one_is_none(tmp_path):
    path = str(write_tone(tmp_path / "a.wav"))
    rows = plain_rows(sounds_of([{"bytes": None, "path": path}, None], ["a", "b"]))
    assert [row["audio"] for row in rows] == [path, None]
