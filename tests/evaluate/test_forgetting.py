from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from importlib import resources
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from support import families
from support.models import train_tokenizer
from support.runs import write_recipe
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from llmtune.errors import DataError, GateFailed, RecipeError
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.eval_suites import check_variant
from llmtune.evaluate.forgetting import ForgettingSuite
from llmtune.evaluate.metric import PairedMeasures
from llmtune.evaluate.multiple_choice import read_questions
from llmtune.evaluate.perplexity import make_passages, make_text, read_texts
from llmtune.pipeline import run_pipeline
from llmtune.recipe import load_recipe
from llmtune.recipe.eval_suites_section import ForgettingSection
from llmtune.session import Options
from llmtune.tasks import VARIANTS

OFFSETS = "offset_mapping"


def study(bench, **section):
    """The study of the bench's base model beside itself, or beside a model that learned the rows."""
    recipe = bench.recipe.model_copy(
        update={"evaluate": bench.recipe.evaluate.model_copy(update={"forgetting": ForgettingSection(**section)})}
    )
    return ForgettingSuite(EvalContext(recipe, bench.task, bench.processor, None, "cpu", bench.console))


def ask(bench, **section):
    suite = study(bench, **section)
    suite.run("base", bench.load())
    suite.outputs["tuned"] = suite.outputs["base"]
    return suite.compare(PairedMeasures())


