"""Mine negatives among the passages of a split and of `data.corpus`, and estimate how many negatives are false.

Mining follows `mine_hard_negatives` of sentence-transformers with `relative_margin` and the nearest passages, which is
TopK-PercPos of Moreira et al., "NV-Retriever", 2024.

Shapes: Q queries, P passages, D numbers of a vector, K candidates of a query.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from torch.nn import functional

from llmtune import __version__
from llmtune.data.corpus import load_corpus
from llmtune.data.data_notes import negatives_blocks
from llmtune.data.preparation import write_changed
from llmtune.data.row_store import MINED, iterate_rows, iterate_texts, load_rows, read_rows
from llmtune.data.row_text import text_key
from llmtune.display.console import print_blocks, progress_bars, spinner
from llmtune.errors import RecipeError
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.ranking_metrics import RELEVANT, measure_vectors
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.model.config import head_is_new, read_model_config
from llmtune.model.device import compute_context, release_memory, resolve_dtype
from llmtune.model.loading import load_model
from llmtune.model.memory_plan import context_length
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.plan import RunContext
from llmtune.recipe.adapter_section import AdapterSection
from llmtune.recipe.data_section import NegativesSection
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import EmbedSection
from llmtune.records import Advance, Json, ModelRef, Row, Rows
from llmtune.store.atomic_files import hash_value, staged
from llmtune.store.run_lock import package_versions
from llmtune.tasks.embed_settings import infer_rows
from llmtune.tasks.registry import get_task
from llmtune.tasks.sentence_vectors import embed_texts, resolve_settings


@dataclass(frozen=True)
class Pairs:
    """The different queries (Q) of a split to mine for, and all passages that are searched for them."""

    queries: list[str]
    origins: list[str]
    """[Q] where each query's first row is from."""
    passages: list[str]
    right: list[list[int]]
    """[Q] right passages."""
    wrong: list[list[int]]
    """[Q] passages that the rows name as irrelevant."""
    itself: list[int | None]
    """[Q] the passage equal to the query, if any."""


@dataclass(frozen=True)
class Mined:
    """The negatives of each query, the nearest first, and what was skipped."""

    negatives: list[list[int]]
    skipped: int
    """Passages that were too near."""
    nearest: tuple[int, int, int, float, float] | None
    """The query with the nearest skipped passage, that passage, its own passage, and the scores of both."""


def mining_facts(mined: Mapping[str, tuple[Pairs, Mined]], section: NegativesSection) -> Json:
    """Return how much was searched and found over all splits, and the nearest skipped passage of a training query."""
    counts = [len(nearest) for _, result in mined.values() for nearest in result.negatives]
    pairs, result = mined["train"]
    facts: Json = {
        "searched": {split: len(pairs.passages) for split, (pairs, _) in mined.items()},
        "queries": len(counts),
        "negatives": sum(counts),
        "skipped": sum(result.skipped for _, result in mined.values()),
        "short": sum(one < section.mine for one in counts),
        "without": counts.count(0),
        "example": None,
    }
    if result.nearest is not None:
        query, passage, right, score, right_score = result.nearest
        facts["example"] = {
            "query": pairs.queries[query],
            "passage": pairs.passages[right],
            "negative": pairs.passages[passage],
            "origin": pairs.origins[query],
            "passage_score": right_score,
            "negative_score": score,
        }
    return facts


WIDER = 10
"""Candidates per mined negative, as in sentence-transformers: some are too near. It adds two per right passage, and one
for the query itself."""
SCORES = 1 << 26
"""Scores of queries and passages in memory at a time: 256 MB."""
SURVEYED = 512
"""Training rows in the estimate of false negatives."""
NEAR = 0.95
"""A negative is likely right from this share of the score of the query's own passage on."""


def mine_step(run: RunContext, recipe: Recipe, base: ModelRef) -> None:
    """Mine negatives for the rows of a run whose model is `base`; remove those that its recipe no longer mines."""
    data = run.folder.path / "data"
    if recipe.data.negatives is None:
        shutil.rmtree(data / MINED, ignore_errors=True)
        return
    rows, (recipe, miner) = load_rows(data / "rows"), embedder(recipe, base, run.console, run.request.offline)
    with run.step("mine", mining_inputs(rows, recipe, miner), [f"data/{MINED}"]) as step:
        if not step.skipped:
            with staged(data / MINED) as folder:
                step.facts.update(mine_rows(rows, recipe, miner, run.device, folder, run.console))


