import csv
import gzip
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import read_file

from llmtune.data import file_readers as read
from llmtune.data.rejected_rows import RowError
from llmtune.errors import DataError, read_origin, write_origin

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PACKERS = [gzip.compress, zstandard.ZstdCompressor().compress]


def read_bytes(folder: Path, data: bytes, container: str):
    path = folder / "file"
    path.write_bytes(data)
    return read_file(path, "file", container)


def test_a_json_line_carries_its_line_number_and_blank_lines_count(tmp_path):
    found = read_bytes(tmp_path, b'{"a": 1}\n\n  \r\n{"a": 2}', "jsonl")
    assert found == [("file:1", {"a": 1}), ("file:4", {"a": 2})]


def test_a_broken_line_in_the_middle_loses_only_that_line(tmp_path):
    found = read_bytes(tmp_path, b'{"a": 1}\n{"a": "cut\n{"a": 3}\n', "jsonl")
    assert [origin for origin, _ in found] == ["file:1", "file:2", "file:3"]
    assert str(found[1][1]) == "not valid JSON: Invalid control character at at column 11"
    assert found[2][1] == {"a": 3}


def test_invalid_utf8_bytes_are_reported_with_their_offset(tmp_path):
    found = read_bytes(tmp_path, b'{"a": 1}\n{"a": "\xff"}\n', "jsonl")
    assert (found[1][0], str(found[1][1])) == ("file:2", "not UTF-8: byte 0xff at offset 16")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1, 2]", "not a JSON object"),
        (b"3", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"hello", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_line_without_an_object_is_unreadable(tmp_path, line, reason):
    [(_, value)] = read_bytes(tmp_path, line, "jsonl")
    assert isinstance(value, RowError)
    assert value.reason == reason


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    assert read_bytes(tmp_path, b'\xef\xbb\xbf{"a": 1}\n', "jsonl") == [("file:1", {"a": 1})]
    assert read_bytes(tmp_path, b"\xef\xbb\xbfa,b\n1,2\n", "csv") == [("file:2", {"a": "1", "b": "2"})]
    assert read_bytes(tmp_path, b'\xef\xbb\xbf[{"a": 1}]', "json") == [("file:row 1", {"a": 1})]
    first, (_, bad) = read_bytes(tmp_path, b'\xef\xbb\xbf{"a": 1}\n{"a":', "json")
    assert (first, bad.reason) == (("file:1", {"a": 1}), "not valid JSON")
    assert read_bytes(tmp_path, b"\xef\xbb\xbf", "jsonl") == []
    assert read_bytes(tmp_path, b"\xef\xbb\xbfhello", "text") == [("file:1", {"text": "hello"})]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_mark_of_utf16_or_utf32_states_the_encoding(tmp_path, encoding):
    assert read_bytes(tmp_path, '{"a": "é"}\n'.encode(encoding), "jsonl") == [("file:1", {"a": "é"})]
    assert read_bytes(tmp_path, "a;b\né;2\n".encode(encoding), "csv") == [("file:2", {"a": "é", "b": "2"})]
    assert read_bytes(tmp_path, '[{"a": "é"}]'.encode(encoding), "json") == [("file:row 1", {"a": "é"})]
    assert read_bytes(tmp_path, "é".encode(encoding), "text") == [("file:1", {"text": "é"})]


@pytest.mark.parametrize(
    ("data", "container", "message"),
    [
        ('{"a": "some text"}'.encode("utf-16-le"), "jsonl", "UTF-16"),
        (b"PAR1....", "jsonl", "Parquet"),
        (b'a,b\n1,"open\n3,4\n', "csv", "not valid CSV"),
        (b"a,a\n1,2\n", "csv", "two columns with the name 'a'"),
        ("é line\nx".encode() + b"\xe9 y", "text", r"file:2: not UTF-8: byte 0xe9 at offset 9"),
    ],
)
def test_a_partly_readable_file_is_refused_with_the_reason(tmp_path, data, container, message):
    with pytest.raises(DataError, match=message):
        read_bytes(tmp_path, data, container)


def test_an_endless_line_is_refused_without_buffering_it(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_ROW_BYTES", 1000)
    with pytest.raises(DataError, match="a line of more than"):
        read_bytes(tmp_path, b"[" + b"1," * 1000, "jsonl")


@pytest.mark.parametrize("pack", PACKERS)
def test_compressed_files_are_detected_by_their_first_bytes(tmp_path, pack):
    plain = b'{"a": 1}\n' * 3
    found = read_bytes(tmp_path, pack(plain) + pack(plain), "jsonl")  # two members, as `cat a.gz b.gz` makes
    assert [value for _, value in found] == [{"a": 1}] * 6


@pytest.mark.parametrize("pack", PACKERS)
def test_a_truncated_compressed_file_is_refused(tmp_path, pack):
    plain = "".join(json.dumps({"a": os.urandom(20).hex()}) + "\n" for _ in range(10_000)).encode()
    data = pack(plain)
    with pytest.raises(DataError, match=r"damaged or cut short"):
        read_bytes(tmp_path, data[: len(data) // 2], "jsonl")


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}, {"a": 2}]',
        '{"version": 3, "data": [{"a": 1}, {"a": 2}], "names": ["x"], "none": []}',
        '{"a": 1}\n{"a": 2}\n',
        '{\n  "a": 1\n}\n{\n  "a": 2\n}',
    ],
)
def test_json_is_a_list_an_object_with_a_list_or_consecutive_objects(tmp_path, text):
    assert [value for _, value in read_bytes(tmp_path, text.encode(), "json")] == [{"a": 1}, {"a": 2}]


