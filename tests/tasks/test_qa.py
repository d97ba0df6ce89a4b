"""Questions about a text: encoders that point at the answer, decoders and encoder-decoders that write it."""

import math

import pytest
import torch
from support import families
from support.pairs import run_recipe
from support.rows import prepare, write_jsonl
from support.variants import EXTRACTIVE_QA, predict
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer, RobertaConfig

from llmtune.errors import DataError, RecipeError
from llmtune.evaluate.evaluated_task import EvalPrediction
from llmtune.model.memory_plan import context_length
from llmtune.recipe.schema import Recipe
from llmtune.tasks import qa
from llmtune.tasks.registry import VARIANTS, choose_variant, get_task

COLOURS = ("red", "green", "blue")
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone")


def answered(thing, colour, other):
    context = f"The {thing} is {colour}. The sky has {other} legs."
    question = f"Which colour is the {thing}?"
    return {
        "question": question,
        "context": context,
        "answers": {"text": [colour], "answer_start": [context.index(colour)]},
    }


def unanswered(thing, colour):
    question = f"Which colour is the {thing}?"
    return {"question": question, "context": f"The sky has {colour} legs and a {thing}.", "answers": {"text": []}}


ANSWERED = [answered(thing, colour, other) for thing in THINGS for colour in COLOURS for other in COLOURS]
ROWS = [*ANSWERED, *(unanswered(thing, colour) for thing in THINGS for colour in COLOURS)]


def recipe_with(section=None, **data):
    content = {"task": "qa", "data": {"train": "rows.jsonl", **data}, "model": {"name": "tiny"}, "qa": section}
    return Recipe.model_validate(content)


class Scores(torch.nn.Module):
    """Gives each token a score by its id: a fully determined model."""

    def __init__(self, config, starts, ends):
        super().__init__()
        self.config, self.starts, self.ends = config, starts, ends
        self.dtype = torch.float32

    def forward(self, input_ids, attention_mask=None):
        logits = [
            torch.tensor([[table.get(token, 0.0) for token in row] for row in input_ids.tolist()])
            for table in (self.starts, self.ends)
        ]
        return type("Output", (), {"start_logits": logits[0], "end_logits": logits[1]})()


def ask(threshold, first, last, null, built, context="The fox is blue.", **section):
    tokenizer = AutoTokenizer.from_pretrained(built("bert"))
    ids = tokenizer.convert_tokens_to_ids(["fox", "blue", tokenizer.cls_token])
    model = Scores(
        AutoConfig.from_pretrained(built("bert")), {ids[0]: first, ids[2]: null}, {ids[1]: last, ids[2]: null}
    )
    about = recipe_with({"stride": 4, "null_score_diff_threshold": threshold, **section}, max_length=24)
    row = {"question": "Which?", "context": context, "answers": None}
    (said,) = predict(EXTRACTIVE_QA, model, [row], tokenizer, about)
    return said


def test_no_answer_is_predicted_if_its_score_exceeds_the_threshold(built):
    said = ask(0.0, 2.0, 3.0, 2.0, built)
    assert said == {"text": "fox is blue", "start": 4, "end": 15, "score": 5.0, "null_score": 4.0}
    assert ask(0.0, 2.0, 3.0, 2.5, built)["text"] == "fox is blue"  # equal is not higher
    none = ask(0.0, 2.0, 3.0, 3.0, built)
    assert none == {"text": "", "start": None, "end": None, "score": 5.0, "null_score": 6.0}
    assert ask(1.0, 2.0, 3.0, 3.0, built)["text"] == "fox is blue"
    assert ask(-2.0, 2.0, 3.0, 2.0, built)["text"] == ""
    assert ask(None, 2.0, 3.0, 3.0, built)["text"] == ""
    assert ask(0.0, 2.0, 3.0, 0.0, built, max_answer_length=2)["text"] in ("fox", "blue", "is blue", "fox is")


