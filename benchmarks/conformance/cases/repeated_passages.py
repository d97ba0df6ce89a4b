"""A passage that several rows of a query name is one passage of its ranking."""

from collections import defaultdict
from operator import itemgetter

from conformance.case import Case, Finding

RELEVANT = {
    "Which colour is the sky?": "The sky is blue.",
    "How many legs has a cat?": "A cat has four legs.",
    "Is a fox a bird?": "A fox is no bird.",
    "What is 2 + 3?": "Two and three are five.",
}
OTHERS = ["Paris is a city.", "Red fish swim.", "One, two, three.", "The dog thinks."]


SPELLINGS = {"first": itemgetter(0), "last": itemgetter(-1), "best": max}
"""Which score a passage has, if the model scores its spellings differently: a tool may use any of them."""


def recall_at_one(rankings, entries_of):
    """Return the share of relevant passages in first place; `entries_of` makes entries of the scored rows."""
    shares = []
    for scored in rankings:
        entries = entries_of(scored)
        _, first = max(entries, key=itemgetter(0))
        shares.append(first / sum(relevant for _, relevant in entries))
    return sum(shares) / len(shares)


def once(choose):
    """Return a function that makes one entry of each passage, with the score that `choose` takes of its spellings."""

    def entries_of(scored):
        scores, relevance = defaultdict(list), {}
        for passage, score, relevant in scored:
            scores[passage.strip()].append(score)
            relevance[passage.strip()] = relevant
        return [(choose(scores[passage]), relevant) for passage, relevant in relevance.items()]

    return entries_of


def each_row(scored):
    return [(score, relevant) for _, score, relevant in scored]


def each_spelling(scored):
    return list({passage: (score, relevant) for passage, score, relevant in scored}.values())


MISTAKES = {"a passage counted for each row": each_row, "a passage counted for each spelling": each_spelling}


def judge(case, reference, results):
    """The tool's own scores give the ranking; a query has one relevant passage."""
    [result] = results.values()
    reported, rankings = result.found["recall@1"], result.found["rankings"]
    exact = {name: recall_at_one(rankings, once(choose)) for name, choose in SPELLINGS.items()}
    if any(abs(reported - recall) < 1e-6 for recall in exact.values()):
        return Finding("right", f"recall@1 {reported:.3f}")
    wrong = {name: recall_at_one(rankings, entries_of) for name, entries_of in MISTAKES.items()}
    name = next((name for name, recall in wrong.items() if abs(reported - recall) < 1e-6), "another ranking")
    allowed = " or ".join(f"{recall:.3f}" for recall in sorted({*exact.values()}))
    return Finding("silently wrong", f"{name}: recall@1 {reported:.3f}; with each passage once, {allowed}")


def write_rows(passages):
    return [
        {"query": query, "passage": passage, "negatives": [other]}
        for query, relevant in RELEVANT.items()
        for passage, other in zip(passages(relevant), OTHERS, strict=True)
    ]


CASE = Case(
    title="A passage in several rows",
    group="what is measured",
    question="Each of four rows of a query names the same relevant passage and another negative. Does the passage "
    "count once in recall, so that a perfect ranking has a recall@1 of 1?",
    threads=["https://github.com/garrytan/gbrain/issues/4607", "https://github.com/microsoft/msmarco/issues/8"],
    added="2026-11-30",
    failed="it counted the passage for each row: recall@1 was 0.125 for 0.500",
    passed="2026-11-30, commit a803ab1b241c",
    rows=[{"query": f"Name {text}", "passage": f"It is {text}", "negatives": [OTHERS[0]]} for text in OTHERS],
    settings={
        "kind": "rerank",
        "test_rows": write_rows(lambda relevant: [relevant] * 4),
        "batch_size": 4,
        "learning_rate": 0.001,
        "ask": {"rankings": True},
    },
    judge=judge,
)
