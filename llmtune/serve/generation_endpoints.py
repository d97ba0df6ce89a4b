"""OpenAI's endpoints: turn requests into prompts and tokens into answers, in one piece or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import ParamSpec, TypeVar

from fastapi import FastAPI
from openai.types import Completion
from openai.types.chat import ChatCompletion
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from llmtune.data.chat_rows import ToolCall
from llmtune.data.completion_encoding import prompt_ids
from llmtune.errors import nearest
from llmtune.evaluate.generation import extend_prompt
from llmtune.records import Prompt
from llmtune.serve.answer_stream import Delta
from llmtune.serve.chat_prompt import ServedPrompt, chat_prompt, refuse_long, require_room
from llmtune.serve.engine import Engine, generate_ids
from llmtune.serve.schemas import ApiError, ChatRequest, CompletionRequest, GenerationRequest
from llmtune.serve.served_model import DRAWS, ServedModel

_TEXT_THREAD = ThreadPoolExecutor(1, "text")
"""A single thread: tokenizers are not safe to share between threads."""
P = ParamSpec("P")
T = TypeVar("T")
NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
EVENT_STREAM = {"text/event-stream": {"example": "data: {...}\n\ndata: [DONE]\n\n"}}
RESPONSES: dict[int | str, dict[str, object]] = {
    200: {"content": EVENT_STREAM, "description": "The answer; with `stream: true` as server-sent events."}
}
Body = dict[str, object]


def mount_generation(app: FastAPI, engine: Engine, *, chat: bool) -> None:
    """Put OpenAI's endpoints into `app`."""
    if chat:

        @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=RESPONSES)
        async def answer_a_conversation(body: ChatRequest, request: Request) -> Response:
            """Token ids are made by the same function as in training."""
            served = served_by_name(engine, body.model)
            prompt = await in_text_thread(chat_prompt, body, served)
            ids = answer_ids(engine, served, prompt, body, body.max_completion_tokens or body.max_tokens)
            return await send_answer(GeneratedAnswer(ids, served, prompt, body, chat=True), request)

    @app.post("/v1/completions", response_model=Completion, responses=RESPONSES)
    async def continue_a_text(body: CompletionRequest, request: Request) -> Response:
        """No chat template is used. The tokenizer's start token is prepended, unless the text begins with it."""
        served = served_by_name(engine, body.model)
        prompt = ServedPrompt(Prompt(await in_text_thread(completion_ids, body, served)))
        ids = answer_ids(engine, served, prompt, body, body.max_tokens)
        return await send_answer(GeneratedAnswer(ids, served, prompt, body, chat=False), request)


def served_by_name(engine: Engine, name: str | None) -> ServedModel:
    """Return a model by its name, the first one by default; raises ApiError for an unknown name."""
    models = engine.models
    if name is not None and name not in models:
        message = f"Model {name!r} not found.{nearest(name, tuple(models))} Models: {', '.join(models)}."
        raise ApiError(404, message, param="model", code="model_not_found")
    return models[name or next(iter(models))]


def in_text_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
    """Run work with texts and tokenizers outside the event loop."""
    return asyncio.get_running_loop().run_in_executor(_TEXT_THREAD, partial(work, *args, **kwargs))


def completion_ids(request: CompletionRequest, served: ServedModel) -> list[int]:
    """Return the ids of a text to continue, made as in task completion, or the ids that the client sent.

    A text that begins with the start token, such as a rendered chat template, gets no second one.
    """
    first = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
    if isinstance(first, str):
        refuse_long(first, served)
        start = served.processor.bos_token
        if start and first.startswith(str(start)):
            ids: list[int] = served.processor(first, add_special_tokens=False)["input_ids"]
            return ids
        return prompt_ids(first, served.processor)
    ids = [token for token in request.prompt if isinstance(token, int)]
    if outside := [token for token in ids if token >= served.vocabulary]:
        message = f"Token {outside[0]} is outside the vocabulary of {served.vocabulary} tokens."
        raise ApiError(400, message, param="prompt")
    return ids


def answer_ids(
    engine: Engine, served: ServedModel, prompt: ServedPrompt, request: GenerationRequest, max_tokens: int | None
) -> AsyncGenerator[list[int]]:
    """Generate the answer to a prompt; raises ApiError if prompt and answer do not fit the model's context."""
    begun = _read_later(extend_prompt(prompt.prompt, prompt.begun))
    room = require_room(served, len(begun), max_tokens)
    stated = request.model_dump(include={*DRAWS, "repetition_penalty"}, exclude_none=True)
    settings = served.request_settings(stated, max_tokens or min(room, served.recipe.generation.max_new_tokens))
    seed = served.recipe.seed + prompt.turn if request.seed is None else request.seed
    return generate_ids(engine, served, begun, settings, seed)


def _read_later(prompt: Prompt) -> Prompt:
    """Return a prompt whose media are made by the thread of texts, but not before the model answers it."""
    media = prompt.media
    return prompt if media is None else Prompt(prompt.ids, lambda: _TEXT_THREAD.submit(media).result())


