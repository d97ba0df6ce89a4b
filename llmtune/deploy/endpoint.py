"""An OpenAI-compatible endpoint asked over HTTP: whatever serves it, its answers in one shape."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from ipaddress import ip_address
from typing import Any

from llmtune.errors import EnvironmentProblem, LlmtuneError, RecipeError

SECONDS = 120
"""How long one answer may take."""
MOST_BYTES = 16 * 2**20
TRIES = 5
"""How often an endpoint that is busy is asked."""
LONGEST_WAIT = 20.0


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered; what it does not tell is None."""

    text: str
    prompt_ids: tuple[int, ...] | None
    prompt_tokens: int | None
    answer_ids: tuple[int, ...] | None
    logprobs: tuple[tuple[str, float], ...] | None
    """Of the chosen tokens: text and log-probability."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another place is not asked: a key would go along."""

    def redirect_request(self, *about: Any, **named: Any) -> None:
        """Follow nothing."""
        return


class Endpoint:
    """One endpoint: `url` with or without `/v1`.

    Raises RecipeError for what is no URL of HTTP; EnvironmentProblem where `offline` forbids to go there.
    """

    def __init__(self, url: str, key: str | None, offline: bool) -> None:
        parts = urllib.parse.urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            fix = "Give it as http://HOST:PORT, and a key with --api-key-file."
            raise RecipeError.of("this is no address of an endpoint", "--url", fix)
        here = _is_here(parts.hostname)
        if offline and not here:
            fix = "Leave --offline away, or certify an endpoint on this machine."
            raise EnvironmentProblem.of(f"--offline forbids to ask {parts.hostname}", "--url", fix)
        self.url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
        if not self.url.endswith("/v1"):
            self.url += "/v1"
        proxies = [urllib.request.ProxyHandler({})] if here else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._extras: dict[str, Any] | None = None

    def choose_model(self, wanted: str | None, name: str) -> str:
        """Return the model to ask: the one that is wanted, the one called like the run, or the only one.

        Raises RecipeError where that is not settled.
        """
        status, said = self._send("GET", "/models", None)
        found = said.get("data") if status == 200 else None
        known = [str(one.get("id")) for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        if wanted is not None:
            if known and wanted not in known:
                what = f"the endpoint has no model {wanted!r}"
                raise RecipeError.of(what, "--model", f"It has: {', '.join(known)}.")
            return wanted
        if status in (401, 403):
            raise self._refused(status, said)
        if name in known or len(known) == 1:
            return name if name in known else known[0]
        what = (
            f"the endpoint has several models: {', '.join(known)}" if known else "the endpoint does not list its models"
        )
        raise RecipeError.of(what, "--model", "Name the one to certify with --model.")

    def ask(self, path: str, body: Mapping[str, Any], extras: list[dict[str, Any]]) -> Reply:
        """Ask once; `extras` are parameters that not every server knows, the most telling first.

        Raises EnvironmentProblem where no answer comes.
        """
        tries = extras if self._extras is None else [self._extras]
        status, said = 0, dict[str, Any]()
        for more in tries:
            status, said = self._send("POST", path, {**body, **more})
            if status == 200:
                self._extras = more
                return _read(said)
            if status not in (400, 422):
                break
        raise self._refused(status, said)

    def _send(self, verb: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, dict[str, Any]]:
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(TRIES):
            request = urllib.request.Request(self.url + path, data, self._headers, method=verb)  # noqa: S310 - http(s)
            try:
                with self._opener.open(request, timeout=SECONDS) as response:
                    return response.status, _parse(response.read(MOST_BYTES))
            except urllib.error.HTTPError as error:
                busy = error.code in (429, 503) and attempt + 1 < TRIES
                if not busy:
                    return error.code, _parse(error.read(MOST_BYTES))
                time.sleep(_pause(error.headers.get("Retry-After"), attempt))
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                fix = "Start it, for example: llmtune deploy serve RUN"
                raise EnvironmentProblem.of(f"the endpoint does not answer: {reason}", self.url, fix) from error
        raise AssertionError("the last try returns or raises")

    def _refused(self, status: int, said: Mapping[str, Any]) -> LlmtuneError:
        detail = said.get("error")
        message = str(detail.get("message") if isinstance(detail, dict) else detail or "")[:300]
        if status in (401, 403):
            return EnvironmentProblem.of(f"the endpoint wants another key: {message}", self.url, "Use --api-key-file.")
        return EnvironmentProblem.of(f"the endpoint answered with status {status}: {message}", self.url)


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _pause(asked: str | None, attempt: int) -> float:
    try:
        return min(LONGEST_WAIT, max(0.0, float(asked or 2**attempt)))
    except ValueError:  # a date
        return LONGEST_WAIT


def _parse(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {"error": content[:300].decode("utf-8", "replace")}
    return found if isinstance(found, dict) else {}


def _read(said: Mapping[str, Any]) -> Reply:
    """Take an answer of a chat or a completion apart; raises EnvironmentProblem where there is none in it."""
    try:
        choice = said["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (KeyError, IndexError, TypeError) as error:
        raise EnvironmentProblem.of(
            "the endpoint's answer has not the shape of OpenAI's", fix="Check --url."
        ) from error
    usage = said.get("usage") or {}
    return Reply(
        text=str(text or ""),
        prompt_ids=_ids(said.get("prompt_token_ids") or choice.get("prompt_token_ids")),
        prompt_tokens=usage.get("prompt_tokens"),
        answer_ids=_ids(choice.get("token_ids")),
        logprobs=_logprobs(choice.get("logprobs")),
    )


def _ids(found: Any) -> tuple[int, ...] | None:
    return tuple(int(i) for i in found) if isinstance(found, list) and found else None


def _logprobs(found: Any) -> tuple[tuple[str, float], ...] | None:
    """Read log-probabilities as chat completions have them, and as completions do."""
    if not isinstance(found, dict):
        return None
    if isinstance(found.get("content"), list):
        return tuple((str(one["token"]), float(one["logprob"])) for one in found["content"])
    if isinstance(found.get("tokens"), list) and isinstance(found.get("token_logprobs"), list):
        pairs = zip(found["tokens"], found["token_logprobs"], strict=True)
        return tuple((str(token), float(value)) for token, value in pairs if value is not None)
    return None
