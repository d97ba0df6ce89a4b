from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import networkx
import numpy as np
import pytest

from llmtune.explain.attention_graph import (
    EDGES_PER_WORD,
    MOST_DRAWN,
    Graph,
    draw_graph,
    find_edges,
    find_threshold,
    write_graph,
)
from llmtune.explain.attention_summary import Line
from llmtune.explain.token_text import Token

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


def graph_of(threshold: float = 0.3, **sides: np.ndarray) -> Graph:
    words = line(WORDS)
    edges = find_edges(sides or {"model": MATRIX}, threshold, 1, "mean")
    return Graph(words, words, edges, {"model": "tiny", "threshold": threshold})


def test_edges_are_the_weights_from_the_threshold_on_the_strongest_first():
    edges = graph_of().edges
    assert [(edge.start, edge.end) for edge in edges] == [(0, 0), (3, 4), (1, 0), (1, 2), (2, 0), (2, 3)]
    assert edges[0].weights == {"model": pytest.approx(0.8)}
    assert len(graph_of(0.0).edges) == int((MATRIX > 0).sum())


def test_an_edge_of_a_run_is_there_if_either_side_has_it():
    edges = graph_of(0.55, base=MATRIX, tuned=MATRIX.T.copy()).edges
    assert {(edge.start, edge.end) for edge in edges} == {(0, 0), (3, 4), (4, 3)}


def test_between_words_leaves_out_what_is_parked_on_special_tokens_and_the_first():
    kept = {(edge.start, edge.end) for edge in graph_of().among_words().edges}
    assert kept == {(0, 0), (3, 4), (1, 2), (2, 3)}


def test_the_threshold_by_itself_leaves_about_the_edges_that_can_be_read():
    many = np.random.default_rng(0).dirichlet(np.ones(40), size=40).astype(np.float32)
    threshold = find_threshold(many, np.ones_like(many, dtype=bool))
    assert len(find_edges({"model": many}, threshold, 0, "mean")) == pytest.approx(40 * EDGES_PER_WORD, abs=3)


def test_graphml_and_json_hold_words_weights_and_differences(tmp_path):
    graph = graph_of(base=MATRIX, tuned=MATRIX.T.copy())
    graphml, node_link = write_graph(tmp_path / "graph", graph)
    for made in (
        networkx.read_graphml(graphml, force_multigraph=True),
        networkx.node_link_graph(json.loads(node_link.read_text("utf-8")), edges="edges"),
    ):
        assert [data["label"] for _, data in made.nodes(data=True)] == WORDS
        assert made.nodes["t0"]["special"] is True
        assert made.number_of_edges() == len(graph.edges)
        ((_, _, edge),) = [found for found in made.edges(data=True) if found[:2] == ("t3", "t4")]
        assert (edge["base"], edge["weight"]) == (pytest.approx(0.6), pytest.approx(0.2))
        assert edge["difference"] == pytest.approx(-0.4)
        assert (edge["layer"], edge["head"]) == (1, "mean")


def test_a_cross_graph_has_the_words_of_both_texts(tmp_path):
    rows, columns = line(["<pad>", "le"]), line(["the", "cat", "sat"])
    edges = find_edges({"model": np.full((2, 3), 1 / 3, dtype=np.float32)}, 0.1, 0, "2")
    graph = Graph(rows, columns, edges, {})
    made = networkx.read_graphml(write_graph(tmp_path / "graph", graph)[0], force_multigraph=True)
    assert {data["line"] for _, data in made.nodes(data=True)} == {"source", "target"}
    assert set(made.edges()) == {(f"q{i}", f"t{k}") for i in range(2) for k in range(3)}
    drawn = ElementTree.parse(draw_graph(tmp_path / "graph", graph, ["model"], "Cross")[0]).getroot()
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text] == ["<pad>", "le", "the", "cat", "sat", "Cross"]


def test_characters_that_xml_cannot_hold_do_not_break_the_files(tmp_path):
    words = line(["a\x00b", "\ud800", "<&\"'>"])
    edges = find_edges({"model": np.full((3, 3), 1 / 3, dtype=np.float32)}, 0.1, 0, "mean")
    graph = Graph(words, words, edges, {"model": "<&>"})
    made = networkx.read_graphml(write_graph(tmp_path / "graph", graph)[0], force_multigraph=True)
    assert [data["label"] for _, data in made.nodes(data=True)] == ["a<U+0000>b", "<U+D800>", "<&\"'>"]
    ElementTree.parse(draw_graph(tmp_path / "graph", graph, ["model"], "<title>")[0])


def test_the_picture_has_wider_edges_for_stronger_weights_and_a_side_each(tmp_path):
    graph = graph_of(base=MATRIX, tuned=MATRIX.T.copy())
    drawn = draw_graph(tmp_path / "graph", graph, ["base", "tuned", "difference"], "Attention")[0].read_text("utf-8")
    found = re.findall(r'<g id="(\w+)-(\d)-(\d)">.*?stroke-width: ([\d.]+)', drawn, re.S)
    widths = {(side, int(start), int(end)): float(width) for side, start, end, width in found}
    assert {side for side, _, _ in widths} == {"base", "tuned", "difference"}
    assert widths["base", 0, 0] > widths["base", 3, 4] > widths["base", 2, 0]


def test_a_picture_of_many_edges_draws_the_strongest(tmp_path):
    size = 60
    many = np.random.default_rng(0).dirichlet(np.ones(size), size=size).astype(np.float32)
    words = line([f"w{i}" for i in range(size)])
    graph = Graph(words, words, find_edges({"model": many}, 0.001, 0, "mean"), {})
    drawn = draw_graph(tmp_path / "graph", graph, ["model"], "Many")[0].read_text("utf-8")
    assert drawn.count('<g id="model-') == MOST_DRAWN < len(graph.edges)
