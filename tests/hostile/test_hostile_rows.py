"""Hostile rows, archives and folders are read in time with little memory, or refused by name."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.hostile import attempt, prepare
from support.runs import write_recipe

from llmtune.recipe import user_files

QUESTION = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
PAIR = '{"prompt": "q", "completion": "a"}\n'


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/random", "/proc/kmsg", "fifo"])
@pytest.mark.parametrize("is_link", [False, True])
def test_rows_are_not_read_from_a_pipe_or_a_device(here: Path, name: str, is_link: bool) -> None:
    os.mkfifo("fifo")
    (here / "link").symlink_to(name)
    said = prepare("link" if is_link else name, format="jsonl", code=3)
    assert ("no rows" if name == "/proc/kmsg" else "not a regular file") in said


def test_walking_through_folders_terminates(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_files, "MAX_FOLDERS", 50)
    for number in range(60):
        (here / "deep" / str(number)).mkdir(parents=True)
    for source in ("deep", "deep/**/*.jsonl"):
        assert "more than 50 folders" in prepare(source, code=3)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["~", ".", "**/*.jsonl", "/**/*.jsonl"])
def test_walking_through_an_entire_disk_ends_soon(here: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv("HOME", str(here))
    for number in range(user_files.MAX_FOLDERS + 1 if source != "/**/*.jsonl" else 0):
        (here / str(number)).mkdir()
    assert "it contains more than" in prepare(source, code=3)


def test_walking_skips_link_cycles_and_hidden_folders(here: Path, chat_rows: Path) -> None:
    (here / "data" / ".hidden").mkdir(parents=True)
    (here / "data" / "circle").symlink_to(here / "data")
    (here / "data" / ".hidden" / "bad.jsonl").write_text("no JSON")
    chat_rows.rename(here / "data" / "rows.jsonl")
    for source in ("data", "data/**/*.jsonl", "data/**", "d*/*.jsonl"):
        assert "40 rows read" in prepare(source, code=0)


def test_patterns_match_what_the_shell_matches(here: Path) -> None:
    for name in ("a.x", "one/b.x", "one/two/c.x", "one/.two/d.x", ".e.x", "one/two/f.y"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).touch()
    for pattern in ("*.x", "**/*.x", "**", "one/**/*.x", "**/two/*", "*/*.x", "one/**/two/?.[xy]", "**/.*/*.x", ".*"):
        found = [str(path) for path in user_files.match_files(pattern)]
        assert found == sorted({name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)}), pattern


def test_a_file_name_that_is_not_utf8_is_refused(here: Path) -> None:
    Path(os.fsdecode(b"\xff.jsonl")).write_text(PAIR)
    assert "not UTF-8" in prepare("*.jsonl", code=3)


@pytest.mark.parametrize("name", ["../../etc", "a/b/c", "\t", "x" * 200])
def test_an_invalid_hub_name_is_refused(here: Path, name: str) -> None:
    assert "hub:" in prepare(f"hub:{name}", code=(2, 3))


def packed(kind: str) -> bytes:
    rows, out = PAIR.encode() * 40, io.BytesIO()
    if kind.startswith("tar"):
        with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w") as archive:
            member = tarfile.TarInfo("rows.jsonl")
            member.size = len(rows)
            archive.addfile(member, io.BytesIO(rows))
    else:
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("rows.jsonl", rows)
    return gzip.compress(out.getvalue()) if kind == "zip.gz" else out.getvalue()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip", "zip.gz"])
def test_an_archive_is_not_read_as_rows(here: Path, kind: str) -> None:
    (here / "rows.jsonl").write_bytes(packed(kind))
    assert f"{kind.split('.')[0]} archive" in prepare("rows.jsonl", code=3)


def test_unbounded_rows_are_skipped_with_the_reason(here: Path, chat_rows: Path) -> None:
    deep = '{"a":' * 900 + "1" + "}" * 900
    turns = [QUESTION, ANSWER]
    bad = [
        json.dumps({"messages": turns * 5000}),
        json.dumps({"messages": turns, "tools": [{"name": "x", "parameters": 0}]}).replace(" 0", deep),
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
        "[" * 100_000,
        "\0" * 1000,
    ]
    Path("rows.jsonl").write_text("\n".join([*bad, chat_rows.read_text()]))
    said = prepare("rows.jsonl", code=3)
    for reason in ("too many messages", "nested too deeply", "not a character", "not valid JSON"):
        assert reason in said
    assert "5 of 45 rows are bad" in said


def test_a_line_or_cell_that_is_not_a_row_is_refused(here: Path) -> None:
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a b c " * 2_000_000, "completion": "b"}))
    Path("rows.csv").write_text(f'prompt,completion\n"{"word " * 2_000_000}",b\n')
    Path("wide.csv").write_text("\n".join([",".join(f"c{n}" for n in range(100_000)), "x," * 99_999 + "x"]))
    assert "more than 8 MiB" in prepare("rows.jsonl", code=3)
    assert "more than 8 MiB" in prepare("rows.csv", code=3)
    assert "100,000 columns" in prepare("wide.csv", code=3)


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [31, 50])
@pytest.mark.parametrize("form", ["one text", "one message", "many messages", "deep"])
def test_a_row_of_many_megabytes_is_refused(here: Path, megabytes: int, form: str) -> None:
    count = megabytes * 10**6
    turns = [QUESTION, {**ANSWER, "content": "b " * (count // 2)}]
    row = {
        "one text": lambda: json.dumps({"prompt": "a b " * (count // 4), "completion": "b"}),
        "one message": lambda: json.dumps({"messages": turns}),
        "many messages": lambda: json.dumps({"messages": [QUESTION, ANSWER] * (count // 70)}),
        "deep": lambda: '{"a":' * (count // 6) + "1" + "}" * (count // 6),
    }[form]()
    Path("rows.jsonl").write_text(f"{row}\n{PAIR * 40}")
    assert "more than 8 MiB" in prepare("rows.jsonl", code=3)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [200, 10_000])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_nested_ten_thousand_deep_are_bad_rows(here: Path, depth: int, name: str) -> None:
    row = '{"prompt": ' + "[" * depth + "]" * depth + ', "completion": "b"}'
    Path(name).write_text(row if name == "rows.jsonl" else f"[{row}]")
    prepare(name, code=3)


@pytest.mark.slow
def test_near_duplicates_of_five_megabytes_are_compared_in_little_memory(here: Path) -> None:
    text = " ".join(f"word{number * 7919 % 65537}" for number in range(500_000))
    rows = [{"prompt": f"{number} {text}", "completion": "b"} for number in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + PAIR)
    prepare("rows.jsonl", code=(0, 3))


@pytest.mark.slow
@pytest.mark.parametrize("key", ["path", "lock", "template", "start_from", "extends"])
@pytest.mark.parametrize("target", ["/proc/self/environ", "../../../../../../../../../etc/shadow", "../secret"])
def test_a_path_to_secrets_does_not_reveal_them(
    here: Path, chat_rows: Path, tiny_llama: Path, key: str, target: str
) -> None:
    (here.parent / "secret").write_text("hf_token-s3cret-0123456789abcdef: [")
    sections = {
        "path": {"data": {"train": {"path": target, "format": "jsonl"}}},
        "template": {"model": {"chat_template": target}},
        "start_from": {"adapter": {"start_from": target, "r": None, "lora_alpha": None}},
    }
    write_recipe(here / "recipe.yaml", tiny_llama, chat_rows, **sections.get(key, {}))
    if key == "extends":
        (here / "recipe.yaml").write_text(f"{(here / 'recipe.yaml').read_text()}extends: {target}\n")
    lock = ["--lock", target] if key == "lock" else []
    said = attempt("prepare", "recipe.yaml", "--out", "run", *lock, code=(2, 3, 4))
    assert "s3cret" not in said
    assert "root:" not in said


BOMBS = {
    "empty.jsonl.gz": lambda: gzip.compress(b"\n" * 100_000_000),
    "empty.jsonl.zst": lambda: zstandard.ZstdCompressor().compress(b"\n" * 100_000_000),
    "rows.csv.gz": lambda: gzip.compress(b"prompt,completion\n" + b"a,b\n" * 30_000_000),
    "rows.json.gz": lambda: gzip.compress(b"[" + b'{"prompt":"q","completion":"a"},' * 3_000_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_of_rows_is_refused(here: Path, name: str) -> None:
    Path(name).write_bytes(BOMBS[name]())
    assert "unpacks to more than" in prepare(name, code=3)


def test_a_parquet_text_stored_once_but_repeated_in_all_rows_is_refused(here: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 512), pa.array(["x y z " * 700_000]))
    table = pa.table({"prompt": text, "completion": ["a"] * 512})
    pq.write_table(table, "rows.parquet", dictionary_pagesize_limit=2**30, compression="zstd", store_schema=False)
    script = (
        "import re; from pathlib import Path; from llmtune.data.file_readers import read_lazily\n"
        "from llmtune.errors import DataError\n"
        "try: list(read_lazily(Path('rows.parquet'), 'rows', 'parquet'))\n"
        "except DataError as error: print(error)\n"
        "print(re.search('VmHWM:(.*) kB', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "unpacks to more than" in done.stdout
    assert int(done.stdout.split()[-1]) < 1_000_000


@pytest.mark.parametrize(
    "kind", [pa.timestamp("us"), pa.timestamp("us", "Mars/Olympus"), pa.date32(), pa.duration("s")]
)
def test_a_parquet_value_that_python_cannot_hold_is_a_bad_row_that_names_the_column(
    here: Path, kind: pa.DataType
) -> None:
    when = pa.array([2**30 if kind == pa.date32() else 2**61] * 3, kind)
    pq.write_table(pa.table({"prompt": ["q"] * 3, "completion": ["a"] * 3, "when": when}), "rows.parquet")
    assert "a value that cannot be read (column 'when'" in prepare("rows.parquet", code=3)


def test_a_parquet_text_that_is_not_utf8_is_a_bad_row(here: Path) -> None:
    starts = b"".join((2 * number).to_bytes(4, "little") for number in range(4))
    broken = pa.StringArray.from_buffers(3, pa.py_buffer(starts), pa.py_buffer(b"\xff\xfe" * 3))
    pq.write_table(pa.table({"prompt": broken, "completion": ["a"] * 3}), "rows.parquet")
    assert "not UTF-8 (column 'prompt'" in prepare("rows.parquet", code=3)


def test_escape_codes_in_rows_do_not_reach_the_terminal(here: Path, chat_rows: Path) -> None:
    codes = "\\u001b[31m\\u009b31m\\u202e\\u0007"
    turns = f'[{{"role": "us{codes}er", "content": "{codes}"}}, {{"role": "assistant", "content": "b"}}]'
    Path("rows.jsonl").write_text(f'{{"messages": {turns}, "{codes}": 1}}\n{chat_rows.read_text()}')
    assert "\\x1b" in prepare("rows.jsonl", code=0)
    Path("rows.jsonl").write_text(f'{{"{codes}": 1}}\n')
    prepare("rows.jsonl", code=3)
    Path("\x1b[31m.jsonl").write_text(PAIR)
    assert "control characters" in prepare("*31m.jsonl", code=3)


def test_a_row_file_may_be_a_link(here: Path, chat_rows: Path) -> None:
    (here / "link.jsonl").symlink_to(chat_rows)
    assert "40 rows read" in prepare("link.jsonl", code=0)
    attempt("recipes", "check", "hostile.yaml", code=0)
