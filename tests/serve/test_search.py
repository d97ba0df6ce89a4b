"""Search endpoints: vectors and scores of sentence-transformers, at most one job per request, and bounded work."""

import threading
import time
import warnings
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from support.families import build_bert
from support.pairs import run_recipe
from support.runs import invoke
from support.serving import load_served, serving, serving_engine, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sentence_transformers import CrossEncoder, SentenceTransformer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone")
ROWS = [
    {"query": f"number {i} {THINGS[i % 8]}", "passage": f"The {THINGS[i % 8]} number {i} is red."} for i in range(40)
]
RANKED = [
    {"query": row["query"], "passages": [row["passage"], ROWS[i - 1]["passage"]], "relevances": [1, 0]}
    for i, row in enumerate(ROWS)
]
PROMPTS = {"query_prompt": "red red: ", "passage_prompt": "passage: "}
QUICK: dict[str, Any] = {
    "generation": {"max_new_tokens": None},
    "train": {"max_steps": 2, "num_train_epochs": None},
}
LONG = "The red cat sits by the river. " * 30
DOCUMENT = {"input_type": "document"}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with prompts, on rows of at most 32 tokens."""
    folder = tmp_path_factory.mktemp("embed")
    base = build_bert(folder / "model")
    run_recipe(folder, base, ROWS, "embed", data={"max_length": 32}, embed=PROMPTS, **QUICK)
    assert invoke("deploy", "merge", folder / "run").exit_code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pairs of at most 32 tokens, cut if they are longer."""
    folder = tmp_path_factory.mktemp("rerank")
    data = {"max_length": 32, "on_overlong": "truncate", "test": 0.25}
    run_recipe(folder, build_bert(folder / "model"), RANKED, "rerank", data=data, **QUICK)
    assert invoke("deploy", "merge", folder / "run").exit_code == 0
    return folder / "run"


@pytest.mark.promise("task", "served", place="embed", equal="vectors of sentence-transformers, within 1e-5 in float32")
def test_served_vectors_equal_those_of_sentence_transformers(embedder: Path) -> None:
    """Those of short and of cut texts, of queries and of documents."""
    theirs = SentenceTransformer(str(embedder / "merged"), device="cpu", local_files_only=True)
    texts = ["the red cat", LONG, "a house", "  two  spaces "]
    with serving(*load_served(mine=embedder).values()) as url:
        for kind, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
            body = {"input": texts, "input_type": kind, "truncate": True}
            answer = httpx.post(f"{url}/v1/embeddings", json=body).json()
            vectors = [one["embedding"] for one in answer["data"]]
            np.testing.assert_allclose(vectors, encode(texts), atol=1e-5)
            assert answer["truncated"] == [1]
            assert answer["usage"]["prompt_tokens"] == 32 + sum(
                len(
                    theirs.tokenizer(PROMPTS["query_prompt" if kind == "query" else "passage_prompt"] + text)[
                        "input_ids"
                    ]
                )
                for text in texts
                if text != LONG
            )


@pytest.mark.promise("task", "served", place="rerank", equal="scores of CrossEncoder, within 1e-5 in float32")
def test_served_scores_equal_those_of_cross_encoder(reranker: Path) -> None:
    """Those of short and of cut pairs."""
    theirs = CrossEncoder(str(reranker / "merged"), device="cpu", max_length=32)
    texts = ["The red cat.", LONG, "A house."]
    with serving(*load_served(mine=reranker).values()) as url:
        for query, truncated in (("number 4 cat", [1]), (LONG, [0, 1, 2])):
            answer = httpx.post(f"{url}/v1/rerank", json={"query": query, "documents": texts}).json()
            scores = {one["index"]: one["relevance_score"] for one in answer["results"]}
            expected = theirs.predict([(query, text) for text in texts])
            np.testing.assert_allclose([scores[i] for i in range(3)], expected, atol=1e-5)
            assert answer["truncated"] == truncated
        refused = httpx.post(f"{url}/v1/rerank", json={"query": "x", "documents": texts, "truncate": False})
        assert refused.status_code == 400
        assert "documents.1 has more than 32 tokens with the query" in refused.json()["error"]["message"]


