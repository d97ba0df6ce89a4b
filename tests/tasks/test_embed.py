"""Task embed: losses as in sentence-transformers, gradients that no micro-batch changes, and the folder it saves."""

import html
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import OpenAI
from support.families import build_bert
from support.pairs import gradient, recipe_of, run_recipe, start_training
from support.runs import invoke
from support.serving import load_served, serving
from transformers import AutoConfig

from llmtune.data.rejected_rows import RowError
from llmtune.data.row_formats import FORMATS, parse_row, reads_rows
from llmtune.errors import LlmtuneError
from llmtune.evaluate.evaluated_task import EvalPrediction
from llmtune.model.sentence_folder import read_settings, write_settings
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.task_sections import EmbedSection
from llmtune.serve.finished_run import FinishedRun
from llmtune.tasks.embed import Embed
from llmtune.tasks.sentence_vectors import VectorExample, embed_section, embedding_loss, resolve_settings
from llmtune.train.accumulation import step_gradients

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_TEXT = {"generation": {"max_new_tokens": None}}
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone", "sky")
PAIRS = [
    {"query": f"number {i} {THINGS[i % 9]}", "passage": f"The {THINGS[i % 9]} number {i} is red."} for i in range(80)
]


def vectors(rows: int, texts: int, size: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((texts, size), generator=generator).requires_grad_() for _ in range(rows)]


def example(i: int, texts: int, **columns: Any) -> VectorExample:
    return VectorExample([], [], 0, text_hashes=[10 * i + place for place in range(texts)], **columns)