def survey_step(run: RunContext) -> None:
    """Estimate how many negatives are false, and print it with what was mined; for rows with passages only."""
    plan, rows = run.plan, run.rows
    if plan.recipe.embed is None or plan.recipe.embed.loss != "ranking":
        return
    inputs = hash_value([mining_inputs(rows, plan.recipe, plan.model_ref), plan.recipe.train.batch_size])
    with run.step("survey", inputs) as step:
        if not step.skipped:
            step.facts.update(survey_negatives(rows, plan.recipe, plan.model_ref, plan.device, run.console))
            print_blocks(negatives_blocks(run.folder.facts("mine"), step.facts), run.console)


def mine_rows(rows: Rows, recipe: Recipe, model_ref: ModelRef, device: str, folder: Path, console: Console) -> Json:
    """Write the rows with mined negatives into `folder`; return what was mined, for the report.

    Rows for `embed` get negatives in training, each row those of its query. Rows for `rerank` get them in each split,
    the first row of a query; held-out queries only if they have no irrelevant passage. The passages of the split and
    of `data.corpus` are searched. `recipe` and `model_ref` are those of `embedder`.

    Raises RecipeError if the rows have no passages.
    """
    section, ranks = recipe.data.negatives, "relevances" in next(iterate_rows(rows, "train"))[1]
    assert section is not None, "the recipe mines"
    if not ranks and (kind := infer_rows(rows)) != "passages":
        raise RecipeError.of(f"rows with {kind} have no negatives to mine", "data.negatives", "Remove it.")
    corpus, mined = load_corpus(rows.folder), dict[str, tuple[Pairs, Mined]]()
    searched = {split: collect_pairs(rows, split, corpus) for split in (rows.files if ranks else ("train",))}
    texts = dict.fromkeys(text for pairs in searched.values() for text in pairs.passages)
    place = {text: i for i, text in enumerate(texts)}
    changed = dict[str, Iterator[str]]()
    with open_embedder(recipe, model_ref, device, console) as loaded:
        with progress_bars(console) as progress:
            bar = progress.add_task("mine: read the passages", total=len(texts))
            vectors_PD = embed_unit([(False, text) for text in texts], loaded, lambda done: progress.advance(bar, done))
        for split, pairs in searched.items():
            message = f"mine: {len(pairs.queries):,} queries, {len(pairs.passages):,} passages ({split})"
            console.print(message, highlight=False)
            queries_QD = embed_unit([(True, query) for query in pairs.queries], loaded)
            result = mine(queries_QD, vectors_PD[[place[text] for text in pairs.passages]], pairs, section)
            mined[split] = pairs, result
            negatives = [[pairs.passages[i] for i in nearest] for nearest in result.negatives]
            by_query = dict(zip(map(text_key, pairs.queries), negatives, strict=True))
            changed[split] = map(partial(add_negatives, by_query), (row for _, row in iterate_rows(rows, split)))
    write_changed(rows, changed, folder)
    facts: Json = {"model": model_ref.name, "sha256": model_ref.content_hash, "corpus": len(corpus)}
    facts |= {"mine": section.mine, "below": section.below} | mining_facts(mined, section)
    return facts | ({"test_passages": count_test_passages(rows, *mined["train"])} if corpus else {})


def judged(row: Row) -> Iterator[tuple[str, bool]]:
    """Yield the passages of a row, each with whether it is right."""
    relevances = row.get("relevances") or [1.0] * len(row["passages"])
    yield from ((text, relevance > RELEVANT) for text, relevance in zip(row["passages"], relevances, strict=True))
    yield from ((text, False) for text in row.get("negatives") or ())


def count_test_passages(rows: Rows, searched: Pairs, mined: Mined) -> dict[str, int]:
    """Count the right passages of test queries: all, those searched for training queries, and those mined."""
    right = {text_key(text) for _, row in iterate_rows(rows, "test") for text, is_right in judged(row) if is_right}
    places = {place for nearest in mined.negatives for place in nearest}
    keys = [*map(text_key, searched.passages)]
    return {"all": len(right), "searched": len(right & {*keys}), "mined": len(right & {keys[i] for i in places})}


def embedder(recipe: Recipe, base: ModelRef, console: Console, offline: bool) -> tuple[Recipe, ModelRef]:
    """Return the model that mines, and the recipe by which it turns the rows' texts into vectors.

    Raises:
        RecipeError: the base is a reranker, which has no vectors of single texts.
        EnvironmentProblem: the model that the recipe names is not found.
    """
    stated, section, adapter = recipe.data.negatives, recipe.embed or EmbedSection(), recipe.adapter
    if stated is not None and stated.model is not None:
        base = resolve_model(stated.model, recipe.model, console, offline)
        section, adapter = EmbedSection(), AdapterSection()
    elif recipe.task == "rerank" and not head_is_new(base, recipe, get_task("rerank")):
        what = f"{base.name} scores pairs and has no vectors of single texts"
        raise RecipeError.of(what, "data.negatives", "Name an embedding model: data.negatives.model.")
    config = read_model_config(base, recipe.model)
    section = resolve_settings(section, config)
    reach = context_length(config.get_text_config()) or recipe.data.max_length
    data = recipe.data.model_copy(update={"max_length": min(reach, recipe.data.max_length)})
    update = {"task": "embed", "embed": section, "rerank": None, "adapter": adapter, "data": data}
    return recipe.model_copy(update=update), base


