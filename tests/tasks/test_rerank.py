"""Task rerank end to end: scores of sentence-transformers, ranking per query, serving, files, and errors."""

import json
import math
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import PeftModel
from support.families import build_bert, build_roberta
from support.models import build_llama
from support.pairs import quiet, recipe_of, start_training
from support.rows import write_jsonl
from support.runs import invoke
from support.serving import load_served, serving
from support.variants import predict
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from llmtune.deploy.export import export
from llmtune.deploy.merged_model import merged_format
from llmtune.deploy.onnx_export import onnx_format
from llmtune.errors import DataError, RecipeError
from llmtune.evaluate.bm25 import words
from llmtune.evaluate.per_row_scores import load_measures
from llmtune.pipeline import run_pipeline
from llmtune.plan import open_finished
from llmtune.recipe.loader import load_recipe
from llmtune.serve.finished_run import FinishedRun
from llmtune.store.run_request import RunRequest
from llmtune.tasks.rerank import Rerank, bm25
from llmtune.train.metrics_log import tracker_names

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sentence_transformers import CrossEncoder

THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone")
COLOURS = ("red", "green", "blue", "black", "white")
LISTS = [
    {
        "query": f"Which colour has {thing} number {i}?",
        "passages": [f"The {thing} is {COLOURS[i % 5]}.", f"One {thing} sits.", f"{COLOURS[i % 5]} is a colour."],
        "relevances": [2, 1, 0],
    }
    for i, thing in enumerate(THINGS * 6)
]
ROWS = [
    {"query": row["query"], "passage": passage, "relevance": relevance}
    for row in LISTS
    for passage, relevance in zip(row["passages"], row["relevances"], strict=True)
]
SILENT: dict[str, Any] = {"generation": {"max_new_tokens": None}}
PAIRS = [("Which colour has the cat?", "The cat is red."), ("What is blue?", "One fox sits. " * 3)]


def finish(folder: Path, model: Path, rows: list[dict[str, Any]], /, **sections: Any) -> Path:
    sections = {"train": {"num_train_epochs": 2, "learning_rate": 1e-2}, **SILENT, **sections}
    recipe = recipe_of(folder, model, rows, "rerank", **sections)
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=folder / "run"), quiet())
    return folder / "run"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = {"test": 0.25, "max_length": 64}
    return finish(tmp_path_factory.mktemp("pairs"), bert, ROWS, data=data, evaluate={"metrics": ["loss", "ndcg@2"]})


def scores_of(run: Path) -> list[float]:
    """The scores of PAIRS by llmtune."""
    finished = FinishedRun(run)
    served = finished.load({"prompt": "x", "passages": "y"}, base=False, max_new_tokens=None)
    rows = [{"query": query, "passages": [passage], "relevances": []} for query, passage in PAIRS]
    return [one.value["scores"][0] for one in served.predict(rows)]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_cross_encoder_gives_the_same_scores_from_the_saved_folder(
    method: str, run: Path, tmp_path: Path, built: Callable[[str], Path]
) -> None:
    """Head and activation survive."""
    if method == "full":
        run = finish(
            tmp_path,
            build_roberta(tmp_path / "model"),
            ROWS,
            adapter={"method": "full"},
            train={"max_steps": 2, "num_train_epochs": None},
        )
        folder = run / "weights"
    else:
        export(open_finished(run, quiet(), True), merged_format())
        folder = run / "merged"
    encoder = CrossEncoder(str(folder), device="cpu")
    ours = scores_of(run)
    assert encoder.predict(PAIRS) == pytest.approx(ours, abs=1e-5)
    assert isinstance(encoder.activation_fn, torch.nn.Sigmoid)
    assert len({round(score, 4) for score in ours}) == 2
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["id2label"] == {"0": "relevance"}


