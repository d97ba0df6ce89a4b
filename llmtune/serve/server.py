"""The server process: a run's models on their thread, a socket bound early, uvicorn, and a graceful stop."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import cast

import h11
import uvicorn
from rich.console import Console
from starlette.types import ASGIApp
from transformers import PreTrainedModel
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmtune.adapter.merging import merge_adapter
from llmtune.adapter.reference_model import switches_off
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.evaluate.calibration import run_calibration
from llmtune.evaluate.decision import run_decision
from llmtune.model.config import head_is_new
from llmtune.plan import RunContext, open_finished
from llmtune.recipe.section import RELEASE_PREFIX
from llmtune.recipe.user_files import read_text_file
from llmtune.records import ModelRef
from llmtune.run_models import Models
from llmtune.serve.engine import Engine
from llmtune.serve.http_app import LOOPBACK, build_app
from llmtune.serve.release_watcher import ReleaseWatcher
from llmtune.serve.served_model import ServedModel
from llmtune.store.release_store import is_stored, release_address
from llmtune.store.run_listing import match_run

KEY_VARIABLE = "LLMTUNE_API_KEY"
MIN_KEY_LENGTH = 16
MAX_KEY_BYTES = 2**16
BODY_BYTES = 2 * 2**20
MEDIA_BYTES = 32 * 2**20
MAX_CONNECTIONS = 1000
MAX_SHARE = 4
"""A client, by its IPv4 address or its /64 of IPv6, has at most one in so many connections."""
HEAD_SECONDS = 15
"""How long a connection may take to send the complete head of a request."""
TAKE_SECONDS = 30
"""How long a client may leave a response unread that does not fit the buffers."""
OPEN_FILES = 4096
OTHER_FILES = 128
"""Open files other than connections."""


@dataclass(frozen=True)
class ServeOptions:
    """Options of the server, apart from the run."""

    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    merged: bool = False
    max_queue: int = 64
    max_body: int | None = None
    """Maximum bytes of a request; None for the task's default."""
    grace_seconds: float = 30.0
    offline: bool = False


def serve_run(
    name: str,
    path: Path,
    options: ServeOptions,
    console: Console,
    on_ready: Callable[[dict[str, object]], None] = lambda ready: None,
    release: str | None = None,
) -> None:
    """Serve a finished run and its base until a signal; `on_ready` gets the address and the models' names.

    With `release`, the run is the current release of that name, and is reloaded when another one becomes current.

    Raises:
        RecipeError: other machines could reach the server without a key.
        EnvironmentProblem: the port is taken, or the model cannot be loaded.
    """
    key = read_key(options)
    bound = bind_socket(options.host, options.port)
    try:
        context = open_served(path, options, console)
        with console.status("loading the model"):
            engine = Engine(load_models(name, context, options), max_queue=options.max_queue)
            engine.start()
    except BaseException:
        bound.close()
        raise
    kind = context.plan.task.model_kind
    body_bytes = options.max_body or (MEDIA_BYTES if kind.takes_audio or kind.takes_images else BODY_BYTES)
    app = build_app(engine, body_bytes=body_bytes, key=key)
    host, port = bound.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    names = [*engine.models]

    def load(folder: Path) -> dict[str, ServedModel]:
        return load_models(name, open_served(folder, options, console), options)

    watcher = ReleaseWatcher(release, path.name, engine, load, console) if release else None

    def announce() -> None:
        console.print(f"serving {', '.join(names)} at {url} (Ctrl-C stops)", highlight=False)
        on_ready({"url": url, "models": names})
        if watcher:
            watcher.start()

    try:
        run_server(app, engine, bound, options.grace_seconds, announce)
    finally:
        if watcher:
            watcher.stop()