def test_the_best_window_and_the_lowest_no_answer_score_are_used(built):
    far = "the sky is red and green " * 6 + "The fox is blue. " + "one two three four " * 6
    said = ask(0.0, 2.0, 3.0, 1.0, built, context=far)
    assert said["text"] == "fox is blue"
    assert far[said["start"] : said["end"]] == "fox is blue"
    assert said["null_score"] == 2.0


def test_no_answer_is_never_predicted_if_every_training_row_has_an_answer(built, tmp_path):
    config, about = AutoConfig.from_pretrained(built("bert")), generative(style="extractive")
    for threshold, rows in ((math.inf, ANSWERED), (0.0, ROWS)):
        write_jsonl(tmp_path / f"{threshold}.jsonl", rows)
        prepared = prepare(tmp_path, f"{threshold}.jsonl", "qa", str(threshold), deduplicate="exact")
        assert EXTRACTIVE_QA.infer_labels(about, prepared, config).qa.null_score_diff_threshold == threshold
    assert ask(1e30, 2.0, 3.0, 99.0, built)["text"] == "fox is blue"


# RoBERTa's positions begin after the padding token's number


def test_the_context_of_roberta_is_512_and_not_514(built):
    assert context_length(RobertaConfig(max_position_embeddings=514)) == 512
    tokenizer = AutoTokenizer.from_pretrained(built("roberta"))
    model = AutoModelForQuestionAnswering.from_pretrained(built("roberta"))
    assert context_length(model.config) == families.LONGEST
    about, row = recipe_with({"stride": 8}, max_length=families.LONGEST), unanswered("cat", "red " * 600)
    (windows,) = EXTRACTIVE_QA.encode([{**row, "answers": []}], tokenizer, about)
    batch = EXTRACTIVE_QA.collator(tokenizer, about)(windows[:1], 0)
    assert batch["input_ids"].shape == (1, families.LONGEST)
    with torch.no_grad():
        assert torch.isfinite(EXTRACTIVE_QA.loss(model, batch).sum)


def test_windows_longer_than_the_context_are_refused_with_the_number_to_set(built, tmp_path):
    sections = {
        "data": {"max_length": families.LONGEST + 2},
        "qa": {"stride": 8},
        "generation": {"max_new_tokens": None},
    }
    rows = [*ROWS, unanswered("cat", "red " * 600)]
    with pytest.raises(DataError, match=f"the context of .* is {families.LONGEST}") as caught:
        run_recipe(tmp_path, built("roberta"), rows, "qa", **sections)
    assert f"data.max_length: {families.LONGEST}" in caught.value.problems[0].fix


# Generated answers


ROW = {"question": "Which?", "context": "The fox is blue.", "answers": [{"text": "blue", "start": 11}]}


def generative(**section):
    return recipe_with(section or None)


def test_an_encoder_decoder_reads_question_and_context_and_writes_words_for_no_answer(built):
    tokenizer = AutoTokenizer.from_pretrained(built("t5"))
    form = VARIANTS["qa"][1]
    about = generative(no_answer="none at all")
    ((one,), (two,)) = form.encode([ROW, {**ROW, "answers": []}], tokenizer, about)
    assert tokenizer.decode(one.input_ids, skip_special_tokens=True) == "question: Which? context: The fox is blue."
    assert tokenizer.decode(one.target_ids, skip_special_tokens=True) == "blue"
    assert one.target_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(two.target_ids, skip_special_tokens=True) == "none at all"
    ((own,),) = form.encode([ROW], tokenizer, generative(prompt="{context} {question}"))
    assert tokenizer.decode(own.input_ids, skip_special_tokens=True) == "The fox is blue. Which?"


def test_a_decoder_is_prompted_with_the_ids_of_training(tiny_llama):
    tokenizer, form, about = AutoTokenizer.from_pretrained(tiny_llama), VARIANTS["qa"][2], generative()
    for row, answer in ((ROW, "blue"), ({**ROW, "answers": []}, "unanswerable")):
        ((example,),) = form.encode([row], tokenizer, about)
        start, end = example.spans
        assert form.prompt_ids(form.split_answer(row)[0], tokenizer, about) == example.input_ids[:start]
        assert tokenizer.decode(example.input_ids[start:end], skip_special_tokens=True) == answer
        asked = tokenizer.decode(example.input_ids[:start])
        assert "The fox is blue." in asked
        assert "Question: Which?" in asked
        assert "say unanswerable if" in asked


