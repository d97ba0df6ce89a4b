"""Rows of object stores and web servers: local servers that speak S3, Google's protocol and HTTP."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import certifi
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import _registry
from support.http_server import answering
from support.rows import chat, make_recipe, prepare, rows_of, write_jsonl

from llmtune.data.preparation import rows_inputs
from llmtune.data.sources import list_sources
from llmtune.errors import DataError, EnvironmentProblem
from llmtune.launch.python_api import names_remote
from llmtune.store.process_environment import refuse_network

pytestmark = pytest.mark.needs("aiohttp", "gcp_storage_emulator", "gcsfs", "moto", "s3fs")

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(1500)]
SECRET = "a-secret-of-the-store"
S3_SERVER = """
import sys, threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
application = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, application, threaded=True, ssl_context=tuple(sys.argv[1:]) or None)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port, flush=True)
sys.stdin.read()
"""
GS_SERVER = """
import sys
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
server.start()
print(server._api._httpd.server_port, flush=True)
sys.stdin.read()
server.stop()
"""


@contextmanager
def serving(script: str, *arguments: object) -> Iterator[int]:
    """A server in a separate process; yields its port."""
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        yield int(process.stdout.readline())
        process.stdin.close()


@pytest.fixture(scope="module")
def server():
    with serving(S3_SERVER) as port:
        yield f"http://127.0.0.1:{port}"


def open_s3(endpoint: str, monkeypatch):
    """The store, with its address and keys in the environment as a user sets them."""
    import s3fs

    keys = {
        "ENDPOINT_URL": endpoint,
        "ACCESS_KEY_ID": "key",
        "SECRET_ACCESS_KEY": SECRET,
        "DEFAULT_REGION": "us-east-1",
    }
    for name, value in {**keys, "MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    return s3fs.S3FileSystem(use_listings_cache=False)


@pytest.fixture
def s3(server, monkeypatch):
    store = open_s3(server, monkeypatch)
    if not store.exists("bucket"):
        store.mkdir("bucket")
    yield store
    store.clear_instance_cache()


@pytest.fixture
def gs(monkeypatch):
    import gcsfs

    with serving(GS_SERVER) as port:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield gcsfs.GCSFileSystem(use_listings_cache=False)
        gcsfs.GCSFileSystem.clear_instance_cache()


def test_rows_of_a_bucket_equal_those_of_the_same_files_on_disk(s3, tmp_path):
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


@pytest.mark.slow
def test_rows_of_googles_store_equal_those_on_disk_and_their_etag_identifies_versions(gs, tmp_path):
    write_jsonl(tmp_path / "rows/a.jsonl", ROWS[:800])
    (tmp_path / "rows/b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows/a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(ROWS[1000:]), tmp_path / "rows/c.parquet")
    gs.put(str(tmp_path / "rows"), "bucket/same", recursive=True)
    local = prepare(tmp_path, str(tmp_path / "rows"), test=0.1)
    for address in ("gs://bucket/same", "gs://bucket/sam?/**"):
        rows = prepare(tmp_path, address, out="far", test=0.1)
        assert (rows.content_hash, rows.counts, rows.dropped) == (local.content_hash, local.counts, local.dropped)
    recipe = make_recipe(tmp_path, "gs://bucket/same/a.jsonl")
    first = rows_inputs(recipe)
    assert [file.kind for file in list_sources(recipe.data, "chat")[1]] == ["etag"]
    gs.pipe("bucket/same/a.jsonl", json.dumps(ROWS[1]).encode())
    assert rows_inputs(recipe) != first
    for address in ("gs://bucket/none.jsonl", "gs://nobucket/none.jsonl", "gs://bucket/none-*.jsonl"):
        with pytest.raises(DataError, match="not found"):
            prepare(tmp_path, address)


@pytest.mark.parametrize("status", [401, 403])
def test_access_denied_by_googles_store_differs_from_a_missing_file(tmp_path, monkeypatch, capfd, status):
    import gcsfs

    denial = {"error": {"code": status, "message": "Anonymous caller does not have storage.objects.list access"}}
    gcsfs.GCSFileSystem.clear_instance_cache()
    with answering(lambda *request: (status, denial, {})) as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        with pytest.raises(DataError, match=r"permission denied\)\n.*gcloud auth"):
            prepare(tmp_path, "gs://bucket/a.jsonl")
    gcsfs.GCSFileSystem.clear_instance_cache()
    assert "Traceback" not in capfd.readouterr().err


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    files = folder / "certificate.pem", folder / "key.pem"
    names = ("-subj", "/CN=store", "-addext", "subjectAltName=IP:127.0.0.1")
    command = (
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-out",
        files[0],
        "-keyout",
        files[1],
        *names,
    )
    subprocess.run(command, check=True, capture_output=True)
    return files


@pytest.mark.slow
def test_a_self_signed_store_is_read_if_trusted_and_refused_otherwise(tmp_path, monkeypatch):
    certificate, key = make_certificate(tmp_path)
    with serving(S3_SERVER, certificate, key) as port:
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        store = open_s3(f"https://127.0.0.1:{port}", monkeypatch)
        store.mkdir("bucket")
        store.pipe("bucket/a.jsonl", json.dumps(ROWS[0]).encode())
        assert rows_of(prepare(tmp_path, "s3://bucket/a.jsonl")) == ROWS[:1]
        for variable, value, reason in (
            ("CA_BUNDLE", certifi.where(), r"no secure connection .*self-signed certificate"),
            (
                "CA_BUNDLE",
                str(key),
                r"NO CERTIFICATE OR CRL FOUND.*\n.*AWS_CA_BUNDLE \(now '.*key.pem'\) names the PEM file",
            ),
            ("CA_BUNDLE", "/none.pem", "AWS_CA_BUNDLE is '/none.pem', which does not exist"),
            ("ENDPOINT_URL", f"https://localhost:{port}", "certificate is not valid for 'localhost'"),
            ("ENDPOINT_URL", f"127.0.0.1:{port}", r"Invalid endpoint.*\n.*AWS_ENDPOINT_URL \(https://HOST:PORT\)"),
        ):
            with monkeypatch.context() as patch:
                patch.setenv(f"AWS_{variable}", value)
                store.clear_instance_cache()
                with pytest.raises(EnvironmentProblem, match=reason):
                    prepare(tmp_path, "s3://bucket/a.jsonl")
        store.clear_instance_cache()
        with pytest.raises(EnvironmentProblem, match=r"no secure connection .*self-signed"):
            prepare(tmp_path, f"https://127.0.0.1:{port}/bucket/a.jsonl")


def test_the_etag_of_an_object_decides_whether_rows_are_prepared_again(s3, tmp_path):
    s3.pipe("bucket/tag/a.jsonl", json.dumps(ROWS[0]).encode())
    recipe = make_recipe(tmp_path, "s3://bucket/tag/a.jsonl")
    first = rows_inputs(recipe)
    assert rows_inputs(recipe) == first
    (file,) = list_sources(recipe.data, "chat")[1]
    assert (file.kind, file.path, file.name) == ("etag", None, "s3://bucket/tag/a.jsonl")
    s3.pipe("bucket/tag/a.jsonl", json.dumps(ROWS[1]).encode())
    assert rows_inputs(recipe) != first


def test_missing_objects_and_unreachable_stores_are_reported_without_secrets(s3, tmp_path, monkeypatch):
    for address in ("s3://bucket/none.jsonl", "s3://nobucket/a.jsonl", "s3://bucket/none-*.jsonl"):
        with pytest.raises(DataError, match="not found"):
            prepare(tmp_path, address)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3.clear_instance_cache()
    with pytest.raises(EnvironmentProblem, match="the store cannot be read") as caught:
        prepare(tmp_path, "s3://bucket/a.jsonl")
    assert SECRET not in str(caught.value)


def test_a_truncated_compressed_object_is_not_a_store_error(s3, tmp_path):
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    s3.pipe("bucket/cut.jsonl.gz", packed[: len(packed) // 2])
    with pytest.raises(DataError, match="the compressed file is damaged or cut short"):
        prepare(tmp_path, "s3://bucket/cut.jsonl.gz")


def test_rows_of_a_web_server_are_hashed_by_content_if_it_sends_no_etag(tmp_path):
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
        with pytest.raises(DataError, match="not found"):
            prepare(tmp_path, f"{address}/none.jsonl")
        with pytest.raises(DataError, match="permission denied"):
            prepare(tmp_path, f"{address}/private.jsonl")
    with pytest.raises(EnvironmentProblem, match="the store cannot be read"):
        prepare(tmp_path, "http://127.0.0.1:9/rows.jsonl.gz")


@pytest.mark.parametrize("address", ["s3://bucket/a.jsonl", "gs://bucket/a.jsonl", "https://host.invalid/a.jsonl"])
def test_a_url_is_refused_offline(tmp_path, address):
    recipe = make_recipe(tmp_path, address)
    assert recipe.data.train[0].path == address
    assert names_remote(recipe)
    refuse_network(make_recipe(tmp_path, str(write_jsonl(tmp_path / "a.jsonl", ROWS[:9]))), offline=True)
    with pytest.raises(EnvironmentProblem, match="--offline forbids"):
        refuse_network(recipe, offline=True)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gs", raising=False)  # cached by an earlier test
    with pytest.raises(EnvironmentProblem, match=r"pip install 'llmtune-cli\[gs\]'"):
        prepare(tmp_path, "gs://bucket/a.jsonl")
