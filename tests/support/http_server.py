"""An HTTP server on the loopback interface for the duration of a block; a function answers requests."""

import base64
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Headers = Mapping[str, str] | Message
Answer = Callable[[str, str, Headers, bytes], tuple[int, Any, Headers]]
"""Called with verb, path, headers and body; returns the status, bytes or a JSON value, and further headers."""


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """Serve HTTP inside the block; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said, further = answer(self.command, self.path, self.headers, body)
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **further}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = respond  # noqa: N815 - the names that http.server calls

        def log_message(self, *about: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Hub:
    """The content of a simulated model hub."""

    url: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    """By name whether it is private."""
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    refuses: int | None = None
    """A status that every path answers with."""


@contextmanager
def hub_at_work(refuses: int | None = None) -> Iterator[Hub]:
    """Serve a hub on the loopback interface inside the block."""
    hub = Hub(refuses=refuses)

    def answer(verb: str, path: str, headers: Headers, body: bytes) -> tuple[int, Any, Headers]:
        hub.asked.append(f"{verb} {path}")
        hub.tokens.add(headers.get("Authorization", ""))
        return (hub.refuses, {"error": "no"}, {}) if hub.refuses else (*handle(hub, verb, path, body), {})

    with answering(answer) as hub.url:
        yield hub


def handle(hub: Hub, verb: str, path: str, body: bytes) -> tuple[int, Any]:
    """Answer one request like the hub."""
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        hub.repos[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
        return 200, {"url": f"{hub.url}/{name}", "name": name, "id": name}
    if "/preupload/" in path:
        return 200, {"files": [preuploaded(file) for file in json.loads(body)["files"]]}
    if path.endswith("/info/lfs/objects/batch"):
        wanted = json.loads(body)["objects"]
        return 200, {"transfer": "basic", "objects": [offered(hub, one) for one in wanted]}
    if verb == "PUT":
        hub.objects[path.rpartition("/")[2]] = body
        return 200, {}
    if "/commit/" in path:
        for line in body.splitlines():
            keep(hub, json.loads(line))
        return 200, {
            "commitUrl": f"{hub.url}/{next(iter(hub.repos))}/commit/1",
            "commitOid": "1" * 40,
            "pullRequestUrl": None,
        }
    return 404, {"error": f"no {path}"}


def preuploaded(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def offered(hub: Hub, wanted: dict[str, Any]) -> dict[str, Any]:
    return {**wanted, "actions": {"upload": {"href": f"{hub.url}/objects/{wanted['oid']}", "header": {}}}}


def keep(hub: Hub, line: dict[str, Any]) -> None:
    value = line["value"]
    if line["key"] == "file":
        hub.files[value["path"]] = base64.b64decode(value["content"])
    elif line["key"] == "lfsFile":
        hub.files[value["path"]] = hub.objects[value["oid"]]


def read_repository(path: str, body: bytes, files: dict[str, bytes], commit: str) -> tuple[int, Any, Headers]:
    """Answer the requests of a download: the repository's metadata, its tree, some of its paths, a file."""
    path = path.partition("?")[0]
    if not path.startswith("/api/"):
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in files:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        tag = {"ETag": f'"{name}-{commit[:4]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        return 200, files[name], tag
    tree = [{"type": "file", "path": name, "size": len(content), "oid": commit} for name, content in files.items()]
    if "/tree/" in path:
        return 200, [] if path.partition("/tree/")[2].count("/") else tree, {}
    if "/paths-info/" in path:
        wanted = json.loads(body or b"{}").get("paths", [])
        return 200, [entry for entry in tree if entry["path"] in wanted], {}
    name = "/".join(path.split("/")[3:5])
    siblings = [{"rfilename": name} for name in files]
    return 200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}, {}