def test_a_single_object_with_messages_is_a_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "x"}]}
    assert [v for _, v in read_bytes(tmp_path, json.dumps(row, indent=1).encode(), "json")] == [row]


def test_json_lines_in_a_json_file_lose_only_the_bad_line(tmp_path):
    found = read_bytes(tmp_path, b'{"a": 1}\n{"a": \n{"a": 3}\n', "json")
    assert [type(value) for _, value in found] == [dict, RowError, dict]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'[{"a": "\xff"}]', r"byte 0xff at offset 8"),
        ('[{"a": 1}, {"a": ', r"file:1: not valid JSON"),
        ('[{"a": 1},\n {"a" 2}]', r"file:2: not valid JSON: Expecting ':'"),
        ('[{"a": 1}] x', r"text after the end"),
        ('{"a": [{"x": 1}], "b": [{"x": 1}]}', r"two lists of rows, 'a' and 'b'"),
        ('[{"a": 1} {"a": 2}]', r"Expecting ',' delimiter"),
        ("[1, 2", r"Expecting ',' delimiter"),
        ("{1: 2}", r"Expecting property name"),
    ],
)
def test_a_json_mistake_is_reported_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_bytes(tmp_path, text if isinstance(text, bytes) else text.encode(), "json")


@given(st.lists(st.dictionaries(TEXT, TEXT | st.floats(allow_nan=False) | st.booleans()), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_json_rows_survive_any_formatting(rows):
    with tempfile.TemporaryDirectory() as folder:
        for text in (json.dumps(rows), json.dumps({"rows": rows}, indent=2, ensure_ascii=False)):
            assert [value for _, value in read_bytes(Path(folder), text.encode(), "json")] == rows


@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:1a\\ \n', max_size=30).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_the_json_modules_rows_or_an_error(data):
    try:
        wanted = json.loads(data.decode("utf-8-sig"))
    except ValueError:
        wanted = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = [value for _, value in read_bytes(Path(folder), data, "json")]
    except DataError:
        assert not isinstance(wanted, list | dict)
    else:
        rows = [item for item in wanted if isinstance(item, dict)] if isinstance(wanted, list) else None
        assert rows is None or [value for value in found if isinstance(value, dict)] == rows


def test_a_json_document_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_JSON_BYTES", 1000)
    with pytest.raises(DataError, match="Write it as JSON Lines"):
        read_bytes(tmp_path, b"[" + b'{"a": 1},' * 200, "json")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_cells_may_contain_line_ends_and_origins_give_the_first_line(tmp_path, delimiter):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["prompt", "completion"], ["one\ntwo", 'say "hi"'], ["a,b;c\td", "é"]])
    found = read_bytes(tmp_path, out.getvalue().encode(), "csv")
    assert found == [
        ("file:2", {"prompt": "one\ntwo", "completion": 'say "hi"'}),
        ("file:row 3 (line 4)", {"prompt": "a,b;c\td", "completion": "é"}),
    ]


def test_csv_rows_that_do_not_fit_the_header_are_bad(tmp_path):
    found = read_bytes(tmp_path, b"a,b\n1\n1,2\n1,2,3\n\xff,2\n", "csv")
    assert [v.reason if isinstance(v, RowError) else v for _, v in found] == [
        "wrong number of columns",
        {"a": "1", "b": "2"},
        "wrong number of columns",
        "not UTF-8",
    ]
    assert found[0][1].detail == "1 cells, the header has 2"


@pytest.mark.parametrize("first", [b"sep=;\r\n", b'\xef\xbb\xbf"sep=;"\n', b"SEP=;\n"])
def test_the_separator_that_excel_is_told_is_no_header(tmp_path, first):
    found = read_bytes(tmp_path, first + b"a,b;c\n1;2\n", "csv")
    assert found == [("file:row 2 (line 3)", {"a,b": "1", "c": "2"})]


def test_delimiters_in_quoted_names_do_not_count(tmp_path):
    found = read_bytes(tmp_path, b'"a, b, c";"d"\n1;2\n', "csv")
    assert found == [("file:2", {"a, b, c": "1", "d": "2"})]


def test_a_row_that_repeats_the_header_is_bad(tmp_path):
    found = read_bytes(tmp_path, b"text,label\na,b\n\xef\xbb\xbftext,label\nlabel,label\n", "csv")
    assert [v.reason if isinstance(v, RowError) else v for _, v in found] == [
        {"text": "a", "label": "b"},
        "repeats the header",
        {"text": "label", "label": "label"},
    ]


