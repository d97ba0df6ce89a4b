"""Answers that are written, sent in OpenAI's two ways: whole, or in pieces as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from llmtune.serve.detokenizer import Wording
from llmtune.serve.engine import End
from llmtune.serve.prometheus import Meters
from llmtune.serve.request_handler import Ticket
from llmtune.serve.schemas import ChatAnswer, ChatChoice, Refusal, Said, TextAnswer, TextChoice, Usage, Written


class Answer:
    """One answer on its way out: its text as it grows, and what is counted of it."""

    def __init__(self, ticket: Ticket, asked: Written, meters: Meters, chat: bool) -> None:
        self.ticket, self.asked, self.meters, self.chat = ticket, asked, meters, chat
        self.served = ticket.job.served
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        self.wording = Wording(self.served.decode, stops)
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.began, self.created = time.monotonic(), int(time.time())
        self.finish = "stop"
        meters.prompt_tokens.labels(self.served.name).inc(len(ticket.job.ids))

    async def pieces(self) -> AsyncIterator[tuple[str, list[int]]]:
        """Yield what is added to the text and the ids that it came by; afterwards `finish` and `usage` hold.

        Raises Refusal for what went wrong.
        """
        told = 0
        try:
            async for event in self.ticket.events():
                if isinstance(event, End):
                    self.finish = event.reason
                    break
                if not told:
                    self.meters.first_token.observe(time.monotonic() - self.began)
                piece = self.wording.take(event)
                yield piece, self.wording.ids[told:]
                told = len(self.wording.ids)
                if self.wording.stopped:
                    self.finish = "stop"
                    break
            if rest := self.wording.close():
                yield rest, []
        finally:
            self.ticket.cancel()
            self.meters.answer_tokens.labels(self.served.name).inc(len(self.wording.ids))

    @property
    def usage(self) -> Usage:
        """How many tokens it took."""
        prompt, answer = len(self.ticket.job.ids), len(self.wording.ids)
        return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)

    def whole(self) -> dict[str, Any]:
        """Return the body of an answer that is sent at once."""
        prompt = list(self.ticket.job.ids) if self.asked.return_token_ids else None
        ids = self.wording.ids if self.asked.return_token_ids else None
        about: dict[str, Any] = {"id": self.id, "created": self.created, "model": self.served.name}
        about |= {"usage": self.usage, "prompt_token_ids": prompt}
        ended: dict[str, Any] = {"finish_reason": self.finish, "token_ids": ids}
        text = self.wording.text
        made: ChatAnswer | TextAnswer
        if self.chat:
            made = ChatAnswer(**about, choices=[ChatChoice(message=Said(content=text), **ended)])
        else:
            made = TextAnswer(**about, choices=[TextChoice(text=text, **ended)])
        return made.model_dump(exclude={} if self.asked.return_token_ids else _IDS)

    def chunk(self, piece: str | None, ids: list[int], *, finish: str | None = None, first: bool = False) -> str:
        """Return one event of a stream."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = role | ({} if piece is None else {"content": piece})
        else:
            choice["text"] = piece or ""
        if self.asked.return_token_ids:
            choice["token_ids"] = ids
        content = self._about() | {"choices": [choice]}
        if self.asked.return_token_ids and first:
            content["prompt_token_ids"] = list(self.ticket.job.ids)
        if self._wants_usage:
            content["usage"] = None
        return event(content)

    def last_chunk(self) -> str:
        """Return what ends a stream: the usage if it was asked for, and the mark."""
        usage = event(self._about() | {"choices": [], "usage": self.usage.model_dump()}) if self._wants_usage else ""
        return f"{usage}data: [DONE]\n\n"

    @property
    def _wants_usage(self) -> bool:
        return bool(self.asked.stream_options and self.asked.stream_options.include_usage)

    def _about(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}


_IDS: Any = {"prompt_token_ids": True, "choices": {"__all__": {"token_ids"}}}


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def send_answer(answer: Answer, request: Request) -> Response:
    """Answer a request in the way that it asks for; raises Refusal for what goes wrong before the first token."""
    pieces = answer.pieces()
    if not answer.asked.stream:
        async with given_up(answer.ticket, request, answer.meters):
            async for _ in pieces:
                pass
        return JSONResponse(answer.whole())
    async with given_up(answer.ticket, request, answer.meters):
        first = await anext(pieces)
    return StreamingResponse(_stream(answer, first, pieces), media_type="text/event-stream", headers=_UNCACHED)


_UNCACHED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _stream(
    answer: Answer, first: tuple[str, list[int]], rest: AsyncIterator[tuple[str, list[int]]]
) -> AsyncIterator[str]:
    whole = False
    try:
        yield answer.chunk(first[0], first[1], first=True)
        async for piece, ids in rest:
            if piece or (ids and answer.asked.return_token_ids):
                yield answer.chunk(piece, ids)
        yield answer.chunk(None, [], finish=answer.finish)
        yield answer.last_chunk()
        whole = True
    except Refusal as refusal:
        whole = True
        yield event(refusal.content())
    finally:
        answer.ticket.cancel()
        if not whole:
            answer.meters.hung_up.inc()


@asynccontextmanager
async def given_up(ticket: Ticket, request: Request, meters: Meters) -> AsyncIterator[None]:
    """Let the answer go, within the block, as soon as the client hangs up; the block is then left by ClientGone."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch(receive: Callable[[], Awaitable[Any]]) -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch(request.receive))
    try:
        yield
    except asyncio.CancelledError:
        ticket.cancel()
        if not gone:
            raise
        task.uncancel()
        meters.hung_up.inc()
        raise ClientGone from None
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


class ClientGone(Exception):
    """The client hung up: nobody reads an answer."""
