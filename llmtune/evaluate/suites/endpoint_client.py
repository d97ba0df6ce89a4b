"""A client of an OpenAI-compatible endpoint: bounded answers, no redirects, errors that name the endpoint.

The API key is removed from every answer and error, so that no journal, report or message can contain it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import openai

from llmtune.errors import EnvironmentProblem, LlmtuneError, RecipeError
from llmtune.recipe.eval_suites_section import is_endpoint, is_local
from llmtune.recipe.secrets import REMOVED, redact, secret_parts

TIMEOUT_SECONDS = 120
"""Time limit for a complete answer, and for the wait before its first byte."""
MAX_ANSWER_BYTES = 8 * 2**20
"""Answers have few tokens; a long model list or the ids of a long prompt take less than 2 MiB."""
RETRIES = 4
"""Retries of a busy endpoint."""
VERSION = re.compile(r"/v\d[^/]*(/|$)")
"""A version in the path of a URL: `/v1`, or `/v1beta/openai`."""


def check_key(key: str | None, where: str) -> str | None:
    """Return a key without spaces around it. Raises EnvironmentProblem without the key if no header can carry it."""
    key = (key or "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        what = "the API key has a line break, a space or a character that is not ASCII"
        raise EnvironmentProblem.of(what, where, "Set it to the key alone, on one line.")
    return key or None


def connect(url: str, key: str | None, offline: bool) -> openai.OpenAI:
    """Return a client of one endpoint, `url` with or without `/v1`. It follows no redirect, which could leak the key.

    Raises RecipeError if `url` is not an HTTP URL, EnvironmentProblem if `offline` forbids the host.
    """
    key = check_key(key, "the API key")
    url = url.strip().rstrip("/")
    if not is_endpoint(url):
        fix = "Give it as http://HOST:PORT, and a key with --api-key-file."
        raise RecipeError.of("this is not the address of an endpoint", "--url", fix)
    parsed = urlsplit(url)
    local = is_local(url)
    if offline and not local:
        fix = "Omit --offline, or certify an endpoint on this machine."
        raise EnvironmentProblem.of(f"--offline forbids asking {parsed.hostname}", "--url", fix)
    http_client = openai.DefaultHttpxClient(
        timeout=TIMEOUT_SECONDS,
        follow_redirects=False,
        trust_env=not local,
        headers={"Accept-Encoding": "identity"},
        event_hooks={"response": [partial(bound_answer, key)]},
    )
    base_url = url if VERSION.search(parsed.path) else f"{url}/v1"
    return openai.OpenAI(base_url=base_url, api_key=key or "none", max_retries=RETRIES, http_client=http_client)


class AnswerRefusedError(BaseException):
    """An answer beyond the bounds. Not an Exception, because the client retries after any Exception."""


def bound_answer(key: str | None, response: Any) -> None:
    """Limit the size and time of an answer, and remove the API key from it.

    Raises AnswerRefusedError if it is compressed, which was not requested.
    """
    if (packed := response.headers.get("content-encoding", "identity")) != "identity":
        raise AnswerRefusedError(f"its answer is compressed ({packed}), which was not requested")
    stream, kind = response.stream, type(response.stream)
    # The client bundles its own httpx, which reads only its own kind of stream.
    methods = {
        "__init__": lambda self: None,
        "__iter__": lambda self: iter([hide_key(key, b"".join(_limit_bytes(stream)))]),
        "close": lambda self: stream.close(),
    }
    response.stream = type(kind.__name__, (kind,), methods)()


def _limit_bytes(stream: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the bytes of an answer, up to MAX_ANSWER_BYTES within TIMEOUT_SECONDS."""
    size, end = 0, time.monotonic() + TIMEOUT_SECONDS
    for part in stream:
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise AnswerRefusedError(f"its answer has more than {MAX_ANSWER_BYTES:,} bytes")
        if time.monotonic() > end:
            raise AnswerRefusedError(f"its answer did not end within {TIMEOUT_SECONDS:g} seconds")
        yield part


def hide_key(key: str | None, body: bytes) -> bytes:
    """Remove the API key from an answer, also where JSON escapes its letters."""
    parts = secret_parts(key or "")
    try:
        plain = json.dumps(json.loads(body)).encode() if parts and b"\\" in body else body
    except (ValueError, RecursionError):
        plain = body
    for form in [*parts, *(json.dumps(part)[1:-1] for part in parts)]:
        plain = plain.replace(form.encode(), REMOVED.encode())
    return plain


@contextmanager
def explained_errors(client: openai.OpenAI) -> Iterator[None]:
    """Turn an endpoint's errors into an EnvironmentProblem."""
    try:
        yield
    except openai.OpenAIError as error:
        raise _explain_status(error, str(client.base_url).rstrip("/"), client.api_key) from error
    except AnswerRefusedError as error:
        raise EnvironmentProblem.of(str(error), str(client.base_url).rstrip("/"), "Check --url.") from None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        what = "the endpoint's answer does not have the shape of OpenAI's"
        raise EnvironmentProblem.of(what, fix="Check --url.") from error


def _explain_status(error: openai.OpenAIError, url: str, key: str) -> LlmtuneError:
    secrets = secret_parts(key)
    if not isinstance(error, openai.APIStatusError):
        fix = "Start it, for example: llmtune deploy serve RUN"
        return EnvironmentProblem.of(
            f"the endpoint does not answer: {redact(str(error.__cause__ or error), secrets)}", url, fix
        )
    detail = redact(error.message, secrets)[:300]
    if error.status_code in (401, 403):
        what = f"the endpoint rejects the API key: {detail}"
        return EnvironmentProblem.of(what, url, "Use --api-key-file.")
    return EnvironmentProblem.of(f"the endpoint answered with status {error.status_code}: {detail}", url)
