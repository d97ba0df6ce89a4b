"""`/v1/rerank`: the request and response of Cohere and Jina, as vLLM and other servers have them."""

from __future__ import annotations

import secrets
from typing import Annotated, cast

from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmtune.data.search_rows import RerankRow, passage_text
from llmtune.serve.engine import Engine
from llmtune.serve.generation_endpoints import in_text_thread, run_job, served_by_name, unless_disconnected
from llmtune.serve.request_queue import AnswerJob, End
from llmtune.serve.schemas import FilledText, PositiveInt, RequestModel
from llmtune.serve.served_model import ServedModel
from llmtune.tasks.classify import tokenize_texts
from llmtune.tasks.rerank import RerankPrediction, pair_rows

MOST_DOCUMENTS = 1000
"""Documents per request, as in Cohere's API."""
PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
"""Paths of the endpoint: Cohere's second client asks `/v2/rerank`, and vLLM has all three."""


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


class RerankUsage(BaseModel):
    """Tokens that the model read."""

    prompt_tokens: int
    total_tokens: int


class RerankResponse(BaseModel):
    """The documents, best first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: RerankUsage


def mount_rerank(app: FastAPI, engine: Engine) -> None:
    """Add the endpoint to `app`."""

    async def rank_documents(body: RerankRequest, request: Request) -> Response:
        """Rank documents for a query; scores equal those of `llmtune generate`."""
        answer = await unless_disconnected(request, rank_request(engine, served_by_name(engine, body.model), body))
        return JSONResponse(answer.model_dump(exclude_none=True))

    for path in PATHS:
        add = app.post(
            path,
            response_model=RerankResponse,
            response_model_exclude_none=True,
            include_in_schema=path == PATHS[0],
        )
        add(rank_documents)


async def rank_request(engine: Engine, served: ServedModel, body: RerankRequest) -> RerankResponse:
    """Score the documents of a request, and return the best ones."""
    texts = [
        document if isinstance(document, str) else passage_text(document.model_dump()) for document in body.documents
    ]
    row: RerankRow = {"query": body.query, "passages": texts, "relevances": []}
    tokens = await in_text_thread(pair_tokens, served, row)
    scored: RerankPrediction = {"scores": [], "ranking": []}
    async for event in run_job(engine, AnswerJob(served, row={**row})):
        assert isinstance(event, End), "a reranker generates no tokens"
        scored = cast(RerankPrediction, event.prediction)
    shown = body.return_documents is not False
    results = [
        RankedDocument(
            index=i,
            relevance_score=scored["scores"][i],
            document=DocumentObject(text=texts[i]) if shown else None,
        )
        for i in scored["ranking"][: body.top_n]
    ]
    usage = RerankUsage(prompt_tokens=tokens, total_tokens=tokens)
    return RerankResponse(id=f"rerank-{secrets.token_hex(12)}", model=served.name, results=results, usage=usage)


def pair_tokens(served: ServedModel, row: RerankRow) -> int:
    """Return the number of tokens of all pairs, after truncation."""
    examples = tokenize_texts(pair_rows([row]), served.processor, served.recipe.data.max_length)
    return sum(len(example.input_ids) for example in examples)