def test_the_openai_client_gets_the_most_texts_of_a_request_from_an_idle_server(embedder: Path) -> None:
    texts = [f"number {i} {THINGS[i % 8]}" for i in range(2048)]
    theirs = SentenceTransformer(str(embedder / "merged"), device="cpu", local_files_only=True)
    served = load_served(mine=embedder).values()
    with (
        serving(*served, max_queue=2) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        found = client.embeddings.create(model="mine", input=texts, extra_body=DOCUMENT)
        with pytest.raises(BadRequestError, match=r"input: .*at most 2048 items"):
            client.embeddings.create(model="mine", input=[*texts, "one more"], extra_body=DOCUMENT)
    vectors = np.array([one.embedding for one in found.data])
    np.testing.assert_allclose(vectors[::97], theirs.encode_document(texts[::97]), atol=1e-5)


@pytest.mark.needs("langchain_openai")
def test_langchain_gets_the_vectors_of_documents_and_queries(embedder: Path) -> None:
    """It sends 1,000 texts at a time, and base64 is its client's format."""
    import langchain_openai as langchain

    theirs = SentenceTransformer(str(embedder / "merged"), device="cpu", local_files_only=True)
    texts = [f"number {i} {THINGS[i % 8]}" for i in range(1001)]
    with serving(*load_served(mine=embedder).values()) as url:
        common = {"model": "mine", "base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}
        common |= {"check_embedding_ctx_length": False}
        documents, queries = (
            langchain.OpenAIEmbeddings(**common, model_kwargs={"extra_body": {"input_type": kind}})
            for kind in ("document", "query")
        )
        found = documents.embed_documents(texts)
        assert len(found) == 1001
        np.testing.assert_allclose(found[::50], theirs.encode_document(texts[::50]), atol=1e-5)
        np.testing.assert_allclose(queries.embed_query("the cat"), theirs.encode_query("the cat"), atol=1e-5)
        with pytest.raises(BadRequestError, match="Send input_type: query or document"):
            langchain.OpenAIEmbeddings(**common).embed_query("the cat")
        with pytest.raises(BadRequestError, match=r"input.0 has more than 32 tokens.* send truncate: true"):
            documents.embed_documents([LONG])


def test_token_ids_that_langchain_sends_by_default_are_refused_with_its_option(embedder: Path) -> None:
    with serving(*load_served(mine=embedder).values()) as url:
        for tokens in ([5, 6], [[5, 6], [7]]):
            refused = httpx.post(f"{url}/v1/embeddings", json={"input": tokens, **DOCUMENT})
            assert refused.status_code == 400
            assert "in LangChain, set check_embedding_ctx_length=False" in refused.json()["error"]["message"]


def test_texts_need_no_input_type_if_the_model_has_one_prompt_for_all(embedder: Path) -> None:
    (served, *_) = load_served(mine=embedder).values()
    section = served.recipe.embed.model_copy(update={"passage_prompt": PROMPTS["query_prompt"]})
    served.recipe = served.recipe.model_copy(update={"embed": section})
    with serving(served) as url:
        plain, stated = (
            httpx.post(f"{url}/v1/embeddings", json={"input": "a cat", **more}).json()["data"]
            for more in ({}, DOCUMENT)
        )
    assert plain == stated


def test_a_long_query_is_read_once_for_many_documents_and_others_are_answered_meanwhile(reranker: Path) -> None:
    """A body of 1 MB took gigabytes and minutes; the scores are those of the start of the query."""
    documents = [f"the cat {i}" for i in range(300)]
    answers: dict[str, Any] = {}
    with serving(*load_served(mine=reranker).values()) as url:

        def ask(name: str, query: str) -> None:
            answers[name] = httpx.post(f"{url}/v1/rerank", json={"query": query, "documents": documents}, timeout=60)

        started = time.monotonic()
        long = threading.Thread(target=ask, args=("long", "red cat " * 120_000))
        long.start()
        other = httpx.post(f"{url}/v1/rerank", json={"query": "x", "documents": ["a", "b"]}, timeout=60)
        meanwhile = time.monotonic() - started
        long.join()
        seconds = time.monotonic() - started
        ask("short", "red cat " * 40)
    assert (other.status_code, answers["long"].status_code) == (200, 200)
    assert answers["long"].json()["results"] == answers["short"].json()["results"]
    assert seconds < 30, "each document used to cost a second"
    assert meanwhile < seconds


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/embeddings"])
def test_a_request_ends_when_its_client_leaves(path: str, reranker: Path, embedder: Path) -> None:
    texts = [f"{THINGS[i % 8]} {i} " * 8 for i in range(300)]
    body = (
        {"query": "x", "documents": texts} if path == "/v1/rerank" else {"input": texts, "truncate": True, **DOCUMENT}
    )
    (served, *_) = load_served(mine=reranker if path == "/v1/rerank" else embedder).values()
    predict, sizes = served.task.predict, list[int]()

    def counted(rows: Any, loaded: Any) -> Any:
        sizes.append(len(rows))
        time.sleep(0.3)
        return predict(rows, loaded)

    object.__setattr__(served.task, "predict", counted)
    try:
        with serving_engine(served) as (url, engine):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}{path}", json=body, timeout=0.5)
            wait_until(lambda: engine.requests == 0)
            assert httpx.post(f"{url}{path}", json=body | {"model": "mine"}, timeout=60).status_code == 200
    finally:
        object.__delattr__(served.task, "predict")
    assert 300 < sum(sizes) < 600, "the first request was not predicted to its end"


def test_documents_times_query_are_bounded(reranker: Path) -> None:
    (served, *_) = load_served(mine=reranker).values()
    served.recipe = served.recipe.model_copy(
        update={"data": served.recipe.data.model_copy(update={"max_length": 4096})}
    )
    with serving(served) as url:
        body = {"query": "red cat " * 2000, "documents": ["a cat"] * 600}
        refused = httpx.post(f"{url}/v1/rerank", json=body, timeout=60)
    assert refused.status_code == 400
    assert "a request may have 524,288. Send fewer documents, or a shorter query." in refused.json()["error"]["message"]
