"""Rows of object stores and web servers: a real S3 server (moto's) and a real web server, on loopback."""

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.http_server import answering
from support.rows import chat, make_recipe, prepare, rows_of, write_jsonl

from llmtune.data.preparation import rows_inputs
from llmtune.data.sources import list_sources
from llmtune.errors import DataError, EnvironmentProblem
from llmtune.launch.python_api import names_remote
from llmtune.store.process_environment import refuse_network

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(1500)]
SECRET = "a-secret-of-the-store"
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("moto", reason="the S3 server is not installed")
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


@pytest.fixture
def s3(server, monkeypatch):
    """The store, with its address and keys in the environment as a user has them."""
    import s3fs

    keys = {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": SECRET, "DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem(use_listings_cache=False)
    if not store.exists("bucket"):
        store.mkdir("bucket")
    yield store
    s3fs.S3FileSystem.clear_instance_cache()


def test_rows_of_a_bucket_are_those_of_the_same_files_on_disk(s3, tmp_path):
    write_jsonl(tmp_path / "rows/a.jsonl", ROWS[:800])
    (tmp_path / "rows/b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows/a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(ROWS[1000:]), tmp_path / "rows/c.parquet")
    (tmp_path / "rows/README.md").write_text("no row")
    s3.put(str(tmp_path / "rows"), "bucket/same", recursive=True)
    local = prepare(tmp_path, str(tmp_path / "rows"), test=0.1)
    for address in ("s3://bucket/same", "s3://bucket/sam?/**"):
        rows = prepare(tmp_path, address, out="far", test=0.1)
        assert (rows.content_hash, rows.counts, rows.dropped) == (local.content_hash, local.counts, local.dropped)
    assert prepare(tmp_path, "s3://bucket/same/*.parquet", out="far").counts["train"] == 500


def test_the_tag_of_an_object_decides_whether_rows_are_prepared_again(s3, tmp_path):
    s3.pipe("bucket/tag/a.jsonl", json.dumps(ROWS[0]).encode())
    recipe = make_recipe(tmp_path, "s3://bucket/tag/a.jsonl")
    first = rows_inputs(recipe)
    assert rows_inputs(recipe) == first
    (file,) = list_sources(recipe.data, "chat")[1]
    assert (file.kind, file.path, file.name) == ("etag", None, "s3://bucket/tag/a.jsonl")
    s3.pipe("bucket/tag/a.jsonl", json.dumps(ROWS[1]).encode())
    assert rows_inputs(recipe) != first


def test_what_is_not_in_a_bucket_and_a_store_that_does_not_answer_are_told_without_secrets(s3, tmp_path, monkeypatch):
    for address in ("s3://bucket/none.jsonl", "s3://nobucket/a.jsonl", "s3://bucket/none-*.jsonl"):
        with pytest.raises(DataError, match="there is no such file"):
            prepare(tmp_path, address)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3.clear_instance_cache()
    with pytest.raises(EnvironmentProblem, match="the store cannot be read") as caught:
        prepare(tmp_path, "s3://bucket/a.jsonl")
    assert SECRET not in str(caught.value)


def test_rows_of_a_web_server_are_read_and_hashed_by_their_content_where_there_is_no_tag(tmp_path):
    body = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS[:100]).encode())
    files = {"/rows.jsonl.gz": (200, body), "/private.jsonl": (403, b"")}

    def answer(verb, path, headers, _):
        status, content = files.get(path, (404, b""))
        return status, content, {}

    with answering(answer) as address:
        recipe = make_recipe(tmp_path, f"{address}/rows.jsonl.gz")
        assert [file.kind for file in list_sources(recipe.data, "chat")[1]] == ["sha256"]
        first = rows_inputs(recipe)
        assert rows_of(prepare(tmp_path, f"{address}/rows.jsonl.gz")) == ROWS[:100]
        files["/rows.jsonl.gz"] = (200, gzip.compress(json.dumps(ROWS[0]).encode()))
        assert rows_inputs(recipe) != first
        with pytest.raises(DataError, match="there is no such file"):
            prepare(tmp_path, f"{address}/none.jsonl")
        with pytest.raises(DataError, match="permission denied"):
            prepare(tmp_path, f"{address}/private.jsonl")
    with pytest.raises(EnvironmentProblem, match="the store cannot be read"):
        prepare(tmp_path, "http://127.0.0.1:9/rows.jsonl.gz")


@pytest.mark.parametrize("address", ["s3://bucket/a.jsonl", "gs://bucket/a.jsonl", "https://host.invalid/a.jsonl"])
def test_an_address_is_the_network_and_refused_offline(tmp_path, address):
    recipe = make_recipe(tmp_path, address)
    assert recipe.data.train[0].path == address
    assert names_remote(recipe)
    refuse_network(make_recipe(tmp_path, str(write_jsonl(tmp_path / "a.jsonl", ROWS[:9]))), offline=True)
    with pytest.raises(EnvironmentProblem, match="--offline forbids"):
        refuse_network(recipe, offline=True)


def test_a_package_that_is_missing_is_named(tmp_path):
    with pytest.raises(EnvironmentProblem, match="pip install gcsfs"):
        prepare(tmp_path, "gs://bucket/a.jsonl")
