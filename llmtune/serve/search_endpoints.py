"""Endpoints with the requests and responses of other servers.

`/v1/embeddings` is OpenAI's, with `input_type` for queries and documents; `/v1/rerank` that of Cohere, Jina and vLLM.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, cast

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmtune.data.long_texts import count_tokens
from llmtune.data.rejected_rows import passage_text
from llmtune.evaluate.ranking_metrics import unit
from llmtune.evaluate.token_batches import TOKEN_BUDGET, batch_size, budget_for
from llmtune.model.sentence_folder import SentenceSettings
from llmtune.records import Row
from llmtune.serve.engine import Engine, predict_parts
from llmtune.serve.generation_endpoints import in_text_thread, served_by_name, unless_disconnected
from llmtune.serve.schemas import ApiError, FilledText, PositiveInt, RequestModel
from llmtune.serve.served_model import ServedModel

MOST_TEXTS = 2048
"""Texts per request, as in OpenAI's API."""
MOST_DOCUMENTS = 1000
"""Documents per request, as in Cohere's API."""
MOST_TOKENS = 1 << 19
"""Tokens of all pairs of a request, as many as texts of 2 MiB have: the query is read again with each document."""
RERANK_PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
"""Cohere's second client asks `/v2/rerank`, and vLLM has all three."""


class EmbeddingsRequest(RequestModel):
    """`POST /v1/embeddings`."""

    model: str | None = None
    """A name of `/v1/models`; default: the first one."""
    input: FilledText | Annotated[list[FilledText], Field(min_length=1, max_length=MOST_TEXTS)]
    """A text or several, each of at most the recipe's `data.max_length` tokens."""
    input_type: Literal["query", "document"] | None = None
    """Which of the model's prompts is put before each text; required if they differ. (Not in OpenAI's API.)"""
    truncate: bool | None = None
    """Whether longer texts are cut; if not, they are refused. Default: as the recipe's `data.on_overlong` says. (Not in
    OpenAI's API.)"""
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
            raise ValueError(
                "token ids are not accepted, because they depend on the tokenizer. Send texts; in LangChain, set "
                "check_embedding_ctx_length=False"
            )
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
    truncated: list[int] | None = None
    """Indexes of the texts that were cut; absent if none was. (Not in OpenAI's API.)"""


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
    """Texts, or objects with `text` and optional `title`. Query and document have `data.max_length` tokens together."""
    top_n: PositiveInt | None = None
    """Number of results; default: all documents."""
    return_documents: bool | None = None
    """Whether results have the text of their document; default: true."""
    truncate: bool | None = None
    """Whether longer pairs are cut; if not, they are refused. Default: as the recipe's `data.on_overlong` says."""


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
    truncated: list[int] | None = None
    """Indexes of the documents that were cut, or whose query was; absent if none was."""


