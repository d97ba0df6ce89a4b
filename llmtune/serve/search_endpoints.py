"""Endpoints with the requests and responses of other servers.

`/v1/embeddings` is OpenAI's, with `input_type` for queries and documents; `/v1/rerank` that of Cohere, Jina and vLLM.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmtune.data.search_rows import EmbedRow, RerankRow, named_texts, passage_text
from llmtune.evaluate.ranking_metrics import unit
from llmtune.records import Row
from llmtune.serve.engine import Engine
from llmtune.serve.generation_endpoints import in_text_thread, run_job, served_by_name, unless_disconnected
from llmtune.serve.request_queue import AnswerJob, End
from llmtune.serve.schemas import ApiError, FilledText, PositiveInt, RequestModel
from llmtune.serve.served_model import ServedModel
from llmtune.tasks.classify import tokenize_texts
from llmtune.tasks.rerank import RerankPrediction, pair_rows
from llmtune.tasks.sentence_vectors import embed_section, tokenize_prompted

MOST_TEXTS = 2048
"""Texts per request, as in OpenAI's API."""
MOST_DOCUMENTS = 1000
"""Documents per request, as in Cohere's API."""
RERANK_PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
"""Paths of the endpoint: Cohere's second client asks `/v2/rerank`, and vLLM has all three."""


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


class TextUsage(BaseModel):
    """Tokens that the model read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: TextUsage


class DocumentObject(RequestModel):
    """A document with its text, and an optional title, as fields."""

    text: Annotated[str, Field(pattern=r"\S")]
    title: str | None = None
    """Read before the text, as in training rows."""


class RerankRequest(RequestModel):
    """`POST /v1/rerank`."""

    model: str | None = None
    """A name of `/v1/models`; default: the first one."""
    query: FilledText
    """The query to rank the documents for."""
    documents: Annotated[list[FilledText | DocumentObject], Field(min_length=1, max_length=MOST_DOCUMENTS)]
    """Texts, or objects with `text` and optional `title`. Query and document are cut at `data.max_length` together."""
    top_n: PositiveInt | None = None
    """Number of results; default: all documents."""
    return_documents: bool | None = None
    """Whether results have the text of their document; default: true."""


class RankedDocument(BaseModel):
    """A document with its place in the request."""

    index: int
    relevance_score: float = Field(description="Probability that the document is relevant.")
    document: DocumentObject | None = None


class RerankResponse(BaseModel):
    """The documents, best first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: TextUsage


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
    inputs = [{"passages": json.dumps(texts)}] if body.input_type == "document" else [{"prompt": one} for one in texts]
    rows = [served.task.make_row(given) for given in inputs]
    tokens = await in_text_thread(count_text_tokens, served, rows)
    found = await asyncio.gather(*(predict_row(engine, served, row) for row in rows))
    vectors = [vector for one in found for vector in one.values()]
    data = [Embedding(index=i, embedding=write_vector(vector, served, body)) for i, vector in enumerate(vectors)]
    usage = TextUsage(prompt_tokens=tokens, total_tokens=tokens)
    return EmbeddingsResponse(data=data, model=served.name, usage=usage)


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
    named = [one for row in rows for one in named_texts(row)]
    return sum(len(tokenize_prompted(*one, served.processor, served.recipe, limit)) for one in named)


def mount_rerank(app: FastAPI, engine: Engine) -> None:
    """Add the endpoint to `app`."""

    async def rank_documents(body: RerankRequest, request: Request) -> Response:
        """Rank documents for a query; scores equal those of `llmtune generate`."""
        answer = await unless_disconnected(request, rank_request(engine, served_by_name(engine, body.model), body))
        return JSONResponse(answer.model_dump(exclude_none=True))

    for path in RERANK_PATHS:
        add = app.post(
            path,
            response_model=RerankResponse,
            response_model_exclude_none=True,
            include_in_schema=path == RERANK_PATHS[0],
        )
        add(rank_documents)


async def rank_request(engine: Engine, served: ServedModel, body: RerankRequest) -> RerankResponse:
    """Score the documents of a request, and return the best ones."""
    texts = [
        document if isinstance(document, str) else passage_text(document.model_dump()) for document in body.documents
    ]
    row: RerankRow = {"query": body.query, "passages": texts, "relevances": []}
    tokens = await in_text_thread(pair_tokens, served, row)
    scored: RerankPrediction = await predict_row(engine, served, {**row})
    shown = body.return_documents is not False
    results = [
        RankedDocument(
            index=i,
            relevance_score=scored["scores"][i],
            document=DocumentObject(text=texts[i]) if shown else None,
        )
        for i in scored["ranking"][: body.top_n]
    ]
    usage = TextUsage(prompt_tokens=tokens, total_tokens=tokens)
    return RerankResponse(id=f"rerank-{secrets.token_hex(12)}", model=served.name, results=results, usage=usage)


def pair_tokens(served: ServedModel, row: RerankRow) -> int:
    """Return the number of tokens of all pairs, after truncation."""
    examples = tokenize_texts(pair_rows([row]), served.processor, served.recipe.data.max_length)
    return sum(len(example.input_ids) for example in examples)


async def predict_row(engine: Engine, served: ServedModel, row: Row) -> Any:
    """Return the model's prediction for a row."""
    prediction: object = None
    async for event in run_job(engine, AnswerJob(served, row=row)):
        assert isinstance(event, End), "these models generate no tokens"
        prediction = event.prediction
    return prediction


OWN_ENDPOINTS: Mapping[str, Callable[[FastAPI, Engine], None]] = {
    "/v1/embeddings": mount_embeddings,
    "/v1/rerank": mount_rerank,
}
