from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import networkx
import numpy as np
import pytest
from support.explaining import quiet

from llmtune.explain.attention_figures import draw_attention, find_edges
from llmtune.explain.attention_maps import (
    CROSS,
    EDGES_PER_WORD,
    MEAN,
    SELF,
    AttentionKind,
    AttentionMaps,
    TextLines,
    find_threshold,
)
from llmtune.explain.inputs import AttentionRequest
from llmtune.explain.token_text import Token, TokenLine

WORDS = ["[CLS]", "the", "cat", "שלום", "日本"]
MATRIX = np.array(
    [
        [0.8, 0.1, 0.1, 0.0, 0.0],
        [0.5, 0.1, 0.4, 0.0, 0.0],
        [0.3, 0.2, 0.2, 0.3, 0.0],
        [0.1, 0.1, 0.1, 0.1, 0.6],
        [0.2, 0.2, 0.2, 0.2, 0.2],
    ],
    dtype=np.float32,
)


def line(words: list[str]) -> TokenLine:
    return TokenLine.of([Token(i, word, special=word[0] == "[", continues=False) for i, word in enumerate(words)])


def maps_of(lines: TextLines, kind: AttentionKind = SELF, **models: np.ndarray) -> AttentionMaps:
    """One layer with the given mean, and a threshold of 0.3."""
    kept = {model: {kind: {0: {MEAN: weights}}} for model, weights in models.items()}
    return AttentionMaps(tuple(models), lines, {kind: (1, 1)}, AttentionRequest(layer=0, threshold=0.3), kept)


def test_edges_reach_the_threshold_in_any_model_and_avoid_parked_attention():
    lines = TextLines(line(WORDS))
    assert find_edges(maps_of(lines, model=MATRIX), SELF) == [(3, 4), (1, 2), (2, 3)]
    assert (4, 3) in find_edges(maps_of(lines, base=MATRIX, tuned=MATRIX.T.copy()), SELF)


def test_the_default_threshold_leaves_a_readable_number_of_edges():
    many = np.random.default_rng(0).dirichlet(np.ones(40), size=40).astype(np.float32)
    threshold = find_threshold(many, np.ones_like(many, dtype=bool))
    assert (many >= threshold).sum() == pytest.approx(40 * EDGES_PER_WORD, abs=3)


def test_graphml_and_picture_contain_words_weights_and_differences(tmp_path: Path):
    maps = maps_of(TextLines(line(WORDS)), base=MATRIX, tuned=MATRIX.T.copy())
    _, _, svg, graphml = draw_attention(maps, tmp_path, quiet())
    made = networkx.read_graphml(graphml)
    assert [data["label"] for _, data in made.nodes(data=True)] == WORDS
    assert made.nodes["t0"]["special"] is True
    edge = made.edges["t3", "t4"]
    assert [edge[model] for model in ("base", "tuned", "difference")] == pytest.approx([0.6, 0.2, -0.4])
    drawn = ElementTree.parse(svg).getroot()
    groups = {element.get("id"): len(list(element)) for element in drawn.iter("{http://www.w3.org/2000/svg}g")}
    assert groups["edges-base"] == groups["edges-tuned"] == groups["edges-difference"] == made.number_of_edges()


def test_a_cross_graph_has_the_words_of_both_texts_even_if_xml_cannot_store_them(tmp_path: Path):
    lines = TextLines(line(["the", "a\x00b", "\ud800"]), line(["<pad>", "<&\"'>"]))
    maps = maps_of(lines, CROSS, model=np.full((2, 3), 1 / 3, dtype=np.float32))
    _, _, svg, graphml = draw_attention(maps, tmp_path, quiet())
    made = networkx.read_graphml(graphml)
    assert [(data["line"], data["label"]) for _, data in made.nodes(data=True)] == [
        *(("source", word) for word in ("the", "a<U+0000>b", "<U+D800>")),
        *(("target", word) for word in ("<pad>", "<&\"'>")),
    ]
    assert set(made.edges()) == {(f"q{i}", f"t{k}") for i in range(2) for k in range(3)}
    texts = [element.text for element in ElementTree.parse(svg).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert "a<U+0000>b" in texts