def referee(kind: str, columns: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    cosine = losses.BatchHardTripletLossDistanceFunction.cosine_distance if kind == "triplet" else None
    make: dict[str, Any] = {
        "ranking": lambda: losses.MultipleNegativesRankingLoss(None, scale=15.0),
        "cosent": lambda: losses.CoSENTLoss(None, scale=15.0),
        "cosine": lambda: losses.CosineSimilarityLoss(None),
        "triplet": lambda: losses.BatchAllTripletLoss(None, distance_metric=cosine, margin=0.3),
    }
    return make[kind]().compute_loss_from_embeddings(columns, targets)


@pytest.mark.parametrize("dimensions", [None, (12, 5)])
@pytest.mark.parametrize(
    ("kind", "texts"), [("ranking", 2), ("ranking", 4), ("cosent", 2), ("cosine", 2), ("triplet", 1)]
)
def test_losses_and_gradients_equal_those_of_sentence_transformers(kind, texts, dimensions):
    section = EmbedSection(loss=kind, scale=15.0, margin=0.3, dimensions=dimensions)
    given, targets = vectors(9, texts), torch.tensor([0.1, 0.5, 0.2, 0.9, 0.9, 0.4, 0.0, 1.0, 0.2])
    targets = torch.arange(9) % 3 if kind == "triplet" else targets
    examples = [example(i, texts, score=[float(one)], label_hash=[int(one)]) for i, one in enumerate(targets)]
    found = embedding_loss(given, examples, section)
    columns = [torch.stack([row[place] for row in given]) for place in range(texts)]
    expected = sum(referee(kind, [one[:, :size] for one in columns], targets) for size in dimensions or (12,))
    torch.testing.assert_close(found.sum / found.count, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(found.sum / found.count, given, retain_graph=True)
    theirs = torch.autograd.grad(expected, given)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-5, atol=1e-6)


def test_the_same_passage_is_no_negative_of_another_query():
    given, section = vectors(4, 2), EmbedSection(loss="ranking")
    apart = [example(i, 2) for i in range(4)]
    shared = [VectorExample([], [], 0, text_hashes=[10 * i, 1 if i == 3 else 10 * i + 1]) for i in range(4)]
    with torch.no_grad():
        given[3][1] = given[0][1]
    known, free = (embedding_loss(given, rows, section).row_sums.detach() for rows in (shared, apart))
    without = embedding_loss(given[:3], apart[:3], section).row_sums.detach()
    assert known[0] == pytest.approx(float(without[0]), rel=1e-5)
    assert known[0] < free[0]
    assert known[1] == free[1], "for other queries it is"


def test_other_passages_of_the_same_query_are_no_negatives():
    given, section = vectors(3, 2), EmbedSection(loss="ranking")
    twice = [VectorExample([], [], 0, text_hashes=[0 if i < 2 else 5, 20 + i]) for i in range(3)]
    expected = embedding_loss([given[0], given[2]], [twice[0], twice[2]], section).row_sums[0].detach()
    assert embedding_loss(given, twice, section).row_sums[0].detach() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_of_4_16_and_64_rows_give_the_same_gradient(packing, tmp_path):
    model = build_bert(tmp_path / "model", **STILL)
    sections = {"train": {"batch_size": 64}, "data": {"validation": 0, "test": 0, "packing": packing}}
    path = recipe_of(tmp_path, model, PAIRS, "embed", adapter={"lora_dropout": 0.0}, **sections, **NO_TEXT)
    training = start_training(path, tmp_path / "run")
    longest = int(training.examples.lengths.max())
    with torch.no_grad():
        for i, parameter in enumerate(training.parameters):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    found = [gradient(training, rows * longest) for rows in (64, 16, 4)]
    for loss, other in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert float((other - found[0][1]).norm() / found[0][1].norm()) < 1e-5


def test_both_passes_over_a_step_draw_the_same_dropout(tmp_path, monkeypatch):
    path = recipe_of(tmp_path, build_bert(tmp_path / "model"), PAIRS, "embed", adapter={"lora_dropout": 0.3}, **NO_TEXT)
    seen: list[list[torch.Tensor]] = []
    features = Embed.features

    def watch(self: Embed, model: torch.nn.Module, batch: Any) -> list[torch.Tensor]:
        found = features(self, model, batch)
        seen.append([one.detach() for one in found])
        return found

    monkeypatch.setattr(Embed, "features", watch)
    training = start_training(path, tmp_path / "run")
    for step in (1, 2):
        step_gradients(training, step, int(training.examples.lengths.max()), 1.0)
    half = len(seen) // 4
    assert half > 1
    for first, second in zip(
        [*seen[:half], *seen[2 * half : 3 * half]], [*seen[half : 2 * half], *seen[3 * half :]], strict=True
    ):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(seen[0][0], seen[2 * half][0])


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with prompts and short vectors."""
    folder = tmp_path_factory.mktemp(request.param)
    section = {"query_prompt": "query: ", "passage_prompt": "passage: ", "dimensions": [64, 16]}
    run_recipe(
        folder,
        build_bert(folder / "model", **STILL),
        PAIRS,
        "embed",
        adapter={"method": request.param},
        embed=section,
        train={"num_train_epochs": 1, "learning_rate": 1e-3},
        **NO_TEXT,
    )
    return folder / "run"


def test_sentence_transformers_loads_the_run_and_the_merged_model_with_the_same_vectors(run):
    folder = run / "weights"
    if not folder.exists():
        done = invoke("deploy", "merge", run)
        assert done.exit_code == 0, done.output
        folder = run / "merged"
    ours = FinishedRun(run, offline=True)
    query, passage = (
        ours.answer(given)["prediction"] for given in ({"prompt": "the red cat"}, {"passages": "the red cat"})
    )
    for place in {folder, run / "adapter"} if (run / "adapter").exists() else {folder}:
        theirs = SentenceTransformer(str(place), device="cpu", local_files_only=True)
        assert theirs.max_seq_length == 128
        np.testing.assert_allclose(theirs.encode_query("the red cat"), query["query"], atol=1e-6)
        np.testing.assert_allclose(theirs.encode_document("the red cat"), passage["passage"], atol=1e-6)
    assert np.linalg.norm(query["query"]) == pytest.approx(1)
    assert np.abs(np.subtract(query["query"], passage["passage"])).max() > 1e-3, "prompts differ"


def test_the_report_says_how_vectors_are_made_and_which_corpus_is_searched(run):
    report = json.loads((run / "report.json").read_text())
    assert {"ndcg@10", "recall@1", "mrr@10", "map", "random_cosine", "effective_rank"} <= report["evaluation"][
        "tuned"
    ].keys()
    text = html.unescape((run / "report.html").read_text())
    assert 'mean pooling, length 1, "query: " before queries' in text
    assert "the passages and negatives of the test rows" in text


def test_the_report_scores_vectors_of_each_length(run):
    report = json.loads((run / "report.json").read_text())
    lengths = report["evaluation"]["details"]["tuned"]["lengths"]
    assert [cut["length"] for cut in lengths] == [64, 16]
    scores = report["evaluation"]["tuned"]
    assert {name: lengths[0][name] for name in scores} == pytest.approx(scores)
    lines = [json.loads(line) for line in (run / "evaluation/predictions.jsonl").read_text().splitlines()]
    cut = [{name: vector[:16] for name, vector in line["tuned_prediction"].items()} for line in lines]
    rows = [
        {"query": line["prompt"], "passages": [line["reference"]], "negatives": [], "score": None, "label": None}
        for line in lines
    ]
    measured = Embed().compute_metric(
        "ndcg@10", EvalPrediction(cut, rows), load_recipe(str(run.parent / "recipe.yaml")).recipe
    )
    assert lengths[1]["ndcg@10"] == pytest.approx(measured.value)
    assert "Scores by vector length" in (run / "report.md").read_text()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose queries are searched in a corpus."""
    folder = tmp_path_factory.mktemp("searched")
    texts = [f"The {THINGS[i % 9]} number {i} is red." for i in range(300)]
    (folder / "corpus.txt").write_text("\n".join(texts))
    data = {"corpus": str(folder / "corpus.txt"), "test": 0.25}
    train = {"max_steps": 2, "num_train_epochs": None}
    run_recipe(folder, build_bert(folder / "model", **STILL), PAIRS, "embed", data=data, train=train, **NO_TEXT)
    return folder / "run"


def test_queries_are_searched_in_the_corpus_and_the_report_says_so(searched):
    evaluation = json.loads((searched / "report.json").read_text())["evaluation"]
    assert "searched in 300 passages" in evaluation["signatures"]["recall@1"]
    assert "data.corpus (" in evaluation["signatures"]["passages"]
    lines = [json.loads(line) for line in (searched / "evaluation/predictions.jsonl").read_text().splitlines()]
    ours = FinishedRun(searched, offline=True)
    corpus = (searched.parent / "corpus.txt").read_text().splitlines()
    vectors = [ours.answer({"passages": text})["prediction"]["passage"] for text in corpus]
    right = [
        corpus[int(np.argmax(np.asarray(vectors) @ line["tuned_prediction"]["query"]))] == line["reference"]
        for line in lines
    ]
    assert evaluation["tuned"]["recall@1"] == pytest.approx(np.mean(right))


def test_another_corpus_scores_again_without_training_and_reuses_nothing_of_the_old_one(searched, tmp_path):
    run = Path(shutil.copytree(searched, tmp_path / "run"))
    recipe = searched.parent / "recipe.yaml"
    (tmp_path / "less.txt").write_text("Nobody is here.\n")
    done = invoke("run", recipe, "--out", run, "--set", f"data.corpus={tmp_path / 'less.txt'}")
    assert done.exit_code == 0, done.output
    assert "train unchanged, skipped" in done.output
    assert "evaluate unchanged" not in done.output
    before, after = (json.loads((one / "report.json").read_text())["evaluation"] for one in (searched, run))
    assert after["base"]["recall@1"] >= before["base"]["recall@1"]
    assert f"searched in {after['rows'] + 1} passages" in after["signatures"]["recall@1"]


def test_a_champion_searches_the_passages_of_this_run(searched, tmp_path):
    recipe = searched.parent / "recipe.yaml"
    run = Path(shutil.copytree(searched, tmp_path / "run"))
    (tmp_path / "other.txt").write_text("Nobody is here.\n")
    sets = ("--set", f"evaluate.champion={searched}")
    done = invoke("run", recipe, "--out", run, *sets)
    assert done.exit_code == 0, done.output
    champion = json.loads((run / "report.json").read_text())["evaluation"]["champion"]
    assert champion["difference"]["recall@1"]["value"] == 0
    done = invoke("run", recipe, "--out", run, *sets, "--set", f"data.corpus={tmp_path / 'other.txt'}")
    assert done.exit_code == 0, done.output
    champion = json.loads((run / "report.json").read_text())["evaluation"]["champion"]
    assert champion["difference"]["recall@1"]["value"] == 0
    assert "random_cosine" in champion["difference"], "it needs no corpus"


def test_collapsing_vectors_are_reported_and_end_the_training(tmp_path):
    rows = [{**row, "score": 1.0} for row in PAIRS]
    train = {"num_train_epochs": 8, "learning_rate": 1e-2, "eval_steps": 4, "batch_size": 8}
    sections = {"embed": {"loss": "cosine"}, "data": {"validation": 0.2, "test": 0.2}, "train": train}
    report = run_recipe(tmp_path, build_bert(tmp_path / "model", **STILL), rows, "embed", **sections, **NO_TEXT)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    spread = [line["validation_metrics"] for line in lines if "validation_metrics" in line]
    assert spread[-1]["random_cosine"] > 0.995
    assert spread[-1]["effective_rank"] < 1.01
    assert report["train"]["stopped_early"] == "the vectors collapsed"
    assert report["train"]["steps"] < 8 * 7
    assert "the vectors collapse: unrelated texts have a cosine of" in (tmp_path / "run/report.md").read_text()


def test_the_spread_of_vectors_is_logged_at_each_validation_without_a_warning(tmp_path):
    sections = {
        "data": {"validation": 0.2, "test": 0},
        "train": {"max_steps": 4, "num_train_epochs": None, "eval_steps": 2},
    }
    report = run_recipe(tmp_path, build_bert(tmp_path / "model", **STILL), PAIRS, "embed", **sections, **NO_TEXT)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [sorted(line["validation_metrics"]) for line in lines if "validation_metrics" in line] == [
        ["effective_rank", "random_cosine"]
    ] * 2
    assert report["train"]["collapse"] is None


def found(rows: list[dict[str, Any]], made: list[dict[str, list[float]]]) -> EvalPrediction[Any]:
    return EvalPrediction(made, rows)


def test_metrics_rank_all_passages_for_each_query(tmp_path):
    recipe = load_recipe(str(recipe_of(tmp_path, tmp_path, PAIRS, "embed", **NO_TEXT))).recipe
    rows = [
        {"query": "a", "passages": ["p"], "negatives": ["n"], "score": None, "label": None},
        {"query": "b", "passages": ["q"], "negatives": [], "score": None, "label": None},
        {"query": "a", "passages": ["q"], "negatives": [], "score": None, "label": None},
    ]
    made = [
        {"query": [1.0, 0.0], "passage": [0.9, 0.1], "negative": [1.0, 0.01]},
        {"query": [0.0, 1.0], "passage": [0.1, 0.9]},
        {"query": [1.0, 0.0], "passage": [0.1, 0.9]},
    ]
    measured = {name: Embed().compute_metric(name, found(rows, made), recipe) for name in ("recall@1", "mrr@10", "map")}
    assert measured["recall@1"].value == pytest.approx((0 + 1) / 2)
    assert measured["mrr@10"].value == pytest.approx((1 / 2 + 1) / 2)
    assert measured["map"].value == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 2)
    assert measured["map"].at == (0, 1), "one value per query"


