"""Summaries with encoder-decoders and prompted decoders: truncation, metrics, complete runs."""

import pytest
from support.pairs import DOCUMENTS, quiet, recipe_of, run_recipe
from support.variants import predict
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from llmtune.errors import DataError
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from llmtune.tasks import summarize

METRICS = {"loss", "rouge1", "rouge2", "rougeL", "rougeLsum", "length_ratio"}
SHORT = {"max_length": 16, "on_overlong": "truncate"}


@pytest.fixture(scope="module")
def t5(built):
    return built("t5", dropout_rate=0.0)


@pytest.fixture(scope="module")
def finished(t5, tmp_path_factory):
    """A run with truncated documents and a prompt before them."""
    folder = tmp_path_factory.mktemp("finished")
    sections = {"summarize": {"prompt": "summarize: {document}"}, "evaluate": {"metrics": None, "samples": 50}}
    return folder, run_recipe(folder, t5, DOCUMENTS, "summarize", data=SHORT, **sections)


def test_a_t5_is_tuned_on_truncated_documents_and_compared_with_its_base(finished):
    _, report = finished
    scores = report["evaluation"]
    assert scores["tuned"]["loss"] < scores["base"]["loss"]
    for part in ("base", "tuned", "difference"):
        assert set(scores[part]) == METRICS | {"answers_cut"}
    for metric in METRICS - {"loss", "length_ratio"}:
        assert scores["signatures"][metric].startswith("rouge-score F1, no stemmer")
    assert scores["signatures"]["rougeLsum"].endswith("sentences by line")
    assert scores["signatures"]["length_ratio"].startswith("words of the texts per word of the references")
    assert report["data"]["dropped"] == {}
    assert report["data"]["longest"]["train"] > 16  # a document of 16 and its summary
    learned = report["data"]["example"]
    assert learned[0][0].startswith("summarize: The")
    assert learned[0][1] is False
    assert learned[1][1] is True


def test_a_document_is_truncated_in_generation_as_in_training(finished, t5):
    recipe = load_recipe(str(finished[0] / "recipe.yaml")).recipe
    processor, model = AutoTokenizer.from_pretrained(t5), AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    form, row = summarize.VARIANTS[0], DOCUMENTS[0]
    ((example,),) = form.encode([row], processor, recipe)
    seen = []
    model.get_encoder().register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    predict(form, model, [form.split_answer(row)[0]], processor, recipe)
    assert seen[0]["input_ids"].tolist() == [list(example.input_ids)]
    assert len(example.input_ids) == 16


def test_a_long_document_is_refused_by_default_and_a_long_summary_always(t5, tmp_path):
    wordy = [{"document": row["summary"], "summary": row["document"]} for row in DOCUMENTS]
    for name, rows, data in (("document", DOCUMENTS, {"max_length": 16}), ("summary", wordy, SHORT)):
        recipe = recipe_of(tmp_path / name, t5, rows, "summarize", data=data)
        with pytest.raises(DataError) as caught:
            run_pipeline(load_recipe(str(recipe)), RunRequest(out=tmp_path / name / "run", until="prepare"), quiet())
        assert caught.value.exit_code == 3
        assert "data.max_length is 16" in str(caught.value)
        assert f"{tmp_path / name / 'rows.jsonl'}:" in str(caught.value)
