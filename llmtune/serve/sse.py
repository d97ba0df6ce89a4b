"""Generated answers in OpenAI's two ways: whole, or in pieces as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message

from llmtune.data.chat_rows import ToolCall
from llmtune.serve.answer_stream import Delta
from llmtune.serve.middleware import Metrics
from llmtune.serve.request_handler import PendingAnswer
from llmtune.serve.request_queue import End
from llmtune.serve.schemas import ApiError, GenerationRequest

NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Body = dict[str, object]


class GeneratedAnswer:
    """One answer on its way out: its parts as they grow, and what is counted of it."""

    def __init__(self, pending: PendingAnswer, request: GenerationRequest, metrics: Metrics, *, chat: bool) -> None:
        self.pending, self.request, self.metrics, self.chat = pending, request, metrics, chat
        self.served, self.begun = pending.job.served, list(pending.begun)
        self.prompt = list(pending.job.ids[: len(pending.job.ids) - len(self.begun)])
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        self.stream = self.served.stream(self.prompt, chat=chat, tools=pending.tools, stops=stops)
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.started, self.created = time.monotonic(), int(time.time())
        self.finish_reason = "stop"
        self.calls = 0
        """Calls that were sent."""
        self.wants_usage = bool(request.stream_options and request.stream_options.include_usage)
        metrics.prompt_tokens.labels(self.served.name).inc(len(self.prompt))

    @property
    def ids(self) -> list[int]:
        """The ids so far."""
        return self.stream.detokenizer.ids

    async def pieces(self) -> AsyncIterator[tuple[Delta, list[int]]]:
        """Yield what is added to the answer and its ids; afterwards `finish_reason` and `usage` hold.

        Raises ApiError for what went wrong.
        """
        sent, stream = 0, self.stream
        try:
            async for event in self.pending.stream():
                if isinstance(event, End):
                    self.finish_reason = event.reason
                    break
                if not sent:
                    self.metrics.first_token.observe(time.monotonic() - self.started)
                delta = stream.add([*([] if sent else self.begun), *event])
                yield delta, self.ids[sent:]
                sent = len(self.ids)
                if stream.detokenizer.stopped:
                    self.finish_reason = "stop"
                    break
            if rest := stream.close():
                yield rest, []
            if stream.tool_calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        finally:
            self.pending.cancel()
            self.metrics.answer_tokens.labels(self.served.name).inc(len(self.ids))

    @property
    def usage(self) -> dict[str, int]:
        """How many tokens it took; the one that ended the answer is among them."""
        prompt, answer = len(self.prompt), len(self.ids)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def body(self) -> Body:
        """Return the body of an answer that is sent at once."""
        stream = self.stream
        content: Body = {"text": stream.content}
        if self.chat:
            message = self._message(Delta(stream.content, stream.reasoning, tuple(stream.tool_calls)))
            content = {"message": {"role": "assistant", "content": None if stream.tool_calls else "", **message}}
        choice = self._choice(content, self.ids, self.finish_reason)
        kind = "chat.completion" if self.chat else "text_completion"
        return self._envelope(kind, [choice], with_prompt=True) | {"usage": self.usage}

    def chunk(self, delta: Delta, ids: list[int], *, finish: str | None = None, first: bool = False) -> str:
        """Return one event of a stream."""
        content: Body = {"text": delta.content}
        if self.chat:
            start: Body = {"role": "assistant", "content": ""} if first else {}
            content = {"delta": start | self._message(delta, numbered=True)}
        usage: Body = {"usage": None} if self.wants_usage else {}
        return event(self._envelope(self._chunk_kind, [self._choice(content, ids, finish)], first) | usage)

    def last_chunk(self) -> str:
        """Return what ends a stream: the usage if it was asked for, and the mark."""
        usage = event(self._envelope(self._chunk_kind, []) | {"usage": self.usage}) if self.wants_usage else ""
        return f"{usage}data: [DONE]\n\n"

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _message(self, delta: Delta, numbered: bool = False) -> Body:
        """Return the fields of a message; `numbered` tells the calls of a stream apart."""
        message: Body = {"content": delta.content} if delta.content else {}
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            message["tool_calls"] = [self._call(call, numbered) for call in delta.tool_calls]
        return message

    def _call(self, call: ToolCall, numbered: bool) -> Body:
        name, arguments = call["function"]["name"], json.dumps(call["function"]["arguments"], ensure_ascii=False)
        number: Body = {"index": self.calls} if numbered else {}
        self.calls += 1
        call_id = f"call_{secrets.token_hex(12)}"
        return {**number, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _choice(self, content: Body, ids: list[int], finish: str | None) -> Body:
        choice: Body = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return choice | ({"token_ids": ids} if self.request.return_token_ids else {})

    def _envelope(self, kind: str, choices: list[Body], with_prompt: bool = False) -> Body:
        body: Body = {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}
        prompt: Body = {"prompt_token_ids": self.prompt} if with_prompt and self.request.return_token_ids else {}
        return body | {"choices": choices} | prompt


def event(content: Body) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def send_answer(answer: GeneratedAnswer, request: Request) -> Response:
    """Answer a request in the way that it asks for; raises ApiError for what goes wrong before the first token."""
    pieces = answer.pieces()
    async with until_disconnect(answer.pending, request, answer.metrics):
        if answer.request.stream:
            first = await anext(pieces)
        else:
            async for _ in pieces:
                pass
            return JSONResponse(answer.body())
    return StreamingResponse(_stream(answer, first, pieces), media_type="text/event-stream", headers=NO_CACHE)


async def _stream(
    answer: GeneratedAnswer, first: tuple[Delta, list[int]], rest: AsyncIterator[tuple[Delta, list[int]]]
) -> AsyncIterator[str]:
    complete = False
    try:
        yield answer.chunk(first[0], first[1], first=True)
        async for delta, ids in rest:
            if delta or (ids and answer.request.return_token_ids):
                yield answer.chunk(delta, ids)
        yield answer.chunk(Delta(), [], finish=answer.finish_reason)
        yield answer.last_chunk()
        complete = True
    except ApiError as error:
        complete = True
        yield event(error.content())
    finally:
        answer.pending.cancel()
        if not complete:
            answer.metrics.disconnects.inc()


class ClientDisconnected(Exception):
    """The client hung up: nobody reads an answer."""


@asynccontextmanager
async def until_disconnect(pending: PendingAnswer, request: Request, metrics: Metrics) -> AsyncIterator[None]:
    """Cancel the answer as soon as the client hangs up; the block then ends by ClientDisconnected."""
    task = asyncio.current_task()
    assert task is not None, "requests are answered in tasks"
    disconnected = False

    async def watch(receive: Callable[[], Awaitable[Message]]) -> None:
        nonlocal disconnected
        while (await receive())["type"] != "http.disconnect":
            pass
        disconnected = True
        task.cancel()

    watcher = asyncio.create_task(watch(request.receive))
    try:
        yield
    except asyncio.CancelledError:
        pending.cancel()
        if not disconnected:
            raise
        task.uncancel()
        metrics.disconnects.inc()
        raise ClientDisconnected from None
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