def mount_embeddings(app: FastAPI, engine: Engine) -> None:
    """Add the endpoint to `app`."""

    @app.post("/v1/embeddings", response_model=EmbeddingsResponse)
    async def make_embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Turn texts into vectors; they equal those of `llmtune generate`."""
        answer = await unless_disconnected(request, embed(engine, served_by_name(engine, body.model), body))
        return JSONResponse(answer.model_dump(exclude_none=True))


async def embed(engine: Engine, served: ServedModel, body: EmbeddingsRequest) -> EmbeddingsResponse:
    """Return the vectors of a request."""
    settings, limit = settings_of(served), served.recipe.data.max_length
    sizes = settings.dimensions
    if body.dimensions is not None and body.dimensions not in sizes:
        fix = f"Use one of {', '.join(map(str, sizes))}." if sizes else "Omit it."
        raise ApiError(400, f"The model was not trained for {body.dimensions} dimensions. {fix}", param="dimensions")
    prompt = settings.prompt_of(choose_type(body, settings))
    texts = [body.input] if isinstance(body.input, str) else body.input
    lengths = await in_text_thread(lambda: [count_tokens(prompt + text, served.processor, limit) for text in texts])
    truncated = find_truncated(lengths, served, body.truncate, "input")
    inputs = [{"passages": json.dumps([text])} if body.input_type == "document" else {"prompt": text} for text in texts]
    predicted = await predict_request(engine, served, [served.task.make_row(given) for given in inputs], lengths)
    vectors = [vector for one in predicted for vector in one.values()]
    data = [Embedding(index=i, embedding=write_vector(vector, served, body)) for i, vector in enumerate(vectors)]
    usage = count_usage(lengths, limit)
    return EmbeddingsResponse(data=data, model=served.name, usage=usage, truncated=truncated or None)


def settings_of(served: ServedModel) -> SentenceSettings:
    """Return how a model that makes vectors makes them."""
    settings = served.task.sentence_settings(served.recipe)
    assert settings is not None
    return settings


def choose_type(body: EmbeddingsRequest, settings: SentenceSettings) -> str:
    """Return whether the texts are queries or documents.

    Raises ApiError if the request does not say so, and the model has a prompt for each.
    """
    query, document = (settings.prompt_of(name) for name in ("query", "document"))
    if body.input_type is None and query != document:
        message = (
            f"The model reads {query!r} before queries and {document!r} before documents. Send input_type: query or "
        )
        message += 'document; in OpenAI\'s client, extra_body={"input_type": "document"}.'
        raise ApiError(400, message, param="input_type")
    return body.input_type or "query"


def find_truncated(
    lengths: Sequence[int], served: ServedModel, truncate: bool | None, param: str, together: str = ""
) -> list[int]:
    """Return the indexes of inputs that are longer than the model reads; raises ApiError unless they may be cut."""
    data = served.recipe.data
    longer = [i for i, length in enumerate(lengths) if length > data.max_length]
    if longer and not (data.on_overlong == "truncate" if truncate is None else truncate):
        more = f", as have {len(longer) - 1} others" if len(longer) > 1 else ""
        message = (
            f"{param}.{longer[0]} has more than {data.max_length} tokens{together}, the length that the model was "
        )
        message += f"trained for{more}. Shorten the texts, or send truncate: true."
        raise ApiError(400, message, param=f"{param}.{longer[0]}", code="context_length_exceeded")
    return longer


def count_usage(lengths: Sequence[int], limit: int) -> TextUsage:
    """Return the number of tokens that the model read."""
    tokens = sum(min(limit, length) for length in lengths)
    return TextUsage(prompt_tokens=tokens, total_tokens=tokens)


def write_vector(vector: list[float], served: ServedModel, body: EmbeddingsRequest) -> list[float] | str:
    """Return a vector in the requested length and encoding; a shortened one is normalised again if the model's are."""
    if body.dimensions is not None:
        vector = vector[: body.dimensions]
        vector = unit(vector).tolist() if settings_of(served).normalize else vector
    if body.encoding_format == "base64":
        return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
    return vector


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
    lengths = await in_text_thread(count_pairs, served, body.query, texts)
    usage = count_usage(lengths, served.recipe.data.max_length)
    if usage.total_tokens > MOST_TOKENS:
        message = (
            f"{len(texts):,} documents, each with the query, have {usage.total_tokens:,} tokens; a request may have "
        )
        message += f"{MOST_TOKENS:,}. Send fewer documents, or a shorter query."
        raise ApiError(400, message, param="documents", code="request_too_large")
    truncated = find_truncated(lengths, served, body.truncate, "documents", " with the query")
    rows: list[Row] = [{"query": body.query, "passages": [text], "relevances": []} for text in texts]
    scores = [one["scores"][0] for one in await predict_request(engine, served, rows, lengths)]
    shown = body.return_documents is not False
    results = [
        RankedDocument(
            index=i,
            relevance_score=scores[i],
            document=DocumentObject(text=texts[i]) if shown else None,
        )
        for i in sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]
    ]
    name = f"rerank-{secrets.token_hex(12)}"
    return RerankResponse(id=name, model=served.name, results=results, usage=usage, truncated=truncated or None)


def count_pairs(served: ServedModel, query: str, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of the query with each text; of long pairs, some number above `data.max_length`."""
    processor, limit = served.processor, served.recipe.data.max_length
    first, *others = (count_tokens(text, processor, limit, add_special_tokens=False) for text in (query, *texts))
    special = processor.num_special_tokens_to_add(pair=True)
    return [first + other + special for other in others]


async def predict_request(
    engine: Engine, served: ServedModel, rows: Sequence[Row], lengths: Sequence[int]
) -> list[dict[str, list[float]]]:
    """Return the model's prediction for each row, made in parts that have rows of similar length."""
    order, parts = sorted(range(len(rows)), key=lambda i: -lengths[i]), list[list[Row]]()
    limit, budget = served.recipe.data.max_length, budget_for(served.device, TOKEN_BUDGET)
    while (first := sum(map(len, parts))) < len(rows):
        size = batch_size(min(limit, lengths[order[first]]), budget)
        parts.append([rows[i] for i in order[first : first + size]])
    predicted = await predict_parts(engine, served, parts)
    values = dict(zip(order, (cast(dict[str, list[float]], one.value) for one in predicted), strict=True))
    return [values[i] for i in range(len(rows))]


OWN_ENDPOINTS: Mapping[str, Callable[[FastAPI, Engine], None]] = {
    "/v1/embeddings": mount_embeddings,
    "/v1/rerank": mount_rerank,
}
