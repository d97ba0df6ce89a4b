"""Summaries with encoder-decoders and by prompt with decoders: what is cut, what is measured, whole runs."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM
from rouge_score.rouge_scorer import RougeScorer
from support import families
from support.pairs import DOCUMENTS, gradient, quiet, recipe_of, run_recipe, start_training, tuned_logits
from support.templates import recipe_for
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from llmtune.errors import DataError, RecipeError
from llmtune.model.task_losses import seq2seq_loss
from llmtune.pipeline import run_pipeline
from llmtune.recipe import load_recipe
from llmtune.session import Options
from llmtune.tasks import summarize

METRICS = {"loss", "rouge1", "rouge2", "rougeL", "rougeLsum", "length_ratio"}
SHORT = {"max_length": 16, "on_overlong": "truncate"}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones((1, 4), dtype=torch.int64)}


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return families.build_t5(tmp_path_factory.mktemp("models") / "t5", dropout_rate=0.0)


@pytest.fixture(scope="module")
def finished(t5, tmp_path_factory):
    """A run with documents that are cut, and words of the recipe before them."""
    folder = tmp_path_factory.mktemp("finished")
    words = {"prompt": "summarize: {document}"}
    return folder, run_recipe(folder, t5, DOCUMENTS, "summarize", data=SHORT, summarize=words)


def check_report(report):
    scores = report["evaluation"]
    assert report["train"]["train_loss"] < report["train"]["first_loss"]
    assert scores["tuned"]["loss"] < scores["base"]["loss"]
    for part in ("base", "tuned", "difference"):
        assert set(scores[part]) == METRICS
    for metric in METRICS - {"loss", "length_ratio"}:
        assert scores["signatures"][metric].startswith("rouge-score F1, no stemmer")
    assert scores["signatures"]["rougeLsum"].endswith("sentences by line")
    assert scores["signatures"]["length_ratio"].startswith("words of the texts by words of the references")


def test_a_t5_is_tuned_on_cut_documents_and_measured_beside_its_base(finished):
    _, report = finished
    check_report(report)
    assert report["data"]["dropped"] == {}
    assert report["data"]["longest"]["train"] > 16  # a document of 16 and its summary
    learned = report["data"]["example"]
    assert learned[0][0].startswith("summarize: The")
    assert learned[0][1] is False
    assert learned[1][1] is True


def test_the_scores_are_those_of_rouge_score_on_what_was_written(t5, tmp_path):
    evaluate = {"metrics": ["rouge1", "rougeL"], "samples": 50}
    scores = run_recipe(tmp_path, t5, DOCUMENTS, "summarize", evaluate=evaluate)["evaluation"]
    assert len(scores["samples"]) == scores["rows"]
    for metric in ("rouge1", "rougeL"):
        found = [
            RougeScorer([metric]).score(sample["reference"], sample["tuned"])[metric].fmeasure
            for sample in scores["samples"]
        ]
        assert scores["tuned"][metric] == pytest.approx(sum(found) / len(found), abs=1e-12)


def test_the_adapter_is_read_back_by_peft_alone(finished):
    run = finished[0] / "run"
    plain = AutoPeftModelForSeq2SeqLM.from_pretrained(run / "adapter").eval()
    batch = {**BATCH, "decoder_input_ids": torch.tensor([[0, 9, 7]])}
    torch.testing.assert_close(plain(**batch, use_cache=False).logits, tuned_logits(run, batch), rtol=1e-4, atol=1e-5)


def test_a_second_run_is_skipped(finished):
    folder, report = finished
    again = run_pipeline(load_recipe(str(folder / "recipe.yaml")), Options(out=folder / "run"), quiet())
    assert all(step["skipped"] for step in again["steps"])
    assert again["evaluation"] == report["evaluation"]


def test_a_document_is_cut_for_an_answer_as_it_was_for_training(finished, t5):
    recipe = load_recipe(str(finished[0] / "recipe.yaml")).recipe
    processor, model = AutoTokenizer.from_pretrained(t5), AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    form, row = summarize.VARIANTS[0], DOCUMENTS[0]
    ((example,),) = form.encode([row], processor, recipe)
    seen = []
    model.get_encoder().register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    form.predict(model, [form.split_answer(row)[0]], processor, recipe, device="cpu")
    assert seen[0]["input_ids"].tolist() == [list(example.input_ids)]
    assert len(example.input_ids) == 16


def test_a_long_document_is_refused_by_default_and_a_long_summary_always(t5, tmp_path):
    wordy = [{"document": row["summary"], "summary": row["document"]} for row in DOCUMENTS]
    for name, rows, data in (("document", DOCUMENTS, {"max_length": 16}), ("summary", wordy, SHORT)):
        recipe = recipe_of(tmp_path / name, t5, rows, "summarize", data=data)
        with pytest.raises(DataError) as caught:
            run_pipeline(load_recipe(str(recipe)), Options(out=tmp_path / name / "run", until="prepare"), quiet())
        assert caught.value.exit_code == 3
        assert "data.max_length is 16" in str(caught.value)
        assert f"{tmp_path / name / 'rows.jsonl'}:" in str(caught.value)


def test_a_prompt_without_the_document_is_refused(t5, tmp_path):
    recipe = recipe_of(tmp_path, t5, DOCUMENTS, "summarize", summarize={"prompt": "Summarize this."})
    with pytest.raises(RecipeError, match=r"'summarize.prompt' does not contain {document}"):
        load_recipe(str(recipe))


@torch.no_grad()
def test_padding_does_not_change_the_loss_and_one_row_is_the_models_own(t5):
    recipe = recipe_for("summarize")
    processor, model = AutoTokenizer.from_pretrained(t5), AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    rows = [*DOCUMENTS[:3], {"document": "A fox.", "summary": "a longer summary of one two three four five words"}]
    examples = [encoded[0] for encoded in summarize.VARIANTS[0].encode(rows, processor, recipe)]
    collate = summarize.VARIANTS[0].collator(processor, recipe)
    together = seq2seq_loss(model, collate(examples, 0), by_row=True)
    own = []
    for row in rows:
        read = processor(row["document"], text_target=row["summary"], return_tensors="pt")
        own.append(float(model(**read).loss) * read["labels"].shape[1])
    assert together.row_sums.tolist() == pytest.approx(own, rel=1e-5)


def test_micro_batches_of_one_row_give_the_gradient_of_one_large_batch_in_full_tuning(t5, tmp_path):
    recipe = recipe_of(tmp_path, t5, DOCUMENTS, "summarize", adapter={"method": "full"})
    training = start_training(recipe, tmp_path / "run")
    one, single = gradient(training, 1)
    large, whole = gradient(training, 100_000)
    assert one == pytest.approx(large, rel=1e-6)
    assert float((single - whole).norm() / whole.norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), [("bart", "lora"), ("bart", "qlora"), ("mt5", "full"), ("t5", "full")])
def test_other_models_and_methods_learn_to_summarize(family, method, tmp_path):
    model = getattr(families, f"build_{family}")(tmp_path / "model")
    check_report(run_recipe(tmp_path, model, DOCUMENTS, "summarize", adapter={"method": method}))


# By prompt


def test_a_decoder_is_tuned_by_prompt_and_read_back_by_peft_alone(tiny_llama, tmp_path):
    report = run_recipe(tmp_path, tiny_llama, DOCUMENTS, "summarize", data={"packing": True})
    check_report(report)
    pieces = report["data"]["example"]
    assert "Summarize the text above." in "".join(text for text, learned in pieces if not learned)
    said = "".join(text for text, learned in pieces if learned)
    assert said.removesuffix("<|im_end|>") in {row["summary"] for row in DOCUMENTS}
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(
        plain(**BATCH, use_cache=False).logits, tuned_logits(tmp_path / "run", BATCH), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_of_one_prompt_give_the_gradient_of_one_large_batch(packing, tiny_llama, tmp_path):
    recipe = recipe_of(tmp_path, tiny_llama, DOCUMENTS, "summarize", data={"packing": packing})
    training = start_training(recipe, tmp_path / "run")
    one, single = gradient(training, 1)
    large, whole = gradient(training, 100_000)
    assert one == pytest.approx(large, rel=1e-5)
    assert float((single - whole).norm() / whole.norm()) < 1e-4