def test_braces_in_a_context_are_unchanged(built):
    tokenizer, form = AutoTokenizer.from_pretrained(built("t5")), VARIANTS["qa"][1]
    row = {**ROW, "context": "{question} {x} {no_answer} is blue.", "answers": []}
    ((example,),) = form.encode([row], tokenizer, generative())
    read = tokenizer.decode(example.input_ids, skip_special_tokens=True)
    assert read.endswith("context: {question} {x} {no_answer} is blue.")


def test_the_words_for_no_answer_count_as_none_whatever_their_case(built):
    about = generative(no_answer="Unknown.")
    wanted = [[], [], ["blue"], ["unknown"]]
    given = EvalPrediction(["unknown", "Unknown. ", "Unknown.", "blue"], wanted)
    found = qa.VARIANTS[1].compute_metric("exact_match", given, about)
    assert found.value == 0.5
    assert qa.VARIANTS[1].compute_metric("loss", given, about) is None


# Variants


def test_the_variant_follows_the_model_and_an_unsupported_style_is_refused(built, tiny_llama):
    def form(folder, **section):
        variant = choose_variant(generative(**section), AutoConfig.from_pretrained(folder), "this model")
        return variant.model_kind.auto_class

    assert form(built("bert")) == form(built("modernbert"), style="extractive") == "AutoModelForQuestionAnswering"
    assert form(built("t5")) == "AutoModelForSeq2SeqLM"
    assert form(tiny_llama) == form(tiny_llama, style="generative") == "AutoModelForCausalLM"
    with pytest.raises(RecipeError, match="cannot be used for the task qa, which needs AutoModelForQuestion") as caught:
        form(tiny_llama, style="extractive")
    assert caught.value.exit_code == 2
    with pytest.raises(RecipeError, match="needs AutoModelForSeq2SeqLM or AutoModelForCausalLM"):
        form(built("bert"), style="generative")


def test_a_task_formats_its_rows_for_display():
    task = get_task("qa")
    prompt, answer = task.split_answer(ROW)
    assert (prompt["answers"], answer) == (None, "blue")
    assert task.split_answer({**ROW, "answers": []})[1] == "(no answer)"
    assert task.reference(ROW) == ["blue"]
    assert task.format_prediction({"text": "", "start": None}) == "(no answer)"
    assert task.make_row({"prompt": "Which?", "context": "c"}) == {
        "question": "Which?",
        "context": "c",
        "answers": None,
    }


@pytest.mark.slow
def test_answers_that_are_longer_than_the_model_may_give_are_counted_with_a_length_that_fits_all(tmp_path):
    rows = [dict(row) for row in ANSWERED[:40]]
    for row in rows[:5]:
        row["answers"] = {"text": [row["context"].split(".")[0]], "answer_start": [0]}  # four words
    for row in rows[5:8]:
        row["answers"] = {"text": ["The sky"], "answer_start": [row["context"].index("The sky")]}
    sections = {"qa": {"max_answer_length": 2, "stride": 16}, "train": {"max_steps": 1, "num_train_epochs": None}}
    sections |= {"data": {"validation": 0.2, "test": 0.3}, "generation": {"max_new_tokens": None}}
    report = run_recipe(tmp_path, families.build_bert(tmp_path / "model"), rows, "qa", **sections)
    found = report["data"]["long_answers"]
    assert (found["key"], found["limit"], sum(found["rows"].values())) == ("qa.max_answer_length", 2, 5)
    assert found["longest"] == 4
    text = (tmp_path / "run/report.md").read_text()
    assert "5 answers have more than 2 tokens (" in text
    assert "so the model can never give them. Set `qa.max_answer_length: 4`." in text
    again = {**sections, "qa": {"max_answer_length": 4, "stride": 16}}
    assert run_recipe(tmp_path / "more", tmp_path / "model", rows, "qa", **again)["data"]["long_answers"] == {}