def mining_inputs(rows: Rows, recipe: Recipe, model_ref: ModelRef) -> str:
    """Hash everything that mined negatives depend on; `recipe` and `model_ref` are those of `embedder`."""
    sections = (recipe.data.negatives, recipe.embed, recipe.model, recipe.adapter)
    settings = [recipe.data.max_length, *(one and one.model_dump(mode="json") for one in sections)]
    versions = package_versions(("torch", "transformers"))
    return hash_value([__version__, versions, rows.content_hash, rows.corpus_hash, model_ref.content_hash, settings])


@contextmanager
def open_embedder(recipe: Recipe, model_ref: ModelRef, device: str, console: Console) -> Iterator[LoadedModel]:
    """Load a model as an embedder, and free it at the end."""
    task, processor = get_task("embed"), load_processor(model_ref, recipe.model)
    with spinner(console, f"loading {model_ref.name} as an embedder"):
        selected = load_model(model_ref, recipe, task, processor, device=device, training=False)
    with torch.inference_mode(), compute_context(resolve_dtype(recipe.model.dtype, device), device):
        yield LoadedModel(selected.model, processor, recipe, device)
    del selected
    release_memory()


def embed_unit(
    texts: Sequence[tuple[bool, str]], loaded: LoadedModel, advance: Advance = lambda rows: None
) -> torch.Tensor:
    """Return the vectors [N, D] of texts, each with whether it is a query, scaled to length 1."""
    return functional.normalize(torch.from_numpy(embed_texts(texts, loaded, advance)), dim=-1)


def collect_pairs(rows: Rows, split: str, corpus: Sequence[str]) -> Pairs:
    """Return the queries of a split that have a right passage, and the passages: right, wrong, those of the corpus.

    Held-out queries with a wrong passage need no others.
    """
    firsts: dict[str, tuple[str, str]] = {}
    right: defaultdict[str, dict[str, str]] = defaultdict(dict)
    wrong: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for origin, row in iterate_rows(rows, split):
        query = text_key(row["query"])
        firsts.setdefault(query, (row["query"], origin))
        for passage, is_right in judged(row):
            (right if is_right else wrong)[query].setdefault(text_key(passage), passage)
    passages: dict[str, str] = {}
    for texts in (*right.values(), *wrong.values(), dict(zip(map(text_key, corpus), corpus, strict=True))):
        for key, text in texts.items():
            passages.setdefault(key, text)
    place = {key: i for i, key in enumerate(passages)}
    queries = [query for query in firsts if right[query] and (split == "train" or not wrong[query])]
    right_places, wrong_places = ([[place[key] for key in kind[query]] for query in queries] for kind in (right, wrong))
    itself = [place.get(query) for query in queries]
    first = [firsts[query] for query in queries]
    origins = [origin for _, origin in first]
    return Pairs([text for text, _ in first], origins, [*passages.values()], right_places, wrong_places, itself)


