from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import networkx
import numpy as np
import pytest
from support.explaining import quiet

from llmtune.explain import attention_figures
from llmtune.explain.attention_capture import CROSS, MEAN, SELF, AttentionMaps, Kind, Lines
from llmtune.explain.attention_figures import build_graph, draw_figures, edges_between
from llmtune.explain.attention_view import EDGES_PER_WORD, AttentionOptions, AttentionView, find_threshold, select
from llmtune.explain.token_text import Line, Token

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


def line(words: list[str]) -> Line:
    return Line.of([Token(i, word, special=word[0] == "[", continues=False) for i, word in enumerate(words)])


def view_of(lines: Lines, kind: Kind = SELF, special: bool = False, **sides: np.ndarray) -> AttentionView:
    """One layer whose mean is what is given, and a threshold of 0.3."""

    class Stand:
        name, models = "<&>", tuple(sides)

    maps = {
        side: AttentionMaps(lines, lambda layer: False, {kind: {0: {MEAN: weights}}}) for side, weights in sides.items()
    }
    options = AttentionOptions(layer="0", view="graph", threshold=0.3, special=special)
    return AttentionView(Stand, maps, lines, select({kind: (1, 1)}, options), options, {kind: (1, 1)})


def edges_of(view: AttentionView, kind: Kind = SELF) -> set[tuple[int, int]]:
    return {(int(i), int(k)) for i, k in np.argwhere(edges_between(view, kind))}


def test_edges_are_the_weights_from_the_threshold_on_of_any_model():
    view = view_of(Lines(line(WORDS)), special=True, model=MATRIX)
    assert edges_of(view) == {(0, 0), (3, 4), (1, 0), (1, 2), (2, 0), (2, 3)}
    graph, left_out = build_graph(view, SELF, [(0, MEAN)])
    assert (graph.number_of_edges(), left_out) == (6, 0)
    both = view_of(Lines(line(WORDS)), special=True, base=MATRIX, tuned=MATRIX.T.copy())
    assert (4, 3) in edges_of(both)


def test_without_special_nothing_leads_to_where_attention_is_parked():
    assert edges_of(view_of(Lines(line(WORDS)), model=MATRIX)) == {(3, 4), (1, 2), (2, 3)}


def test_the_threshold_by_itself_leaves_about_the_edges_that_can_be_read():
    many = np.random.default_rng(0).dirichlet(np.ones(40), size=40).astype(np.float32)
    threshold = find_threshold(many, np.ones_like(many, dtype=bool))
    assert (many >= threshold).sum() == pytest.approx(40 * EDGES_PER_WORD, abs=3)


def test_graphml_json_and_picture_hold_words_weights_and_differences(tmp_path: Path):
    view = view_of(Lines(line(WORDS)), special=True, base=MATRIX, tuned=MATRIX.T.copy())
    svg, graphml, node_link = draw_figures(view, tmp_path, quiet())
    for made in (
        networkx.read_graphml(graphml, force_multigraph=True),
        networkx.node_link_graph(json.loads(node_link.read_text("utf-8")), edges="edges"),
    ):
        assert [data["label"] for _, data in made.nodes(data=True)] == WORDS
        assert made.nodes["t0"]["special"] is True
        ((_, _, edge),) = [found for found in made.edges(data=True) if found[:2] == ("t3", "t4")]
        assert (edge["base"], edge["weight"]) == (pytest.approx(0.6), pytest.approx(0.2))
        assert edge["difference"] == pytest.approx(-0.4)
        assert (edge["layer"], edge["head"]) == (0, "mean")
    drawn = ElementTree.parse(svg).getroot()
    groups = {element.get("id"): len(list(element)) for element in drawn.iter("{http://www.w3.org/2000/svg}g")}
    assert groups["edges-base"] == groups["edges-tuned"] == 11
    assert groups["edges-difference"] == 10  # all but that of the first word to itself, which stays


def test_a_cross_graph_has_the_words_of_both_texts_even_those_that_xml_cannot_hold(tmp_path: Path):
    lines = Lines(line(["the", "a\x00b", "\ud800"]), line(["<pad>", "<&\"'>"]))
    view = view_of(lines, CROSS, model=np.full((2, 3), 1 / 3, dtype=np.float32))
    svg, graphml, _ = draw_figures(view, tmp_path, quiet())
    made = networkx.read_graphml(graphml, force_multigraph=True)
    assert [(data["line"], data["label"]) for _, data in made.nodes(data=True)] == [
        *(("source", word) for word in ("the", "a<U+0000>b", "<U+D800>")),
        *(("target", word) for word in ("<pad>", "<&\"'>")),
    ]
    assert set(made.edges()) == {(f"q{i}", f"t{k}") for i in range(2) for k in range(3)}
    texts = [element.text for element in ElementTree.parse(svg).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert "a<U+0000>b" in texts


def test_the_weakest_of_too_many_edges_are_left_out(monkeypatch):
    monkeypatch.setattr(attention_figures, "MOST_WRITTEN", 2)
    graph, left_out = build_graph(view_of(Lines(line(WORDS)), model=MATRIX), SELF, [(0, MEAN)])
    assert (sorted(graph.edges()), left_out) == ([("t0", "t0"), ("t3", "t4")], 4)
