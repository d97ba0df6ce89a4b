import csv
import gzip
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.rows import chat, make_recipe, prepare, questions, rows_of, write_jsonl

from llmtune.data.preparation import prepare_rows
from llmtune.data.row_store import iterate_rows, load_rows, read_rows
from llmtune.data.sources import hash_sources
from llmtune.errors import DataError

PAIRS = [{"prompt": f"what is {i}?", "completion": f"it is {i}\nand é"} for i in range(12)]


def write(path: Path, kind: str) -> Path:
    """PAIRS in one of the supported file types."""
    path = path / f"pairs.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()
    if kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "json":
        path.write_text(json.dumps({"license": "none", "rows": PAIRS}, indent=2))
    elif kind in ("csv", "tsv"):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, ["prompt", "completion"], delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(PAIRS)
        path.write_bytes(out.getvalue().encode())
    else:
        pq.write_table(pa.Table.from_pylist(PAIRS), path)
    return path


def fail(*args, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        prepare(*args, **kwargs)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    write(tmp_path, kind)
    assert rows_of(prepare(tmp_path, f"pairs.{kind}", "completion")) == PAIRS


def test_folders_and_globs_are_read_in_name_order_without_readmes(tmp_path):
    for name in ("b/two.jsonl", "a/one.jsonl", "a/deep/three.jsonl"):
        write_jsonl(tmp_path / "data" / name, [chat(name)])
    for name in ("README.md", ".hidden.jsonl", "_temporary/x.jsonl", "picture.png"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("no row")
    folder = prepare(tmp_path, "data")
    assert [row["messages"][0]["content"] for row in rows_of(folder)] == [
        "a/deep/three.jsonl",
        "a/one.jsonl",
        "b/two.jsonl",
    ]
    assert prepare(tmp_path, "data/[ab]/**/*.jsonl").counts["train"] == 3
    assert prepare(tmp_path, "data/*/t*.jsonl").counts["train"] == 1


def test_text_files_of_a_folder_are_a_document_each(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/one.txt").write_text("First.\n\nStill first.\n")
    (tmp_path / "texts/two.txt.gz").write_bytes(gzip.compress(b"Second."))
    assert [row["completion"] for row in rows_of(prepare(tmp_path, "texts", "completion"))] == [
        "First.\n\nStill first.\n",
        "Second.",
    ]


def test_origins_name_file_and_line(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "in" / "a.jsonl", [chat("one"), chat(""), chat("two")])
    write(tmp_path, "parquet")
    monkeypatch.chdir(tmp_path)
    rows = prepare(tmp_path, ["in/a.jsonl", "pairs.parquet"], max_dropped=0.5)
    origins = [origin for origin, _ in iterate_rows(rows, "train")]
    assert origins[:3] == ["in/a.jsonl:1", "in/a.jsonl:3", "pairs.parquet:row 1"]


def test_few_bad_rows_are_left_out_counted_and_shown(tmp_path, console):
    write_jsonl(tmp_path / "a.jsonl", [*(chat(f"q{i}") for i in range(60)), chat(""), chat("x", "")])
    rows = prepare_rows(make_recipe(tmp_path, "a.jsonl"), tmp_path / "out", console)
    assert rows.rows_in == 62
    assert rows.counts["train"] == 60
    assert rows.dropped == {"bad: empty content": 2}
    shown = console.file.getvalue()
    assert "62 rows read; train 60" in shown
    assert "2 left out: bad: empty content" in shown
    assert "a.jsonl:62: empty content: message 2 (assistant) has no content" in shown
    write_jsonl(tmp_path / "a.jsonl", [chat(f"q{i}") for i in range(60)])
    prepare(tmp_path, "a.jsonl")
    assert not (tmp_path / "bad_rows.jsonl").exists()


def test_only_bad_rows_are_an_error_even_if_all_may_be_dropped(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [chat(""), chat("")])
    assert "2 of 2 rows are bad" in fail(tmp_path, "a.jsonl", max_dropped=1.0)


def test_all_unreadable_sources_are_reported_together(tmp_path):
    write_jsonl(tmp_path / "tickets.jsonl", [chat("q")])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(b"x")
    (tmp_path / "strange.xyz").write_text("x")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    write_jsonl(tmp_path / "unknown.jsonl", [{"q": 1, "a": 2}])
    write_jsonl(tmp_path / "mixed/a.jsonl", [chat("q")])
    write_jsonl(tmp_path / "mixed/b.jsonl", [PAIRS[0]])
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "saved")
    names = ["tikets.jsonl", "no/where.jsonl", "*.nothing", "empty.jsonl", "empty", "pictures", "strange.xyz",
             "torn.parquet", "unknown.jsonl", "mixed", "builtin:nosuch", "saved"]  # fmt: skip
    message = fail(tmp_path, names)
    for said in (
        f"data.train[0]: file not found: {tmp_path}/tikets.jsonl",
        "Did you mean 'tickets.jsonl'?",
        f"Looked in {tmp_path}.",
        "no file matches",
        "empty.jsonl: the file is empty: no rows",
        "the folder is empty",
        "the folder contains no data file (1 others)",
        "the ending '.xyz' does not show the file type",
        "not a readable Parquet file",
        "unknown row format: the columns are 'q', 'a'",
        "data.train[9]: mixed formats: ",
        "builtin:nosuch not found",
        "save_to_disk",
    ):
        assert said in message, said


def test_a_truncated_file_is_an_error_together_with_its_bad_rows(tmp_path):
    rows = [chat(""), *(chat(f"q{i} " * 50) for i in range(2000))]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) * 2 // 3])
    message = fail(tmp_path, "a.jsonl.gz")
    assert "a.jsonl.gz: the compressed file is damaged or cut short" in message
    assert "a.jsonl.gz:1: empty content" in message


def test_the_format_can_be_forced_if_columns_are_ambiguous(tmp_path):
    rows = [{**chat("one"), "prompt": "two", "completion": "yes"}]
    write_jsonl(tmp_path / "a.dat", rows)
    assert "does not show the file type" in fail(tmp_path, "a.dat")
    assert "fit messages and prompt-completion" in fail(tmp_path, {"path": "a.dat", "format": "jsonl"})
    shutil.copy(tmp_path / "a.dat", tmp_path / "a.jsonl")
    source = {"path": "a.jsonl", "format": "prompt-completion"}
    assert questions(prepare(tmp_path, source))["train"] == ["two"]


def test_unused_columns_are_named(tmp_path, console):
    write_jsonl(tmp_path / "a.jsonl", [chat(f"q{i}", topic="x", customer=i) for i in range(9)])
    recipe = make_recipe(tmp_path, "a.jsonl", test=0.2, split_by="customer")
    prepare_rows(recipe, tmp_path / "out", console)
    assert "not used: topic\n" in console.file.getvalue()


def test_text_in_brackets_is_shown_unchanged(tmp_path, console):
    write_jsonl(tmp_path / "a.jsonl", [chat("q"), chat("r"), {"messages": [{"role": "[/bold]", "content": "x"}]}])
    prepare_rows(make_recipe(tmp_path, "a.jsonl", max_dropped=0.5), tmp_path / "out", console)
    assert "'[/bold]' is none of" in console.file.getvalue()


def test_a_split_that_lost_all_its_rows_is_an_error_with_the_reason(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [chat("a"), chat("b")])
    write_jsonl(tmp_path / "v.jsonl", [chat("t")])
    write_jsonl(tmp_path / "t.jsonl", [chat("t")])
    message = fail(tmp_path, "a.jsonl", validation="v.jsonl", test="t.jsonl")
    assert "no row is left for validation: 1 equal to a test row" in message


def test_rows_are_loaded_from_a_moved_folder(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [chat(f"q{i}") for i in range(50)])
    rows = prepare(tmp_path, "a.jsonl", test=0.2)
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = load_rows(tmp_path / "moved")
    assert (moved.counts, moved.content_hash, moved.dropped) == (rows.counts, rows.content_hash, rows.dropped)
    assert moved.counts == {"train": len(rows_of(moved)), "validation": 0, "test": len(rows_of(moved, "test"))}
    (tmp_path / "moved/test.rows.arrow").unlink()
    with pytest.raises(DataError, match=r"test\.rows\.arrow is missing"):
        load_rows(tmp_path / "moved")
    with pytest.raises(DataError, match="no prepared rows"):
        load_rows(tmp_path)


def test_single_rows_are_read_by_number_across_batches(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [chat(f"q{i}") for i in range(5000)])
    rows = prepare(tmp_path, "a.jsonl")
    got = read_rows(rows, "train", [4999, 0, 1024, 1023, 0])
    assert [row["messages"][0]["content"] for row in got] == ["q4999", "q0", "q1024", "q1023", "q0"]
    assert read_rows(rows, "test", []) == []
    with pytest.raises(IndexError):
        read_rows(rows, "train", [5000])


KILLED = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from llmtune.data import deduplication, ingest, preparation, row_store
from llmtune.recipe.loader import load_recipe
row_store.SHARD_BATCHES, deduplication.FILE_ROWS = 2, 3000
save, write, left = row_store.Spool._save, deduplication.np.save, int(sys.argv[3])
def count(function, *given):
    global left
    function(*given)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
row_store.Spool._save = lambda *given: count(save, *given)
deduplication.np.save = lambda *given: count(write, *given)
preparation.prepare_rows(load_recipe(sys.argv[1]).recipe, Path(sys.argv[2]), Console(width=200))
"""


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_killed_preparation_resumes_and_ends_with_the_same_bytes(tmp_path):
    rows = [chat("" if i % 97 == 0 else f"question {i} of {i * i} and {i**3 % 1001}") for i in range(7000)]
    write_jsonl(tmp_path / "a.jsonl", rows[:4500])
    write_jsonl(
        tmp_path / "b.jsonl", [*rows[4400:], *(chat(f"question {i} of {i * i} and no more") for i in range(99))]
    )
    sources = [{"path": str(tmp_path / "a.jsonl"), "limit": 4000}, str(tmp_path / "b.jsonl")]
    keys = {"deduplicate": "near", "test": 0.1, "validation": 0.1}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        make_recipe(tmp_path / name, sources, **keys)

    def run(name: str, shards: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, tmp_path / name / "recipe.yaml", tmp_path / name / "out", str(shards)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("whole", -1).returncode == 0
    read = []
    while (done := run("killed", 5)).returncode != 0:  # with one complete shard, and one written but not yet recorded
        assert done.returncode == -signal.SIGKILL, done.stderr
        read.append(done.stdout)
    assert "resuming after 4,096 rows" in read[1]
    assert "resuming after 6,672 rows" in done.stdout
    assert bytes_in(tmp_path / "killed" / "out") == bytes_in(tmp_path / "whole" / "out")
    for name in ("whole", "killed"):
        assert not (tmp_path / name / ".spool").exists()
    lists = [(tmp_path / name / "bad_rows.jsonl").read_text() for name in ("whole", "killed")]
    assert lists[0] == lists[1] != ""


def test_a_preparation_of_other_rows_does_not_resume_a_killed_one(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [chat(f"question {i}") for i in range(5000)])
    recipe = make_recipe(tmp_path, str(tmp_path / "a.jsonl"))
    command = [sys.executable, "-c", KILLED, tmp_path / "recipe.yaml", tmp_path / "out", "1"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert (tmp_path / ".spool").is_dir()
    write_jsonl(tmp_path / "a.jsonl", [chat(f"other question {i}") for i in range(5000)])
    console = Console(file=io.StringIO(), width=200)
    rows = prepare_rows(recipe, tmp_path / "out", console)
    assert "resuming after" not in console.file.getvalue()
    assert rows.counts["train"] == 5000
    assert all(row["messages"][0]["content"].startswith("other") for row in rows_of(rows))


def test_only_the_files_of_the_record_remain(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [chat(f"q{i}") for i in range(50)])
    prepare(tmp_path, "a.jsonl", test=0.2, validation=0.2)
    prepare(tmp_path, "a.jsonl", test=0.2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "rows.json",
        "test.rows.arrow",
        "train.rows.arrow",
    ]


def test_the_hash_of_the_sources_follows_their_bytes_names_and_settings(tmp_path):
    write_jsonl(tmp_path / "d/a.jsonl", [chat("a")])
    write_jsonl(tmp_path / "d/b.jsonl", [chat("b")])

    def digest(train: object = "d") -> str:
        return hash_sources(make_recipe(tmp_path, train).data, "chat")

    first = digest()
    assert digest() == first
    assert digest({"path": "d", "limit": 1}) != first
    (tmp_path / "d/b.jsonl").rename(tmp_path / "d/c.jsonl")
    renamed = digest()
    assert renamed != first
    write_jsonl(tmp_path / "d/c.jsonl", [chat("c")])
    assert digest() not in (first, renamed)
    shutil.copytree(tmp_path / "d", tmp_path / "elsewhere")
    assert digest("elsewhere") == digest()
    with pytest.raises(DataError, match="file not found:"):
        digest("gone.jsonl")


@given(
    st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)] * 2),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_text_is_stored_unchanged(pairs):
    wanted = [chat(question, answer) for question, answer in pairs if question.strip() and answer.strip()]
    if wanted:
        with tempfile.TemporaryDirectory() as folder:
            write_jsonl(Path(folder) / "a.jsonl", [chat(*pair) for pair in pairs])
            rows = prepare(Path(folder), "a.jsonl", deduplicate="none", max_dropped=1.0)
            assert rows_of(rows) == wanted


def test_preparing_rows_imports_neither_torch_nor_transformers_nor_datasets():
    heavy = "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    script = f"import sys, llmtune.data.preparation, llmtune.data.row_store, llmtune.data.sources; {heavy}"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(("options", "said"), [("size=256k", "the disk is full"), ("ro", "cannot be read or written")])
def test_a_full_or_read_only_disk_is_an_environment_problem(tmp_path, options, said):
    write_jsonl(tmp_path / "a.jsonl", [chat(f"question {i} " * 20) for i in range(3000)])
    make_recipe(tmp_path, "a.jsonl")
    (tmp_path / "disk").mkdir()
    script = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from llmtune.data.preparation import prepare_rows; from llmtune.recipe.loader import load_recipe\n"
        "from llmtune.errors import EnvironmentProblem\n"
        "try: prepare_rows(load_recipe(sys.argv[1]).recipe, Path(sys.argv[2]) / 'out', Console(quiet=True))\n"
        "except EnvironmentProblem as error: print(error)"
    )
    mount = f'mount -t tmpfs -o {options} none "$1" || exit 77; exec "$0" -c "$2" "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, sys.executable, tmp_path / "disk", script, tmp_path / "recipe.yaml"]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount here")
    assert said in done.stdout, done.stderr