def mine(queries_QD: torch.Tensor, passages_PD: torch.Tensor, pairs: Pairs, section: NegativesSection) -> Mined:
    """Return each query's nearest passages that score at most `below` x the lowest of its right passages."""
    most = max(map(len, pairs.right), default=0)
    limit = min(section.mine * WIDER + 2 * most + 1, len(passages_PD))
    negatives, skipped, nearest = list[list[int]](), 0, None
    step = max(1, SCORES // max(1, len(passages_PD)))
    for start in range(0, len(queries_QD), step):
        scores_QP = queries_QD[start : start + step] @ passages_PD.T
        best_QK, place_QK = scores_QP.topk(limit, dim=1)
        for scores_P, best_K, place_K in zip(scores_QP, best_QK, place_QK, strict=True):
            at = len(negatives)
            right_places = pairs.right[at]
            lowest = min((float(scores_P[place]), place) for place in right_places)
            highest = float(lower(torch.tensor(lowest[0]), section.below))
            judged_places = {*right_places, *pairs.wrong[at], pairs.itself[at]}
            candidates = [
                pair for pair in zip(best_K.tolist(), place_K.tolist(), strict=True) if pair[1] not in judged_places
            ]
            near = [pair for pair in candidates if pair[0] > highest]
            skipped += len(near)
            if near and (nearest is None or near[0][0] - lowest[0] > nearest[3] - nearest[4]):
                nearest = (at, near[0][1], lowest[1], near[0][0], lowest[0])
            negatives.append([place for _, place in candidates[len(near) :][: section.mine]])
    return Mined(negatives, skipped, nearest)


def add_negatives(texts: dict[str, list[str]], row: Row) -> str:
    """Return a row as JSON with the negatives of its query; those of a reranker are taken out of `texts`."""
    if "relevances" in row:
        added = texts.pop(text_key(row["query"]), [])
        row = {**row, "passages": row["passages"] + added, "relevances": row["relevances"] + [0.0] * len(added)}
    else:
        row = {**row, "negatives": row["negatives"] + texts.get(text_key(row["query"]), [])}
    return json.dumps(row, ensure_ascii=False)


# How many negatives look like right passages?


def survey_negatives(rows: Rows, recipe: Recipe, model_ref: ModelRef, device: str, console: Console) -> Json:
    """Estimate, on some training rows, how many negatives the base scores like the right passage.

    Also measures how the vectors of passages are spread. `recipe` is that of `embedder`.
    """
    picked = [*cut_evenly(rows.counts["train"], SURVEYED)]
    sample = read_rows(rows, "train", picked)
    firsts = [row["passages"][0] for row in sample]
    given = [(i, text) for i, row in enumerate(sample) for text in row["negatives"]]
    right: defaultdict[str, set[str]] = defaultdict(set)
    keys, passages = ([text_key(text) for text in texts] for texts in ([row["query"] for row in sample], firsts))
    for key, row in zip(keys, sample, strict=True):
        right[key] |= {key, *map(text_key, row["passages"])}
    with open_embedder(recipe, model_ref, device, console) as loaded:
        queries_RD = embed_unit([(True, row["query"]) for row in sample], loaded)
        passages_RD = embed_unit([(False, text) for text in firsts], loaded)
        given_GD = embed_unit([(False, text) for _, text in given], loaded) if given else None
    scores_RR = queries_RD @ passages_RD.T
    own_R = scores_RR.diagonal()
    other_RR = torch.tensor([[passage not in right[key] for passage in passages] for key in keys])
    kinds = {"other rows’ passages": count_near(scores_RR, own_R[:, None], other_RR)}
    gaps_RR = (scores_RR - own_R[:, None]).masked_fill(~other_RR, -torch.inf)
    query, place = divmod(int(gaps_RR.argmax()), len(sample))
    nearest, negative = float(gaps_RR[query, place]), firsts[place]
    if given_GD is not None:
        row_G = torch.tensor([i for i, _ in given])
        scores_G, own_G = (queries_RD[row_G] * given_GD).sum(1), own_R[row_G]
        name = "mined, and given in the rows" if recipe.data.negatives else "given in the rows"
        kinds[name] = count_near(scores_G, own_G, torch.ones_like(own_G, dtype=torch.bool))
        best = int((scores_G - own_G).argmax())
        if float(scores_G[best] - own_G[best]) > nearest:
            query, negative, nearest = *given[best], float(scores_G[best] - own_G[best])
    near_RR = other_RR & (scores_RR >= lower(own_R)[:, None])
    share_R = near_RR.sum(1) / other_RR.sum(1).clamp_min(1)
    right_score = float(own_R[query])
    cosine, rank = measure_vectors(passages_RD.double().numpy())
    return {
        "rows": len(sample),
        "below": NEAR,
        "kinds": kinds,
        "queries": float((1 - (1 - share_R.double()) ** (recipe.train.batch_size - 1)).sum()),
        "batch_size": recipe.train.batch_size,
        "random_cosine": cosine,
        "effective_rank": rank,
        "example": {
            "query": sample[query]["query"],
            "passage": firsts[query],
            "negative": negative,
            "passage_score": right_score,
            "negative_score": right_score + nearest,
            "origin": next(islice(iterate_texts(rows, "train"), picked[query], None))[0],
        }
        if nearest >= float(lower(own_R[query])) - right_score
        else None,
    }


def lower(scores: torch.Tensor, below: float = NEAR) -> torch.Tensor:
    """Return scores lowered to a share of them; also if they are negative."""
    return scores - scores.abs() * (1 - below)


def count_near(scores: torch.Tensor, right_scores: torch.Tensor, counted: torch.Tensor) -> dict[str, int]:
    """Count the pairs that score like the query's own passage or higher."""
    near, nearer = counted & (scores >= lower(right_scores)), counted & (scores > right_scores)
    return {"pairs": int(counted.sum()), "near": int(near.sum()), "nearer": int(nearer.sum())}