def test_a_saved_adapter_keeps_its_trained_head(run: Path, bert: Path) -> None:
    """With transformers 5.6, adapters of CrossEncoder lose it when they are loaded (sentence-transformers#3980)."""
    config = AutoConfig.from_pretrained(run / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(bert, config=config)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    with torch.inference_mode():
        logits = [model(**tokenizer(*pair, return_tensors="pt")).logits[0, 0] for pair in PAIRS]
    assert torch.stack(logits).sigmoid().tolist() == pytest.approx(scores_of(run), abs=1e-5)


def test_a_moved_and_merged_run_keeps_its_trained_head(run: Path, tmp_path: Path) -> None:
    """https://github.com/huggingface/sentence-transformers/issues/3980: there, the trained head starts anew.

    Seen with transformers 5.6, with PEFT 0.19 and 0.21. Not with transformers 5.19 to 5.23; 5.24 needs PEFT 0.22.
    """
    first = scores_of(run)
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    assert scores_of(moved) == pytest.approx(first, abs=1e-6)
    export(open_finished(moved, quiet(), True), merged_format(), tmp_path / "merged")
    assert CrossEncoder(str(tmp_path / "merged"), device="cpu").predict(PAIRS) == pytest.approx(first, abs=1e-5)


def test_the_loss_equals_that_of_sentence_transformers_on_the_same_batch(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    training = start_training(recipe_of(tmp_path, bert, ROWS, "rerank", **SILENT), tmp_path / "run")
    examples = [training.examples[i] for i in range(12)]
    assert sorted({example.relevance[0] for example in examples}) == [0.0, 0.5, 1.0]  # of relevances 0 to 2
    processor, model = training.adapted.selected.processor, training.model.eval()
    batch = training.task.collator(processor, training.recipe, False)(examples, 0)
    ours = training.task.loss(model, batch)
    encoder = CrossEncoder(str(bert), num_labels=1, device="cpu")
    encoder.model.forward = lambda **inputs: model(**inputs)
    texts = [processor.decode(example.input_ids).split("[SEP]")[:2] for example in examples]
    pairs = [[part.removeprefix("[CLS]").strip() for part in column] for column in zip(*texts, strict=True)]
    theirs = BinaryCrossEntropyLoss(encoder)(pairs, batch["values_R"])
    assert ours.sum.item() / ours.count == pytest.approx(theirs.item(), rel=1e-5)


def test_metrics_are_paired_over_queries_whose_rows_may_be_pairs_or_lists(
    run: Path, bert: Path, tmp_path: Path
) -> None:
    lists = finish(
        tmp_path, bert, LISTS, data={"test": 0.25, "max_length": 64}, evaluate={"metrics": ["ndcg@2", "map"]}
    )
    report = json.loads((run / "report.json").read_text("utf-8"))["evaluation"]
    lines = (run / "evaluation/predictions.jsonl").read_text("utf-8").splitlines()
    queries = len({json.loads(line)["prompt"].split("\n")[0] for line in lines})
    assert report["rows"] == 3 * queries
    assert report["difference"]["ndcg@2"]["n"] == queries
    assert report["baseline"] == "BM25 (words that query and passage share)"
    assert f"{queries} queries with 3.0 passages each" in report["signatures"]["queries"]
    measures = load_measures(run / "evaluation")
    assert len(measures.tuned["ndcg@2"].sums_NK) == queries
    assert len(measures.tuned["loss"].sums_NK) == 3 * queries
    assert len(load_measures(lists / "evaluation").tuned["map"].sums_NK) == len(
        load_measures(lists / "evaluation").rows
    )


def test_a_longer_passage_is_refused(run: Path) -> None:
    with pytest.raises(DataError, match="tokens, but the model reads 64"):
        FinishedRun(run).answer({"prompt": "red", "passages": json.dumps(["cat", "red cat " * 200])})


def test_a_decoder_with_a_chat_template_scores_as_in_cross_encoder(tmp_path: Path) -> None:
    """sentence-transformers puts pairs into a chat template, as messages of `query` and `document`, if there is one."""
    base = build_llama(tmp_path / "llama")
    assert (base / "chat_template.jinja").is_file()
    run = finish(tmp_path, base, ROWS, train={"max_steps": 2, "num_train_epochs": None})
    export(open_finished(run, quiet(), True), merged_format())
    encoder = CrossEncoder(str(run / "merged"), device="cpu")
    assert scores_of(run) == pytest.approx(encoder.predict(PAIRS), abs=1e-5)


def test_scores_are_not_rounded_to_bfloat16(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits in bfloat16 have 8 bits: passages that are about equally relevant would tie."""
    monkeypatch.setattr("llmtune.model.device.has_fast_bfloat16", lambda device: True)
    run = finish(tmp_path, bert, ROWS, model={"dtype": "auto"}, train={"max_steps": 1, "num_train_epochs": None})
    export(open_finished(run, quiet(), True), merged_format())
    encoder = CrossEncoder(str(run / "merged"), device="cpu")
    assert encoder.model.dtype == torch.float32
    assert scores_of(run) == pytest.approx(encoder.predict(PAIRS), abs=1e-6)


@pytest.mark.parametrize("label", ["LABEL_0", pytest.param("score", marks=pytest.mark.slow)])
def test_a_trained_reranker_is_its_own_base(label: str, run: Path, tmp_path: Path) -> None:
    """Whatever it calls its output."""
    export(open_finished(run, quiet(), True), merged_format(), tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    names = {"id2label": {"0": label}, "label2id": {label: 0}}
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), **names}), "utf-8")
    again = finish(tmp_path / "again", tmp_path / "base", ROWS, train={"max_steps": 1, "num_train_epochs": None})
    report = json.loads((again / "report.json").read_text("utf-8"))["evaluation"]
    assert report["baseline"] is None
    assert {"loss", "ndcg@10"} <= report["base"].keys()


def test_passages_that_training_rows_share_are_counted(bert: Path, tmp_path: Path) -> None:
    shared = [
        {**row, "passage": "The same words everywhere." if row["relevance"] == 0 else row["passage"]} for row in ROWS
    ]
    run = finish(
        tmp_path, bert, shared, data={"test": 0.25, "max_length": 64}, train={"max_steps": 1, "num_train_epochs": None}
    )
    notes = json.loads((run / "report.json").read_text("utf-8"))["evaluation"]["signatures"]
    count, total = (int(word) for word in notes["passages"].split() if word.isdigit())
    assert 1 <= count < total
    assert "of 24 passages" not in notes["passages"]


def test_the_program_next_to_the_onnx_model_ranks_all_passages_as_generate_does(run: Path, tmp_path: Path) -> None:
    export(open_finished(run, quiet(), True), onnx_format(), tmp_path / "onnx")
    query, passages = PAIRS[0][0], ["A river.", PAIRS[0][1], "One fox sits."]
    command = [sys.executable, str(tmp_path / "onnx" / "run_model.py"), query, *passages]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = FinishedRun(run).answer({"prompt": query, "passages": passages})["prediction"]
    assert [line.partition("\t")[2] for line in lines] == [passages[i] for i in expected["ranking"]]
    given = [float(line.partition("\t")[0]) for line in lines]
    assert given == pytest.approx([expected["scores"][i] for i in expected["ranking"]], abs=1e-4)


def test_any_cutoff_is_a_metric_except_zero() -> None:
    gates = "evaluate.gates=['ndcg@7.low > base']"
    assert load_recipe("rerank", ["evaluate.metrics=[ndcg@7, recall@100]", gates]).recipe.evaluate.gates
    with pytest.raises(RecipeError, match=r"unknown metric 'ndcg@0'(.|\n)*ndcg@10"):
        load_recipe("rerank", ["evaluate.metrics=[ndcg@0]", "evaluate.gates=[]"])


def test_trackers_get_names_without_an_at_sign() -> None:
    """MLflow refuses `ndcg@10`."""
    assert tracker_names({"validation_ndcg@10": 0.5, "loss": 1.0}) == {"validation_ndcg_at_10": 0.5, "loss": 1.0}


@pytest.mark.parametrize("relevance", [0, 1])
def test_rows_of_one_relevance_are_refused(relevance: int, bert: Path, tmp_path: Path) -> None:
    rows = [{**row, "relevance": relevance} for row in ROWS]
    with pytest.raises(DataError, match=f"all passages have the relevance {relevance}(.|\n)*irrelevant ones"):
        finish(tmp_path, bert, rows)


def test_generate_ranks_the_passages_of_a_file(run: Path, tmp_path: Path) -> None:
    texts = ["The cat is red.", "One fox sits.", "A river."]
    (tmp_path / "p.txt").write_text("\n".join([*texts, ""]), "utf-8")
    write_jsonl(tmp_path / "p.jsonl", [{"document": text} for text in texts])
    query = "Which colour has the cat?"
    answers = [
        json.loads(invoke("generate", run, query, "--passages", tmp_path / name, "--json").stdout)
        for name in ("p.txt", "p.jsonl")
    ]
    first, second = (answer["prediction"] for answer in answers)
    assert first == second
    assert sorted(first["ranking"]) == [0, 1, 2]
    ordered = [first["scores"][i] for i in first["ranking"]]
    assert ordered == sorted(ordered, reverse=True)
    assert FinishedRun(run).generate(query, passages=texts) == answers[0]["text"]
    assert answers[0]["text"].splitlines()[0] == f"{ordered[0]:.3f}  {texts[first['ranking'][0]]}"
    write_jsonl(tmp_path / "many.jsonl", [{"query": query, "passages": texts}])
    line = json.loads(invoke("generate", run, "--input", tmp_path / "many.jsonl").stdout)
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"query": query, "passages": []}, {"query": query}])
    done = invoke("generate", run, "--input", empty)
    assert (done.exit_code, done.stdout.count("'passages' is empty")) == (3, 2), done.output
    assert line["answer"] == ", ".join(f"{score:.3f}" for score in first["scores"])
    assert (line["scores"], line["ranking"]) == (pytest.approx(first["scores"], abs=1e-6), first["ranking"])


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 2, "not a file with passages"),
        ("", 3, "it has no passages"),
    ],
)
def test_files_without_passages_are_refused(
    content: str | None, code: int, words: str, run: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "p.txt").write_text(content)
    done = invoke("generate", run, "a query", "--passages", tmp_path / "p.txt")
    assert (done.exit_code, words in done.stderr) == (code, True), done.stderr
    (tmp_path / "p.csv").write_text("number\n1\n")
    assert (
        "no column for the passages; found number"
        in invoke("generate", run, "a query", "--passages", tmp_path / "p.csv").stderr
    )
    assert "--passages" in invoke("generate", run, "a query").stderr
    (tmp_path / "p.txt").write_bytes("straße".encode("latin-1"))
    assert "not UTF-8" in invoke("generate", run, "a query", "--passages", tmp_path / "p.txt").stderr


def test_the_endpoint_answers_like_that_of_cohere_and_gives_the_scores_of_generate(run: Path) -> None:
    texts = ["The cat is red.", "One fox sits.", "A river."]
    expected: Any = FinishedRun(run).answer({"prompt": "Which colour?", "passages": json.dumps(texts)})["prediction"]
    body: dict[str, Any] = {"query": "Which colour?", "documents": [*texts[:2], {"text": texts[2]}]}
    with serving(*load_served(mine=run).values()) as url:
        answer = httpx.post(f"{url}/v1/rerank", json={"model": "mine", **body}).json()
        assert answer["model"] == "mine"
        assert [one["index"] for one in answer["results"]] == expected["ranking"]
        for one in answer["results"]:
            assert one["relevance_score"] == pytest.approx(expected["scores"][one["index"]], abs=1e-5)
            assert one["document"] == {"text": texts[one["index"]]}
        assert answer["usage"]["total_tokens"] > 3 * 4
        best = httpx.post(f"{url}/v1/rerank", json={**body, "top_n": 1, "return_documents": False}).json()["results"]
        assert [(one["index"], sorted(one)) for one in best] == [(expected["ranking"][0], ["index", "relevance_score"])]
        titled = {**body, "documents": ["A fox.\nOne fox sits.", {"title": "A fox.", "text": "One fox sits."}]}
        for path in ("rerank", "v2/rerank"):
            pair = httpx.post(f"{url}/{path}", json=titled).json()["results"]
            assert pair[0]["relevance_score"] == pytest.approx(pair[1]["relevance_score"], abs=1e-6)
            assert pair[0]["document"] == pair[1]["document"]
        for wrong in ({"documents": []}, {"documents": [""]}, {"query": ""}, {"top_n": 0}, {"texts": ["x"]}):
            refused = httpx.post(f"{url}/v1/rerank", json={**body, **wrong})
            assert (refused.status_code, next(iter(wrong)) in str(refused.json())) == (400, True), refused.text


def test_bm25_prefers_rare_words_short_passages_and_gives_zero_without_a_shared_word() -> None:
    passages = ["the red cat", "the dog", "the red fox and the old dog sat by the river", "the the the"]
    (scores,) = bm25([{"query": "Red cat", "passages": passages, "relevances": []}])
    assert (int(np.argmax(scores)), scores[1], scores[3]) == (0, 0.0, 0.0)
    assert scores[2] > 0
    count, mean = 4, (3 + 2 + 11 + 3) / 4
    norm = 1.2 * (1 - 0.75 + 0.75 * 3 / mean)
    rarity = [math.log(1 + (count - holders + 0.5) / (holders + 0.5)) for holders in (2, 1)]
    assert scores[0] == pytest.approx(sum(rarity) * 2.2 / (1 + norm))


UNSPACED = {
    "Chinese": ("猫在哪里睡觉", ["狗在花园里跑步。", "猫在沙发上睡觉。", "火车明天早上出发。", "我们喝了很多茶。"]),
    "Japanese": ("猫はどこで寝ますか", ["犬が庭で走っています。", "猫はソファで寝ています。", "電車は明日出ます。"]),
    "Thai": ("แมวนอนที่ไหน", ["สุนัขวิ่งในสวน", "แมวนอนบนโซฟา", "รถไฟออกพรุ่งนี้เช้า", "เราดื่มชา"]),
    "Lao": ("ແມວນອນຢູ່ໃສ", ["ໝາແລ່ນໃນສວນ", "ແມວນອນເທິງໂຊຟາ", "ລົດໄຟອອກມື້ອື່ນ"]),
    "Burmese": ("ကြောင်ဘယ်မှာအိပ်လဲ", ["ခွေးသည်ဥယျာဉ်တွင်ပြေးသည်", "ကြောင်သည်ဆိုဖာပေါ်မှာအိပ်သည်", "ရထားမနက်ဖြန်ထွက်မည်"]),
    "Khmer": ("ឆ្មាដេកនៅឯណា", ["ឆ្កែរត់ក្នុងសួន", "ឆ្មាដេកលើសាឡុង", "រថភ្លើងចេញថ្ងៃស្អែក"]),
    "Hindi": ("बिल्ली कहाँ सोती है", ["कुत्ता बगीचे में दौड़ता है", "बिल्ली सोफे पर सोती है", "रेलगाड़ी कल सुबह जाएगी"]),
}


@pytest.mark.parametrize("language", UNSPACED)
def test_bm25_finds_shared_words_in_scripts_without_spaces(language: str) -> None:
    query, passages = UNSPACED[language]
    (scores,) = bm25([{"query": query, "passages": passages, "relevances": []}])
    assert int(np.argmax(scores)) == 1
    assert scores[1] > 2 * max(score for i, score in enumerate(scores) if i != 1)


@pytest.mark.parametrize(("first", "last"), [(0x4E00, 0x5200), (0x3041, 0x3097), (0x0E01, 0x0E3A), (0x1780, 0x17B4)])
def test_bm25_is_better_than_chance_on_random_text_without_spaces(first: int, last: int) -> None:
    """As words, each passage was one word that no query has."""
    draw = np.random.default_rng(1)
    passages = ["".join(map(chr, draw.integers(first, last, 40))) for _ in range(30)]
    rows = [{"query": passage[10:16], "passages": passages, "relevances": []} for passage in passages]
    assert np.mean([int(np.argmax(scores)) == i for i, scores in enumerate(bm25(rows))]) > 0.95


def test_words_keep_vowel_signs_and_the_letters_of_other_scripts() -> None:
    assert words("Python3入門 हिन्दी, Straße_1") == ["python3", "入門", "हिन्दी", "strasse_1"]
    assert words("ภาษา 猫") == ["ภา", "าษ", "ษา", "猫"]


def test_the_highest_relevance_of_the_recipe_overrides_that_of_the_rows(bert: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, bert, ROWS, "rerank", rerank={"max_relevance": 1.0}, **SILENT)
    training = start_training(recipe, tmp_path / "run")
    assert {training.examples[i].relevance[0] for i in range(len(training.examples))} == {0.0, 1.0}


def test_a_long_passage_is_cut_as_cross_encoder_cuts_it(bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=1).eval()
    recipe = load_recipe("rerank", [f"model.name={bert}", "data.max_length=16"]).recipe
    rows = [{"query": "Which colour has the cat?", "passages": ["One fox sits. " * 9], "relevances": []}]
    with torch.inference_mode():
        (ours,) = predict(Rerank(), model, rows, AutoTokenizer.from_pretrained(bert), recipe)
    encoder = CrossEncoder(str(bert), num_labels=1, max_length=16, device="cpu")
    encoder.model.load_state_dict(model.state_dict())
    assert encoder.predict([(rows[0]["query"], rows[0]["passages"][0])]) == pytest.approx(ours["scores"], abs=1e-6)