def test_a_passage_equal_to_the_query_is_not_expected(tmp_path):
    recipe = load_recipe(str(recipe_of(tmp_path, tmp_path, PAIRS, "embed", **NO_TEXT))).recipe
    texts = [("a", "a"), ("b", "b"), ("b", "p"), ("c", "q")]
    rows = [
        {"query": query, "passages": [text], "negatives": [], "score": None, "label": None} for query, text in texts
    ]
    made = [{"query": np.eye(4)[i].tolist(), "passage": np.eye(4)[i].tolist()} for i in (0, 1, 2, 3)]
    made[1]["query"] = made[2]["query"]
    measured = Embed().compute_metric("recall@1", found(rows, made), recipe)
    assert (measured.value, measured.at) == (1.0, (1, 3)), "query a has no other passage"


def test_metrics_of_classes_leave_out_the_text_itself(tmp_path):
    recipe = load_recipe(str(recipe_of(tmp_path, tmp_path, PAIRS, "embed", **NO_TEXT))).recipe
    rows = [{"query": str(i), "passages": [], "negatives": [], "score": None, "label": "xy"[i % 2]} for i in range(4)]
    made = [{"query": [1.0, 0.01 * i] if i % 2 else [0.01 * i, 1.0]} for i in range(4)]
    assert Embed().compute_metric("recall@1", found(rows, made), recipe).value == 1.0