def read_key(options: ServeOptions) -> str | None:
    """Return the API key, from a file or the environment.

    Raises RecipeError if it is too short, or missing although other machines could reach the server.
    """
    key, source = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    if options.key_file is not None:
        source = str(options.key_file)
        try:
            key = read_text_file(options.key_file, MAX_KEY_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError.of(f"the API key cannot be read: {error}", "--api-key-file") from error
    key = key.strip() if key is not None else None
    if key is not None and (len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key):
        what = f"an API key needs at least {MIN_KEY_LENGTH} printable ASCII characters, without spaces"
        fix = 'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        raise RecipeError.of(what, source, fix)
    if key is None and options.host not in LOOPBACK:
        what = f"other machines could reach {options.host} without an API key"
        fix = f"Set a key with --api-key-file FILE or the variable {KEY_VARIABLE}, or omit --host."
        raise RecipeError.of(what, "--host", fix)
    return key


def open_served(path: Path, options: ServeOptions, console: Console) -> RunContext:
    """Open a run; no weights are loaded. Raises RecipeError if it has no adapter to merge."""
    context = open_finished(path, console, options.offline)
    if options.merged and context.plan.recipe.adapter.method == "full":
        raise RecipeError.of("this run trained all weights and has no adapter", "--merged", "Omit it.")
    return context


def load_models(name: str, context: RunContext, options: ServeOptions) -> dict[str, ServedModel]:
    """Load the tuned model, and return it by its name; then its base, if that shares its weights."""
    plan, path = context.plan, context.folder.path
    adapted = Models(context).adapted
    model = cast(PreTrainedModel, adapted.model)
    if options.merged:
        merged = merge_adapter(adapted, "dequantized" if adapted.selected.quantized else "original")
        model = cast(PreTrainedModel, merged)
    tuned = ServedModel(
        name,
        model.eval(),
        plan.processor,
        plan.recipe,
        plan.task,
        calibration=run_calibration(context.folder),
        decision=run_decision(context.folder),
        release=release_address(path).removeprefix(RELEASE_PREFIX) if is_stored(path) else None,
    )
    served, base = {name: tuned}, public_name(plan.model_ref)
    shared = not options.merged and plan.recipe.adapter.method != "full" and switches_off(model)
    if shared and base != name and not head_is_new(plan.model_ref, plan.recipe, plan.task):
        served[base] = ServedModel(base, model, plan.processor, plan.recipe, plan.task, is_base=True)
    return served


def public_name(model_ref: ModelRef) -> str:
    """Return the base's name; for a local folder only its last part, so that clients see no local paths."""
    path = Path(model_ref.name)
    return path.name if path.is_absolute() or path.exists() else model_ref.name


def name_run(path: Path) -> str:
    """Return the name that clients use for a run: that of its folder; for a release, that of all its releases."""
    folder = path.resolve()
    return folder.parent.name if is_stored(folder) else folder.name


def parse_run_names(runs: Sequence[Path], named: Sequence[str]) -> dict[str, Path]:
    """Return runs by name: the one in `NAME=RUN`, else that of the folder.

    Raises RecipeError if a name is used twice, or there is no run.
    """
    pairs, problems = [(name_run(path), path) for path in runs], []
    for text in named:
        name, _, path = text.partition("=")
        if not (name and path):
            problems.append(Problem(f"{text!r} is not NAME=RUN", "--adapter", "Example: --adapter polite=runs/polite"))
        pairs.append((name, match_run(path) or Path(path)))
    names = [name for name, _ in pairs]
    problems += [
        Problem(f"two runs are called {name!r}", "--adapter", "Rename one: --adapter NAME=RUN")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if not pairs:
        problems.append(Problem("nothing to serve", "RUN", "Name a run folder, or --adapter NAME=RUN."))
    RecipeError.collect(problems)
    return dict(pairs)


class TimedProtocol(H11Protocol):
    """uvicorn's protocol; it closes connections whose client takes too long, or has too many."""

    waiting: asyncio.TimerHandle | None = None
    since = 0.0
    """When the connection began to wait for its client."""
    network = ""
    """The client's address; of IPv6 only the /64, which one client has as a whole."""
    limit = MAX_CONNECTIONS

    @property
    def idle(self) -> bool:
        """Whether no request has begun to arrive since the last response."""
        return self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)

    @property
    def waits(self) -> bool:
        """Whether it is the client's turn: to send the rest of a request, or to take a response."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered or self.conn.their_state in (h11.IDLE, h11.SEND_BODY) or self.flow.write_paused

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection; above a limit, close the one that waits for longest, or this one if none waits.

        It is one of the same client, or of the client with the most connections.
        """
        super().connection_made(transport)
        address = ip_address(self.client[0] if self.client else "::")
        self.network = str(getattr(address, "ipv4_mapped", None) or address.exploded[:19])
        self._watch()
        open_ones = cast(set[TimedProtocol], self.connections)
        counts = Counter(one.network for one in open_ones)
        own = counts[self.network] > self.limit // MAX_SHARE
        if own or len(open_ones) > self.limit:
            waiting = [one for one in open_ones - {self} if one.waits and (one.network == self.network or not own)]
            doomed = min(waiting, key=lambda one: (-counts[one.network], one.since), default=self)
            self.connections.discard(doomed)
            doomed.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_watching()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive data; a request head must be complete in time."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait for the client to take a response, with a limit."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """Send the rest of a response."""
        super().resume_writing()
        self._watch()

    def _watch(self) -> None:
        """Limit how long the client may take; the gateway limits the time of a body."""
        if not (self.idle or self.flow.write_paused):
            self._stop_watching()
        elif self.waiting is None:
            self.since = self.loop.time()
            seconds = TAKE_SECONDS if self.flow.write_paused else HEAD_SECONDS
            self.waiting = self.loop.call_later(seconds, self.transport.abort)

    def _stop_watching(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None


def allow_connections() -> None:
    """Raise the limit on open files as far as allowed and needed, and limit connections to it.

    Raises EnvironmentProblem if the limit is too low: every refused connection would be logged, without end.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        soft = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY:
        if soft <= OTHER_FILES:
            what = f"only {soft} files may be open at once, but the server needs more than {OTHER_FILES}"
            raise EnvironmentProblem.of(what, "ulimit -n", "Raise the limit: ulimit -n 4096.")
        TimedProtocol.limit = min(MAX_CONNECTIONS, soft - OTHER_FILES)


SPARE_SECONDS = 5
"""How long the server waits, after the grace period, for connections to close."""
IDLE_SECONDS = 75
"""When an idle connection is closed: later than clients close it, so no request arrives on a closed connection."""


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind an address before anything heavy is loaded; no connection is accepted yet.

    Raises:
        RecipeError: unknown host.
        EnvironmentProblem: the port is taken or not permitted, or too few files may be open.
    """
    allow_connections()
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RecipeError.of(f"unknown host {host!r}", "--host", "Name an address of this machine.") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        what = f"cannot listen on {host}, port {port}: {error.strerror or error}"
        fix = "Choose another port; 0 takes a free one."
        raise EnvironmentProblem.of(what, "--port", fix) from error
    return bound


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Whether to keep a log record: drops cancelled requests, which uvicorn logs as bugs of the application."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


class _Server(uvicorn.Server):
    """uvicorn, which stops the engine first."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None], on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_stop, self.on_ready = on_stop, on_ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests, and let running answers finish."""
        self.on_stop()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and report it."""
        await super().startup(sockets)
        self.on_ready()


def run_server(
    app: ASGIApp, engine: Engine, bound: socket.socket, grace_seconds: float, on_ready: Callable[[], None]
) -> None:
    """Answer requests until SIGINT or SIGTERM; the previous signal handlers run at the end."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        http=TimedProtocol,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(grace_seconds) + SPARE_SECONDS,
        ws="none",
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    server = _Server(config, lambda: engine.stop(grace_seconds), on_ready)
    try:
        server.run(sockets=[bound])
    finally:
        engine.close(SPARE_SECONDS)
        bound.close()
