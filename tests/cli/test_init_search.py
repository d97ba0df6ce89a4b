"""`llmtune init` for retrieval: pairs, a corpus next to them, BEIR's folders, and texts without queries."""

import csv
import json
from pathlib import Path

import pytest
from support.runs import invoke
from typer.testing import Result

from llmtune.data.retrieval_layout import find_retrieval_set, join_rows
from llmtune.errors import DataError
from llmtune.recipe.loader import load_recipe

pytestmark = pytest.mark.usefixtures("here")
PLACES = ("harbour", "library", "station", "market", "museum", "garden", "bridge", "castle")


def pairs(count: int = 80) -> list[tuple[str, str]]:
    return [
        (f"where is the {PLACES[i % 8]} of town {i}", f"Town {i} has its {PLACES[i % 8]} at street {7 * i % 97}.")
        for i in range(count)
    ]


def write_table(name: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with open(name, "w", newline="") as file:
        csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",").writerows([header, *rows])


def write_lines(name: str, rows: list[dict[str, str]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_beir(folder: Path, *splits: str) -> None:
    (folder / "qrels").mkdir(parents=True)
    write_lines(f"{folder}/queries.jsonl", [{"_id": f"q{i}", "text": query} for i, (query, _) in enumerate(pairs())])
    corpus = [{"_id": f"d{i}", "title": f"Town {i}", "text": text} for i, (_, text) in enumerate(pairs(90))]
    write_lines(f"{folder}/corpus.jsonl", corpus)
    for place, split in enumerate(splits):
        judged = [(f"q{i}", f"d{i}", "1") for i in range(place, 80, len(splits))]
        judged += [(f"q{i}", f"d{i + 1}", "0") for i in range(place, 20, len(splits))]
        write_table(f"{folder}/qrels/{split}.tsv", ("query-id", "corpus-id", "score"), judged)


def init(*arguments: str) -> Result:
    done = invoke("init", *arguments)
    assert done.exit_code == 0, done.stderr
    return done


def test_pairs_get_a_corpus_mined_negatives_and_a_batch_size_each_with_its_reason() -> None:
    write_table("pairs.csv", ("question", "answer"), pairs())
    init("pairs.csv", "--task", "embed")
    recipe, text = load_recipe("pairs.yaml").recipe, Path("pairs.yaml").read_text()
    assert recipe.data.columns == {"query": "question", "passage": "answer"}
    assert [Path(one.path).name for one in recipe.data.corpus or ()] == ["pairs.csv"]
    assert (recipe.data.negatives and recipe.data.negatives.mine, recipe.train.batch_size) == (4, 16)
    for key in ("corpus: ", "negatives: ", "batch_size: "):
        (line,) = (line for line in text.splitlines() if line.strip().startswith(key))
        assert len(line.partition("  # ")[2].split()) > 5
    assert invoke("recipes", "check", "pairs.yaml").exit_code == 0


def test_a_corpus_next_to_the_rows_is_searched() -> None:
    write_table("rows.csv", ("query", "passage"), pairs())
    write_table("passages.csv", ("id", "text"), [(str(i), text) for i, (_, text) in enumerate(pairs(200))])
    init("rows.csv")
    recipe = load_recipe("rows.yaml").recipe
    assert (recipe.task, recipe.data.columns) == ("embed", {})
    assert [Path(one.path).name for one in recipe.data.corpus or ()] == ["passages.csv"]


def test_given_negatives_scores_and_classes_are_not_mined_for() -> None:
    rows = [(query, text, f"Not at street {i}.") for i, (query, text) in enumerate(pairs())]
    write_table("triplets.csv", ("query", "passage", "negative"), rows)
    write_table("scores.csv", ("query", "passage", "score"), [(*pair, f"0,{i % 9}") for i, pair in enumerate(pairs())])
    write_table("classes.csv", ("text", "label"), [(text, PLACES[i % 8]) for i, (_, text) in enumerate(pairs())])
    for name, has_corpus in (("triplets", True), ("scores", False), ("classes", False)):
        init(f"{name}.csv", "--task", "embed")
        data = load_recipe(f"{name}.yaml").recipe.data
        assert (data.negatives, data.corpus is not None) == (None, has_corpus)
        assert invoke("recipes", "check", f"{name}.yaml").exit_code == 0


def test_titles_stand_in_for_queries_and_texts_alone_are_refused_with_what_is_needed() -> None:
    write_table("pages.csv", ("title", "text"), [(f"Town {i}", text) for i, (_, text) in enumerate(pairs())])
    init("pages.csv", "--task", "embed")
    assert "query: title  # titles stand in for queries" in Path("pages.yaml").read_text()
    write_table("texts.csv", ("text",), [(text,) for _, text in pairs()])
    refused = invoke("init", "texts.csv", "--task", "embed")
    assert (refused.exit_code, "Give rows with query and passage" in refused.stderr) == (3, True), refused.stderr


@pytest.mark.parametrize(("splits", "written"), [(("train", "dev", "test"), 3), (("test",), 1)])
@pytest.mark.parametrize("task", [None, "rerank"])
def test_a_folder_in_beirs_layout_is_joined(
    splits: tuple[str, ...], written: int, task: str | None, here: Path
) -> None:
    write_beir(here / "towns", *splits)
    init("towns", *(("--task", task) if task else ()))
    recipe = load_recipe("towns.yaml").recipe
    assert recipe.task == (task or "embed")
    assert len(list(here.glob("towns-*.jsonl"))) == written
    first = json.loads((here / "towns-train.jsonl").read_text().splitlines()[0])
    query, text = pairs()[0]
    assert (first["query"], first["passage"][0]) == (query, f"Town 0\n{text}")
    assert first["negatives"] == [f"Town 1\n{pairs()[1][1]}"]
    assert isinstance(recipe.data.test, float) == (written == 1)
    assert isinstance(recipe.data.validation, float) == (written == 1)
    if recipe.task == "embed":
        assert [Path(one.path).name for one in recipe.data.corpus or ()] == ["corpus.jsonl"]
    checked = invoke("recipes", "check", "towns.yaml")
    assert checked.exit_code == 0, checked.stderr


def test_judgements_without_their_texts_or_columns_are_refused(here: Path) -> None:
    write_beir(here / "towns", "train")
    files = find_retrieval_set(here / "towns")
    assert files is not None
    assert find_retrieval_set(here) is None
    write_table("towns/qrels/train.tsv", ("query-id", "corpus-id", "score"), [("q1", "x", "1")])
    with pytest.raises(DataError, match="no judgement has its query"):
        list(join_rows(files, "train"))
    write_table("towns/qrels/train.tsv", ("query-id", "document", "score"), [("q1", "x", "1")])
    with pytest.raises(DataError, match="Name it one of corpus-id"):
        list(join_rows(files, "train"))
    write_table("towns/qrels/train.tsv", ("query-id", "corpus-id", "score"), [("q1", "d1", "yes")])
    with pytest.raises(DataError, match="'yes' is no number"):
        list(join_rows(files, "train"))


@pytest.mark.slow
@pytest.mark.parametrize("named", ["pairs.csv", "towns"])
def test_the_proposed_recipe_trains_and_evaluates_offline(named: str, here: Path) -> None:
    write_table("pairs.csv", ("question", "answer"), pairs())
    write_beir(here / "towns", "train", "test")
    init(named, "--task", "embed", "--model", "builtin:minilm-l6-v2", "--out", "mine.yaml")
    done = invoke("run", "mine.yaml", "--offline", "--out", "out", "--set", "train.max_steps=2")
    assert done.exit_code == 0, done.stderr
    report = json.loads(Path("out/report.json").read_text())
    assert 0 < report["evaluation"]["tuned"]["ndcg@10"] <= 1