@pytest.mark.promise("metric", "referee", equal="vectors with values by hand", place="random_cosine")
@pytest.mark.promise("metric", "referee", equal="vectors with values by hand", place="effective_rank")
def test_collapsed_vectors_show_in_cosine_and_effective_rank(tmp_path):
    recipe = load_recipe(str(recipe_of(tmp_path, tmp_path, PAIRS, "embed", **NO_TEXT))).recipe
    rows = [{"query": str(i), "passages": ["p"], "negatives": [], "score": None, "label": None} for i in range(8)]
    apart = [{"query": [1.0] * 8, "passage": np.eye(8)[i].tolist()} for i in range(8)]
    alike = [{"query": [1.0] * 8, "passage": [1.0] * 8} for _ in range(8)]
    values = {
        name: [Embed().compute_metric(name, found(rows, made), recipe).value for made in (apart, alike)]
        for name in ("random_cosine", "effective_rank")
    }
    assert values["random_cosine"] == pytest.approx([0, 1])
    assert values["effective_rank"] == pytest.approx([8, 1])


@pytest.mark.parametrize(
    ("row", "reads"),
    [
        ({"anchor": "a", "positive": "b"}, {"passages": ["b"], "negatives": []}),
        ({"anchor": "a", "positive": "b", "negative": "c"}, {"passages": ["b"], "negatives": ["c"]}),
        ({"query": "a", "pos": ["b", "d"], "neg": ["c"]}, {"passages": ["b", "d"], "negatives": ["c"]}),
        ({"sentence1": "a", "sentence2": "b", "score": 0.5}, {"passages": ["b"], "score": 0.5}),
        ({"text": "a", "label": "x"}, {"passages": [], "label": "x"}),
    ],
)
def test_pairs_triplets_lists_scores_and_classes_are_read_into_one_form(row, reads):
    from llmtune.data.column_mapping import rename
    from llmtune.data.row_formats import detect_format, map_columns

    kind = detect_format([row], "embed", {}, None, "rows")
    parsed = parse_row(rename(row, map_columns(kind, [row], "embed", {})), kind, "embed")
    assert parsed["query"] == "a"
    assert {name: parsed[name] for name in reads} == reads
    assert parsed.keys() == {"query", "passages", "negatives", "score", "label"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": "a", "passage": ""}, "no passage"),
        ({"query": " ", "passage": "b"}, "empty content"),
        ({"query": "a", "passage": "b", "negatives": ["b"]}, "a passage is a negative"),
        ({"query": "a", "passage": "b", "score": "high"}, "no number"),
        ({"query": "a", "passage": "b", "relevance": 0}, "graded passage"),
        ({"query": "a", "passage": ["b", "c"], "labels": [1, 0]}, "graded passage"),
        ({"query": "a", "passage": ["b", 3]}, "wrong type"),
    ],
)
def test_bad_rows_are_refused_by_reason(row, reason):
    with pytest.raises(RowError) as refused:
        parse_row(row, FORMATS["query-passage"], "embed")
    assert refused.value.reason == reason