class GeneratedAnswer:
    """One answer while it is generated and sent: its parts, and its token counts."""

    def __init__(
        self,
        generated: AsyncGenerator[list[int]],
        served: ServedModel,
        prompt: ServedPrompt,
        request: GenerationRequest,
        *,
        chat: bool,
    ) -> None:
        self.generated, self.served, self.prompt, self.request, self.chat = generated, served, prompt, request, chat
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        self.stream = served.stream(prompt.prompt.ids, chat=chat, tools=prompt.tools, stops=stops)
        self.envelope: Body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
        }
        self.finish_reason = "stop"
        self.calls = 0
        """Number of calls sent."""
        self.wants_usage = bool(request.stream_options and request.stream_options.include_usage)

    @property
    def ids(self) -> list[int]:
        """The ids so far."""
        return self.stream.detokenizer.ids

    async def pieces(self) -> AsyncGenerator[tuple[Delta, list[int]]]:
        """Yield each addition to the answer with its ids; afterwards `finish_reason` and `usage` are final.

        Raises ApiError if generation fails.
        """
        sent, stream = 0, self.stream
        async with aclosing(self.generated) as generated:
            async for ids in generated:
                delta = stream.add([*(() if sent else self.prompt.begun), *ids])
                yield delta, self.ids[sent:]
                sent = len(self.ids)
                if stream.detokenizer.stopped:
                    break
            else:
                self.finish_reason = "stop" if self.ids[-1] in self.served.stops else "length"
        if rest := stream.close():
            yield rest, []
        if stream.tool_calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"

    @property
    def usage(self) -> dict[str, int]:
        """Token counts, including the token that ended the answer."""
        prompt, answer = len(self.prompt.prompt), len(self.ids)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def body(self) -> Body:
        """Return the body of an answer that is sent in one piece."""
        stream = self.stream
        content: Body = {"text": stream.content}
        if self.chat:
            message = self._message(Delta(stream.content, stream.reasoning, tuple(stream.tool_calls)))
            content = {"message": {"role": "assistant", "content": None if stream.tool_calls else "", **message}}
        choices = [self._choice(content, self.ids, self.finish_reason)]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.envelope, "object": kind, "choices": choices, **self._prompt_ids(), "usage": self.usage}

    def chunk(self, delta: Delta, ids: list[int], *, finish: str | None = None, first: bool = False) -> str:
        """Return one event of a stream."""
        content: Body = {"text": delta.content}
        if self.chat:
            start: Body = {"role": "assistant", "content": ""} if first else {}
            content = {"delta": start | self._message(delta, numbered=True)}
        further = {**(self._prompt_ids() if first else {}), **({"usage": None} if self.wants_usage else {})}
        return self._event([self._choice(content, ids, finish)], further)

    def last_chunk(self) -> str:
        """Return the end of a stream: the usage if the client asked for it, and `[DONE]`."""
        usage = self._event([], {"usage": self.usage}) if self.wants_usage else ""
        return f"{usage}data: [DONE]\n\n"

    def _event(self, choices: list[Body], further: Mapping[str, object]) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return server_sent_event({**self.envelope, "object": kind, "choices": choices, **further})

    def _message(self, delta: Delta, numbered: bool = False) -> Body:
        """Return the fields of a message; in a stream, calls carry their index."""
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

    def _prompt_ids(self) -> Body:
        return {"prompt_token_ids": self.prompt.prompt.ids} if self.request.return_token_ids else {}


def server_sent_event(content: Body) -> str:
    """Return one event of a stream."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def send_answer(answer: GeneratedAnswer, request: Request) -> Response:
    """Answer a request in one piece or as a stream; raises ApiError if it fails before the first token."""
    pieces = answer.pieces()

    async def finish() -> Response:
        async for _ in pieces:
            pass
        return JSONResponse(answer.body())

    async def begin() -> Response:
        stream = stream_events(answer, await anext(pieces), pieces)
        return StreamingResponse(stream, media_type="text/event-stream", headers=NO_CACHE)

    return await unless_disconnected(request, begin() if answer.request.stream else finish())


async def stream_events(
    answer: GeneratedAnswer, first: tuple[Delta, list[int]], rest: AsyncGenerator[tuple[Delta, list[int]]]
) -> AsyncIterator[str]:
    """Yield the events of an answer whose first piece is ready."""
    async with aclosing(rest):
        try:
            yield answer.chunk(*first, first=True)
            async for delta, ids in rest:
                if delta or (ids and answer.request.return_token_ids):
                    yield answer.chunk(delta, ids)
            yield answer.chunk(Delta(), [], finish=answer.finish_reason)
            yield answer.last_chunk()
        except ApiError as error:
            yield server_sent_event(error.content())


class ClientDisconnected(Exception):
    """The client disconnected."""


async def unless_disconnected(request: Request, work: Coroutine[None, None, T]) -> T:
    """Await `work`; cancel it and raise ClientDisconnected as soon as the client disconnects."""

    async def wait_for_hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(wait_for_hang_up())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
