"""`/v1/embeddings`: OpenAI's request and response, with `input_type` for queries and documents."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Literal, cast

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmtune.data.search_rows import EmbedRow, text_names, texts_of
from llmtune.evaluate.vector_search import Vectors, unit
from llmtune.serve.engine import Engine
from llmtune.serve.generation_endpoints import in_text_thread, run_job, served_by_name, unless_disconnected
from llmtune.serve.request_queue import AnswerJob, End
from llmtune.serve.schemas import ApiError, FilledText, PositiveInt, RequestModel
from llmtune.serve.served_model import ServedModel
from llmtune.tasks.embed import embed_section, tokenize_prompted

MOST_TEXTS = 2048
"""Texts per request, as in OpenAI's API."""


class EmbeddingsRequest(RequestModel):
    """`POST /v1/embeddings`."""

    model: str | None = None
    """A name of `/v1/models`; default: the first one."""
    input: FilledText | Annotated[list[FilledText], Field(min_length=1, max_length=MOST_TEXTS)]
    """A text or several, each truncated at the recipe's `data.max_length`."""
    input_type: Literal["query", "document"] | None = None
    """Which of the model's prompts is put before each text; default: query. (Not in OpenAI's API.)"""
    dimensions: PositiveInt | None = None
    """Length of the vectors: one of the recipe's `embed.dimensions`; default: the longest."""
    encoding_format: Literal["float", "base64"] | None = None
    """Numbers, or base64 of 32-bit floats; default: float."""
    user: str | None = None
    """The end user: accepted, but not stored."""

    @field_validator("input", mode="before")
    @classmethod
    def refuse_tokens(cls, value: object) -> object:
        """Refuse token ids, which OpenAI's API accepts: clients make them with OpenAI's tokenizers."""
        if isinstance(value, list) and any(isinstance(one, int | list) for one in value):
            raise ValueError("token ids are not accepted, because they depend on the tokenizer; send texts")
        return value


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    """Tokens that the model read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


def mount_embeddings(app: FastAPI, engine: Engine) -> None:
    """Add the endpoint to `app`."""

    @app.post("/v1/embeddings", response_model=EmbeddingsResponse)
    async def make_embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Turn texts into vectors; they equal those of `llmtune generate`."""
        answer = await unless_disconnected(request, embed(engine, served_by_name(engine, body.model), body))
        return JSONResponse(answer.model_dump())


async def embed(engine: Engine, served: ServedModel, body: EmbeddingsRequest) -> EmbeddingsResponse:
    """Return the vectors of a request."""
    known = embed_section(served.recipe).dimensions or ()
    if body.dimensions is not None and body.dimensions not in known:
        fix = f"Use one of {', '.join(map(str, known))}." if known else "Omit it."
        raise ApiError(400, f"The model was not trained for {body.dimensions} dimensions. {fix}", param="dimensions")
    texts = [body.input] if isinstance(body.input, str) else body.input
    rows: list[EmbedRow] = (
        [make_row([], texts)] if body.input_type == "document" else [make_row([one]) for one in texts]
    )
    tokens = await in_text_thread(count_text_tokens, served, rows)
    found = await asyncio.gather(*(ask(engine, served, row) for row in rows))
    vectors = [vector for one in found for vector in one.values()]
    data = [Embedding(index=i, embedding=write_vector(vector, served, body)) for i, vector in enumerate(vectors)]
    usage = EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens)
    return EmbeddingsResponse(data=data, model=served.name, usage=usage)


def make_row(queries: list[str], passages: list[str] | None = None) -> EmbedRow:
    """Return the row of at most one query, and passages."""
    query = queries[0] if queries else None
    return {"query": query, "passages": passages or [], "negatives": [], "score": None, "label": None}


async def ask(engine: Engine, served: ServedModel, row: EmbedRow) -> Vectors:
    """Return the vectors of a row."""
    vectors: Vectors = {}
    async for event in run_job(engine, AnswerJob(served, row={**row})):
        assert isinstance(event, End), "vectors have no tokens"
        vectors = cast(Vectors, event.prediction)
    return vectors


def write_vector(vector: list[float], served: ServedModel, body: EmbeddingsRequest) -> list[float] | str:
    """Return a vector in the requested length and encoding; a shortened one is normalised again if the model's are."""
    if body.dimensions is not None:
        vector = vector[: body.dimensions]
        vector = unit(vector).tolist() if embed_section(served.recipe).normalize else vector
    if body.encoding_format == "base64":
        return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
    return vector


def count_text_tokens(served: ServedModel, rows: list[EmbedRow]) -> int:
    """Return the number of tokens of all texts, after truncation."""
    limit = served.recipe.data.max_length
    named = [pair for row in rows for pair in zip(text_names(row), texts_of(row), strict=True)]
    return sum(len(tokenize_prompted(name, text, served.processor, served.recipe, limit)) for name, text in named)