def test_graded_passages_are_left_to_rerank():
    rows = [{"query": f"q{i}", "passage": "p", "label": i % 2} for i in range(4)]
    assert not reads_rows(rows, "embed", {})
    assert reads_rows(rows, "rerank", {})


@pytest.mark.parametrize(
    ("rows", "sections", "what"),
    [
        (PAIRS[:20], {"embed": {"loss": "triplet"}}, "cannot learn from rows with passages"),
        (PAIRS[:20], {"embed": {"dimensions": [32, 16]}}, "the model's vectors have 64 numbers"),
        (PAIRS[:20], {"train": {"batch_size": 1}}, "a step of one row has no other passages"),
        (PAIRS[:20], {"evaluate": {"metrics": ["spearman"]}}, "do not support spearman"),
        ([*PAIRS[:20], *({**row, "score": 1.0} for row in PAIRS[20:40])], {}, "the rows have passages and scores"),
        ([{**row, "score": 5.0} for row in PAIRS[:20]], {"embed": {"loss": "cosine"}}, "scores outside"),
        ([{**row, "score": 1.0} for row in PAIRS[:20]], {}, "all training rows have the score 1"),
        ([{"text": f"a {i}", "label": i} for i in range(20)], {}, "no class has two training rows"),
        ([{"text": f"a {i}", "label": "x"} for i in range(20)], {}, "all training rows have the class 'x'"),
    ],
)
def test_settings_that_do_not_fit_the_rows_are_refused(rows, sections, what, tmp_path):
    path = recipe_of(tmp_path, build_bert(tmp_path / "model"), rows, "embed", **NO_TEXT, **sections)
    done = invoke("prepare", path, "--out", tmp_path / "run")
    assert done.exit_code in (2, 3)
    assert what in " ".join(done.output.split())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder with CLS pooling, no normalisation and prompts."""
    folder = tmp_path_factory.mktemp("base")
    build_bert(folder / "plain")
    transformer = SentenceTransformer(str(folder / "plain"), device="cpu", local_files_only=True)[0]
    pooling = Pooling(64, pooling_mode="cls")
    prompts = {"query": "search: ", "document": "text: "}
    SentenceTransformer(modules=[transformer, pooling], prompts=prompts, device="cpu").save(str(folder / "base"))
    return folder / "base"


def test_pooling_normalisation_and_prompts_are_the_bases_own(base):
    section = resolve_settings(EmbedSection(), AutoConfig.from_pretrained(base))
    assert (section.pooling, section.normalize) == ("cls", False)
    assert (section.query_prompt, section.passage_prompt) == ("search: ", "text: ")
    stated = resolve_settings(EmbedSection(pooling="max", query_prompt=""), AutoConfig.from_pretrained(base))
    assert (stated.pooling, stated.query_prompt) == ("max", "")


def test_other_prompts_of_the_base_and_its_default_are_kept_in_the_saved_folder(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    about = {"prompts": {"query": "q: ", "corpus": "c: ", "sts": "s: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(about))
    config = AutoConfig.from_pretrained(folder)
    section = resolve_settings(EmbedSection(query_prompt="find: "), config)
    (tmp_path / "saved").mkdir()
    write_settings(tmp_path / "saved", config, section, 64)
    saved = json.loads((tmp_path / "saved/config_sentence_transformers.json").read_text())
    assert saved["prompts"] == {"sts": "s: ", "query": "find: ", "document": "c: "}
    assert saved["default_prompt_name"] == "query"


def test_a_base_with_further_layers_or_other_pooling_is_refused_by_name(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    modules = json.loads((folder / "modules.json").read_text())
    dense = [*modules, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (folder / "modules.json").write_text(json.dumps(dense))
    with pytest.raises(LlmtuneError, match="a module Dense"):
        read_settings(folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = folder / modules[1]["path"] / "config.json"
    pooling.write_text(json.dumps({"word_embedding_dimension": 64, "pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(LlmtuneError, match="weightedmean"):
        read_settings(folder)
    pooling.unlink()
    with pytest.raises(LlmtuneError, match="missing"):
        read_settings(folder)
    (folder / "modules.json").write_text("{")
    with pytest.raises(LlmtuneError, match="damaged"):
        read_settings(folder)


def test_the_untuned_base_gives_the_vectors_of_sentence_transformers(base, tmp_path):
    run_recipe(tmp_path, base, PAIRS[:30], "embed", train={"max_steps": 1, "num_train_epochs": None}, **NO_TEXT)
    ours = FinishedRun(tmp_path / "run", offline=True)
    assert embed_section(ours.load({"prompt": "x"}, base=True, max_new_tokens=None).recipe).pooling == "cls"
    theirs = SentenceTransformer(str(base), device="cpu", local_files_only=True)
    for given, vector in (
        ({"prompt": "  the red cat "}, theirs.encode_query("  the red cat ")),
        ({"passages": "The sky is blue."}, theirs.encode_document("The sky is blue.")),
    ):
        [one] = ours.answer(given, base=True)["prediction"].values()
        np.testing.assert_allclose(vector, one, atol=1e-6)


def test_the_openai_client_gets_the_vectors_of_generate(run):
    ours = FinishedRun(run, offline=True)
    texts = ["the red cat", "a house"]
    with serving(*load_served(mine=run).values()) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        queries = client.embeddings.create(model="mine", input=texts, extra_body={"input_type": "query"})
        found = client.embeddings.create(model="mine", input=texts, extra_body={"input_type": "document"})
        query = {"input_type": "query"}
        short = client.embeddings.create(model="mine", input=texts[0], dimensions=16, extra_body=query)
        wrong = httpx.post(f"{url}/v1/embeddings", json={"input": texts, "dimensions": 17, **query})
        tokens = httpx.post(f"{url}/v1/embeddings", json={"input": [[5, 6], [7]]})
    assert wrong.status_code == 400
    assert "Use one of 64, 16." in wrong.json()["error"]["message"]
    assert tokens.status_code == 400
    assert tokens.json()["error"]["message"].endswith("in LangChain, set check_embedding_ctx_length=False")
    for i, text in enumerate(texts):
        for answer, given in ((queries, {"prompt": text}), (found, {"passages": text})):
            [vector] = ours.answer(given)["prediction"].values()
            np.testing.assert_allclose(answer.data[i].embedding, vector, atol=1e-6)
    whole = np.asarray(queries.data[0].embedding[:16])
    np.testing.assert_allclose(short.data[0].embedding, whole / np.linalg.norm(whole), atol=1e-6)
    assert queries.usage.prompt_tokens > len(texts)


def test_generate_writes_the_vectors_of_a_file_as_numpy_or_json(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "the red cat"}\n{"query": ""}\n{"query": "a house", "id": 7}\n')
    for name in ("vectors.npy", "vectors.jsonl"):
        done = invoke("generate", run, "--input", rows, "--output", tmp_path / name)
        assert done.exit_code == 0, done.output
    whole = np.load(tmp_path / "vectors.npy")
    lines = [json.loads(line) for line in (tmp_path / "vectors.jsonl").read_text().splitlines()]
    expected = FinishedRun(run, offline=True).answer({"prompt": "a house"})["prediction"]["query"]
    assert (whole.shape, whole.dtype) == ((3, 64), np.float32)
    np.testing.assert_allclose(whole[2], expected, atol=1e-6)
    np.testing.assert_allclose(lines[2]["vectors"]["query"], expected, atol=1e-6)
    assert np.isnan(whole[1]).all()
    assert (lines[2]["id"], "error" in lines[1]) == (7, True)


def test_generate_prints_vectors_as_json_and_refuses_no_text(run):
    done = invoke("generate", run, "the red cat", "--json")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["prediction"]["query"]) == 64
    assert invoke("generate", run, "", "--json").exit_code == 2


@pytest.mark.slow
def test_an_onnx_file_gives_the_same_vectors_and_scores(run, tmp_path):
    done = invoke("deploy", "onnx", run, "--out", tmp_path / "onnx")
    assert done.exit_code == 0, done.output
    certificate = json.loads((tmp_path / "onnx" / "certificate.json").read_text())
    assert certificate["passed"]
    command = [sys.executable, "-W", "ignore", tmp_path / "onnx" / "run_model.py", "the red cat"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = FinishedRun(run, offline=True).answer({"prompt": "the red cat"})["prediction"]["query"]
    np.testing.assert_allclose(json.loads(printed), expected, atol=1e-5)


def test_a_passage_of_two_queries_is_pushed_away_by_sentence_transformers_and_not_here():
    """Queries that share their passage lose it: https://github.com/huggingface/sentence-transformers/issues/2646."""
    directions = torch.eye(12)[[0, 0, 1]]
    given = [torch.stack([row, row]).requires_grad_() for row in directions]  # every query is at its passage
    columns = [torch.stack([row[place] for row in given]) for place in range(2)]
    theirs = losses.MultipleNegativesRankingLoss(None).compute_loss_from_embeddings(columns, torch.zeros(3))
    examples = [VectorExample([], [], 0, text_hashes=[10 * i, 100 if i < 2 else 200]) for i in range(3)]
    ours = embedding_loss(given, examples, EmbedSection(loss="ranking"))
    assert float(theirs.detach()) > 0.4, "the right passage counts as wrong for the other query"
    assert float(ours.sum.detach()) < 1e-6