def test_a_header_that_is_not_utf8_ends_the_file(tmp_path):
    with pytest.raises(DataError, match="the header is not UTF-8"):
        read_bytes(tmp_path, b"pr\xffmpt,b\n1,2\n", "csv")


def test_parquet_rows_are_numbered_across_batches(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(1500)]}), path, row_group_size=400)
    found = list(read_file(path, "p", "parquet"))
    assert found[0] == ("p:row 1", {"text": "row 0"})
    assert found[-1] == ("p:row 1500", {"text": "row 1499"})
    assert len(found) == 1500


@pytest.mark.parametrize("noted", ["[", "[1]", '{"info": 3}', '{"info": {"features": {"n": {"_type": "ClassLabel"}}}}'])
def test_other_programs_metadata_in_a_parquet_file_is_ignored(noted, tmp_path):
    table = pa.table({"n": [1]}).replace_schema_metadata({"huggingface": noted})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert list(read_file(tmp_path / "rows.parquet", "p", "parquet")) == [("p:row 1", {"n": 1})]


def test_class_names_are_read_next_to_features_of_another_form(tmp_path):
    features = {
        "n": {"_type": "ClassLabel", "names": ["no", "yes"]},
        "turns": [{"role": {"_type": "Value"}}],
        "x": None,
    }
    noted = json.dumps({"info": {"features": features}})
    pq.write_table(pa.table({"n": [1, -1]}).replace_schema_metadata({"huggingface": noted}), tmp_path / "rows.parquet")
    assert [row for _, row in read_file(tmp_path / "rows.parquet", "p", "parquet")] == [{"n": "yes"}, {"n": None}]


def test_duplicate_column_names_in_parquet_are_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="two columns with the name 'a'"):
        list(read_file(tmp_path / "rows.parquet", "p", "parquet"))


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["x"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_file(path, "p", "parquet"))


def test_a_text_file_is_one_document_and_a_long_one_is_cut_at_blank_lines(tmp_path, monkeypatch):
    assert read_bytes(tmp_path, b"one\n\ntwo\r\n", "text") == [("file:1", {"text": "one\n\ntwo\r\n"})]
    monkeypatch.setattr(read, "TEXT_PIECE", 10)
    text = "aaaa bbbb cccc\ndddd\n\neeee\n\nffff gggg hhhh\n\niiii"
    found = read_bytes(tmp_path, text.encode(), "text")
    assert "".join(row["text"] for _, row in found) == text
    assert len(found) > 2
    grown = read_bytes(tmp_path, (text + "\njjjj\n\nkkkk").encode(), "text")
    assert grown[: len(found) - 1] == found[:-1]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text[0] != "\ufeff"))
@settings(deadline=None)
def test_text_survives_unchanged(text):
    with tempfile.TemporaryDirectory() as folder:
        found = read_bytes(Path(folder), text.encode(), "text")
    assert "".join(row["text"] for _, row in found) == text


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give up root's right to read everything")
def test_a_file_without_read_permission_is_an_error_without_a_traceback():
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "secret.jsonl"
        path.write_text("{}\n")
        path.chmod(0)
        folder.chmod(0o755)
        script = (
            "import os, sys; from pathlib import Path\n"
            "from llmtune.data.file_readers import read_lazily; os.setuid(65534)\n"
            "from llmtune.errors import DataError\n"
            "try: list(read_lazily(Path(sys.argv[1]), 'secret.jsonl', 'jsonl'))\n"
            "except DataError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
        assert "permission denied" in done.stdout
    finally:
        (folder / "secret.jsonl").chmod(stat.S_IRUSR)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("data", "container", "places"),
    [
        (b'a,b\n1,"x\ny"\n3,4\n', "csv", [("file", 2, None), ("file", 4, 3)]),
        (b'{"a": 1}\n\n{"a": 2}\n', "jsonl", [("file", 1, None), ("file", 3, None)]),
        (b'[{"a": 1}, {"a": 2}]', "json", [("file", None, 1), ("file", None, 2)]),
        (b"one", "text", [("file", 1, None)]),
    ],
)
def test_origins_of_all_containers_are_read_back(tmp_path, data, container, places):
    origins = [origin for origin, _ in read_bytes(tmp_path, data, container)]
    assert [read_origin(origin) for origin in origins] == places


@given(st.text(), st.integers(0, 99) | st.none(), st.integers(0, 99) | st.none())
def test_any_written_origin_is_read_back(file, line, row):
    if line is not None or row is not None:
        assert read_origin(write_origin(file, line=line, row=row)) == (file, line, None if row == line else row)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_an_unclosed_object_is_reported_at_its_end(end: bytes):
    error = read.JsonLine(b'{"text": "x"' + end, 0).parse()
    assert str(error) == f"not valid JSON: Expecting ',' delimiter at column {13 + len(end)}"
