"""A passage that several rows of a query name is one passage of its ranking."""

from conformance.case import Case, Finding

RELEVANT = {
    "Which colour is the sky?": "The sky is blue.",
    "How many legs has a cat?": "A cat has four legs.",
    "Is a fox a bird?": "A fox is no bird.",
    "What is 2 + 3?": "Two and three are five.",
}
OTHERS = ["Paris is a city.", "Red fish swim.", "One, two, three.", "The dog thinks."]


def recall_at_one(rankings, once):
    """Return the share of relevant passages in first place, over passages or over what the rows name."""
    shares = []
    for scored in rankings:
        entries = (
            list({passage.strip(): (score, relevant) for passage, score, relevant in scored}.values())
            if once
            else [(score, relevant) for _, score, relevant in scored]
        )
        [(_, first)] = sorted(entries, key=lambda entry: -entry[0])[:1]
        shares.append(first / sum(relevant for _, relevant in entries))
    return sum(shares) / len(shares)


def judge(case, reference, results):
    """The tool's own scores give the ranking; a query has one relevant passage."""
    [result] = results.values()
    reported, rankings = result.found["recall@1"], result.found["rankings"]
    exact, repeated = recall_at_one(rankings, True), recall_at_one(rankings, False)
    if abs(reported - exact) < 1e-6:
        return Finding("right", f"recall@1 {reported:.3f}")
    name = "a passage counted for each row" if abs(reported - repeated) < 1e-6 else "another ranking"
    return Finding("silently wrong", f"{name}: recall@1 {reported:.3f}; with each passage once, {exact:.3f}")


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