def plain_perplexity(model, ids, longest=512):
    """As the guide of transformers does it: windows that begin half a window apart, each token scored once."""
    nats, scored, done = 0.0, 0, 0
    for begin in range(0, len(ids), longest // 2):
        end = min(begin + longest, len(ids))
        window, labels = torch.tensor([ids[begin:end]]), torch.tensor([ids[begin:end]])
        labels[:, : max(0, done - begin)] = -100
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nats += float(model(window, labels=labels).loss) * count
        scored, done = scored + count, end
        if end == len(ids):
            break
    return nats, scored


def test_perplexity_is_that_of_a_plain_loop_over_windows(bench, tmp_path):
    text = "\n\n".join(f"The {i}th fox, {i * 37 % 100} years old, jumps over the lazy dog." for i in range(60))
    (tmp_path / "long.txt").write_text(text + "\n")
    found = ask(bench, texts=(str(tmp_path / "long.txt"),), questions=())
    ids = bench.processor(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 1200
    nats, scored = plain_perplexity(bench.load(), ids)
    assert scored == len(ids) - 1
    assert found.tuned["perplexity"] == pytest.approx(math.exp(nats / scored), rel=1e-5)
    size = len(text.encode()) - len(bench.processor.decode(ids[:1]).encode())
    assert found.tuned["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert set(found.tuned) == {"perplexity", "bits_per_byte"}
    assert found.difference["perplexity"].n == 60


def test_the_tokens_of_a_text_are_scored_once_and_count_for_their_paragraph(bench):
    texts = [
        make_text("a", "One two.\n\n \nÄ three four.\r\n\r\nfive"),
        make_text("b", "x" * 5000),
        *read_texts(["own"]),
    ]
    found = make_passages(texts, bench.processor, 40)
    places = [place for window in found.windows for place in window.paragraphs]
    assert Counter(places) == {i: n for i, n in enumerate(found.tokens.astype(int).tolist()) if n}
    assert places == sorted(places)
    assert found.text_of[:6] == (0, 0, 0, 1, 1, 1)
    for number, text in enumerate(texts):
        ids = bench.processor("".join(text.paragraphs), add_special_tokens=False)["input_ids"]
        counts = [found.tokens[i] for i, own in enumerate(found.text_of) if own == number]
        assert sum(counts) == len(ids) - 1
        begins = [left for left, _ in bench.processor("".join(text.paragraphs), return_offsets_mapping=True)[OFFSETS]]
        ends = list(accumulate(map(len, text.paragraphs)))
        for begin, end, count in zip([1, *ends], ends, counts, strict=False):
            assert sum(begin <= left < end for left in begins) == count
    assert all(len(window.ids) <= 40 for window in found.windows)
    assert all(window.first >= 20 for window in found.windows if len(window.ids) == 40 and window.first != 1)


def test_windows_begin_with_the_start_token_where_the_tokenizer_puts_one():
    tokenizer = train_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    text = make_text("a", "The quick brown fox jumps over the lazy dog. " * 20)
    found = make_passages([text], tokenizer, 33)
    ids = tokenizer("".join(text.paragraphs), add_special_tokens=False)["input_ids"]
    assert all(window.ids[0] == start and start not in window.ids[1:] for window in found.windows)
    assert sum(found.tokens) == len(ids)
    assert found.sizes.sum() == len("".join(text.paragraphs))


def test_a_tokenizer_without_offsets_reads_each_paragraph():
    text = make_text("a", "One.\n\nTwo, three.")
    found = make_passages([text], ByT5Tokenizer(), None)
    assert found.tokens.tolist() == [5, 11]
    assert found.sizes.tolist() == [5, 11]


def plain_answers(model, processor, path):
    """Which choice has the highest log-likelihood, and which by its characters; one text after the other."""
    likeliest, by_length, answers = [], [], []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = f"Question: {row['question']}\nAnswer:"
        before, scores = len(processor(prompt)["input_ids"]), []
        for choice in row["choices"]:
            ids = torch.tensor([processor(f"{prompt} {choice}")["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[i - 1, ids[0, i]]) for i in range(before, ids.shape[1])))
        likeliest.append(scores.index(max(scores)))
        lengths = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        by_length.append(lengths.index(max(lengths)))
        answers.append(row["answer"])
    return [sum(map(int.__eq__, said, answers)) / len(answers) for said in (likeliest, by_length)]


def test_accuracy_is_that_of_a_plain_loop_over_choices(bench, tmp_path):
    file = tmp_path / "own.jsonl"
    lines = [line for line in own_lines() if len(line) < 140]
    file.write_text("\n".join(lines))
    found = ask(bench, texts=(), questions=(str(file),))
    wanted = plain_answers(bench.load(), bench.processor, file)
    assert [found.base["accuracy"], found.base["accuracy_norm"]] == pytest.approx(wanted)
    assert 0 < wanted[0] < 1
    assert wanted[0] != wanted[1]
    assert "lm-eval's acc;" in found.signatures["accuracy"]
    assert "lm-eval's acc_norm" in found.signatures["accuracy_norm"]


LM_EVAL = r"""
task: general
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.slow
def test_accuracy_is_that_of_lm_evals_command_line(bench, tmp_path, tiny_llama):
    (tmp_path / "questions.jsonl").write_text("\n".join(own_lines()) + "\n")
    (tmp_path / "general.yaml").write_text(LM_EVAL)
    model = f"dtype=float32,pretrained={tiny_llama}"
    command = [Path(sys.executable).with_name("lm_eval"), "--model", "hf", "--model_args", model, "--tasks", "general"]
    command += ["--include_path", ".", "--device", "cpu", "--output_path", "said"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    (file,) = (tmp_path / "said").rglob("results_*.json")
    told = json.loads(file.read_text())["results"]["general"]
    found = ask(bench, texts=(), questions=("own",)).tuned
    assert (found["accuracy"], found["accuracy_norm"]) == (told["acc,none"], told["acc_norm,none"])


def test_the_same_model_twice_has_forgotten_nothing(bench):
    found = ask(bench)
    assert set(found.tuned) == {"perplexity", "bits_per_byte", "accuracy", "accuracy_norm"} == set(found.difference)
    for change in found.difference.values():
        assert change.value == 0
        assert change.low <= 0 <= change.high
    assert found.difference["accuracy"].n == 100
    assert "15 kB of text and 100 questions" in found.limits
    assert [table.title for table in found.tables] == ["Perplexity of each text", "Questions answered right, by topic"]
    assert [row[0] for row in found.tables[0].rows] == ["dictionary", "everyday", "novel", "play", "report"]


def test_a_model_that_learned_little_else_is_seen_to_have_forgotten(bench, tmp_path):
    (tmp_path / "texts.txt").write_text("\n\n".join("".join(text.paragraphs) for text in read_texts(["own"])[:2]))
    suite = study(bench, texts=(str(tmp_path / "texts.txt"),), questions=("own",))
    base, tuned = bench.load(), bench.load()
    bench.teach(tuned)
    suite.run("base", base)
    suite.run("tuned", tuned)
    found = suite.compare(PairedMeasures())
    assert found.difference["perplexity"].low > 0
    assert found.difference["bits_per_byte"].low > 0
    assert found.better["perplexity"] == -1
    lost = found.tables[-1]
    assert lost.title.startswith("Right before, wrong now")
    questions = {question.question: question for question in read_questions(("own",))}
    for text, right, said in lost.rows:
        question = questions[text]
        assert right == question.choices[question.right]
        assert said in question.choices
        assert said != right


def test_questions_that_the_context_does_not_hold_are_left_out_and_told(bench, tmp_path):
    rows = [{"question": "word " * 3000, "choices": ["a", "b"], "answer": "b"}]
    rows += [{"question": "Short?", "choices": ["yes", "no"], "answer": 0}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = ask(bench, texts=(), questions=(str(tmp_path / "q.jsonl"),))
    assert found.difference["accuracy"].n == 1
    assert "1 questions longer than the model's context are left out" in found.signatures["accuracy"]


def own_lines():
    return (resources.files("llmtune.evaluate") / "general" / "questions.jsonl").read_text().splitlines()


def test_the_questions_that_come_with_llmtune_have_no_pattern():
    questions = read_questions(("own",))
    assert len(questions) == len({question.question for question in questions}) == 100
    assert Counter(question.right for question in questions) == {0: 25, 1: 25, 2: 25, 3: 25}
    assert set(Counter(question.topic for question in questions).values()) == {10}
    right = [len(question.choices[question.right]) for question in questions]
    wrong = [len(one) for question in questions for i, one in enumerate(question.choices) if i != question.right]
    assert all(len(question.choices) == 4 for question in questions)
    assert sum(right) / len(right) == pytest.approx(sum(wrong) / len(wrong), rel=0.05)


def test_the_texts_that_come_with_llmtune_are_of_several_kinds():
    texts = read_texts(["own"])
    assert [text.name for text in texts] == ["dictionary", "everyday", "novel", "play", "report"]
    assert all(2000 < sum(map(len, text.paragraphs)) < 4000 for text in texts)
    assert sum(len(text.paragraphs) for text in texts) > 60


BAD_QUESTIONS = [
    ("{", "Invalid JSON"),
    ("[1]", "Input should be an object"),
    ('{"question": "a?", "choices": ["x"], "answer": 0}', "choices: Tuple should have at least 2 items"),
    ('{"question": "a?", "choices": ["x", "x"], "answer": 0}', "two choices are equal"),
    ('{"question": "a?", "choices": ["x", 5], "answer": 0}', "choices.1: Input should be a valid string"),
    ('{"question": "a?", "choices": ["x", " "], "answer": 0}', "choices.1: there is no text"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": 2}', "'answer' is 2; name a choice"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": true}', "answer.int: Input should be a valid integer"),
    ('{"question": "a?", "choices": ["x", "y"]}', "answer: Field required"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": "z"}', "'answer' is 'z'; name a choice"),
    ('{"question": " ", "choices": ["x", "y"], "answer": 0}', "question: String should have at least 1 character"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": 0, "topic": 3}', "topic: Input should be a valid string"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": 0, "label": 0}', "label: Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("line", "told"), BAD_QUESTIONS)
def test_a_line_that_is_no_question_is_named(tmp_path, line, told):
    (tmp_path / "q.jsonl").write_text(f"{own_lines()[0]}\n\n{line}\n")
    with pytest.raises(DataError, match=r"q\.jsonl:3") as found:
        read_questions((str(tmp_path / "q.jsonl"),))
    assert told in str(found.value)


def test_texts_and_questions_that_cannot_be_read_are_told_all_at_once(tmp_path):
    (tmp_path / "latin.txt").write_bytes("one\ntwo\ncafé".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(DataError) as found:
        read_texts([str(tmp_path / name) for name in ("latin.txt", "empty.txt", "missing.txt")])
    told = str(found.value)
    assert "latin.txt:3" in told
    assert "0xe9" in told
    assert "there is no text in it" in told
    assert "missing.txt: there is no such file" in told
    (tmp_path / "latin.jsonl").write_bytes(b"\n\xe9")
    with pytest.raises(DataError) as found:
        read_questions([str(tmp_path / name) for name in ("latin.jsonl", "empty.txt", "missing.jsonl")])
    told = str(found.value)
    assert "latin.jsonl:2" in told
    assert "there is no question in it" in told
    assert "missing.jsonl: there is no such file" in told


REFUSED = [
    ("classify", {}, "models of task: classify give text none"),
    ("speech", {}, "models of task: speech give text none"),
    ("completion", {"completion": {"objective": "masked"}}, "only fills in words"),
    ("qa", {"qa": {"style": "extractive"}}, "only points at answers"),
    ("preference", {"preference": {"loss": "reward"}}, "only gives scores"),
]


@pytest.mark.parametrize(("task", "section", "told"), REFUSED)
def test_tasks_without_a_decoder_are_refused_by_name(tmp_path, task, section, told):
    settings = {"task": task, "generation": None, "evaluate": {"metrics": None, "forgetting": {}}, **section}
    with pytest.raises(RecipeError, match=r"evaluate\.forgetting") as found:
        load_recipe(str(write_recipe(tmp_path / "recipe.yaml", "./model", "rows.jsonl", **settings)))
    assert told in str(found.value)


BAD_SECTIONS = [
    ({"texts": [], "questions": []}, "measures nothing"),
    ({"texts": ["own", "own"]}, "names something twice"),
    ({"questions": ["hub:some/set"]}, "is not a file"),
]


@pytest.mark.parametrize(("section", "told"), BAD_SECTIONS)
def test_a_section_without_sense_is_refused(tmp_path, section, told):
    recipe = write_recipe(tmp_path / "recipe.yaml", "./model", "rows.jsonl", evaluate={"forgetting": section})
    with pytest.raises(RecipeError, match=told):
        load_recipe(str(recipe))


GATES = [
    ({"questions": []}, "forgetting.accuracy >= base", "about a metric that is not measured"),
    ({}, "forgetting.perplexiti <= base", "Did you mean 'perplexity'"),
    (None, "forgetting.perplexity <= base", "a study that is not made"),
]


@pytest.mark.parametrize(("section", "gate", "told"), GATES)
def test_a_gate_about_what_is_not_measured_is_refused(tmp_path, section, gate, told):
    evaluate = {"forgetting": section, "gates": [gate]}
    recipe = write_recipe(tmp_path / "recipe.yaml", "./model", "rows.jsonl", evaluate=evaluate)
    with pytest.raises(RecipeError, match=told):
        load_recipe(str(recipe))


def test_gates_of_a_study_hold_without_test_rows(tmp_path):
    settings = {"data": {"test": 0}, "evaluate": {"metrics": None, "forgetting": {}}}
    settings["evaluate"]["gates"] = ["forgetting.perplexity <= base * 1.05"]
    recipe = write_recipe(tmp_path / "recipe.yaml", "./model", "rows.jsonl", **settings)
    assert load_recipe(str(recipe)).recipe.evaluate.gates
    with pytest.raises(RecipeError, match="without test rows"):
        load_recipe(str(recipe), ["evaluate.gates=['loss < base']"])


@pytest.fixture
def run(tmp_path, tiny_llama, chat_rows, console):
    def go(**sections):
        write_recipe(tmp_path / "recipe.yaml", tiny_llama, chat_rows, **sections)
        return run_pipeline(load_recipe(str(tmp_path / "recipe.yaml")), Options(out=tmp_path / "out"), console)

    return go


def test_a_run_tells_of_a_missing_file_before_it_prepares_anything(run, tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt"):
        run(evaluate={"forgetting": {"texts": ["own", "gone.txt"]}})
    assert not (tmp_path / "out").exists()


def test_a_tuning_that_ruins_the_model_fails_a_gate_on_forgetting(run, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(read_texts(["own"])[1].paragraphs))
    gates = ["forgetting.perplexity <= base * 1.05", "forgetting.perplexity.low < base"]
    evaluate = {"metrics": None, "gates": gates, "forgetting": {"texts": ["text.txt"], "questions": []}}
    full = {"method": "full", "r": None, "lora_alpha": None}
    with pytest.raises(GateFailed, match=r"forgetting\.perplexity <= base \* 1\.05"):
        run(evaluate=evaluate, data={"test": 0}, adapter=full, train={"num_train_epochs": 8})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [gate["passed"] for gate in report["gates"]] == [False, False]
    found = report["evaluation"]["studies"]["forgetting"]
    assert found["tuned"]["perplexity"] > 1.05 * found["base"]["perplexity"]
    assert "forgetting.perplexity" in (tmp_path / "out" / "report.md").read_text()


def test_a_model_that_is_no_decoder_is_refused_before_anything_is_read_for_it(tmp_path, console):
    families.build_t5(tmp_path / "t5")
    rows = [{"document": f"The {i}th fox jumps over {i} dogs.", "summary": f"fox {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"task": "summarize", "evaluate": {"metrics": None, "forgetting": {}}}
    recipe = write_recipe(tmp_path / "recipe.yaml", "./t5", "rows.jsonl", **settings)
    for dry_run in (True, False):
        options = Options(out=tmp_path / "out", dry_run=dry_run)
        with pytest.raises(RecipeError, match="is no decoder language model") as found:
            run_pipeline(load_recipe(str(recipe)), options, console)
        assert "evaluate.forgetting" in str(found.value)
    assert "encode" not in console.file.getvalue()
    forms = {form.auto_class: form for form in VARIANTS["summarize"]}
    check_variant(load_recipe(str(recipe)).recipe, forms["AutoModelForCausalLM"], "llama")
