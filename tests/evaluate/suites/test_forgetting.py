import contextlib
import json
import math
from collections import Counter
from importlib import resources
from itertools import accumulate

import pytest
import torch
from support import families
from support.benchmark_tasks import CHOOSE
from support.models import train_tokenizer
from support.runs import write_recipe
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from llmtune.errors import DataError, RecipeError
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.metric import PairedMeasures
from llmtune.evaluate.suites.forgetting import ForgettingSuite, make_passages, make_text, read_questions, read_texts
from llmtune.evaluate.suites.lm_eval import quietly
from llmtune.evaluate.suites.suite_registry import check_variant
from llmtune.launch.dry_run import dry_run
from llmtune.pipeline import run_pipeline
from llmtune.recipe.eval_suites_section import ForgettingSection
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from llmtune.tasks.registry import VARIANTS


def study(bench, **section):
    """The study comparing the bench's base model with itself, or with a model that learned the rows."""
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
    """The guide of transformers: windows that start half a window apart, each token scored once."""
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


def test_perplexity_equals_that_of_a_plain_loop_over_windows(bench, tmp_path):
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


@pytest.mark.needs("lm_eval")
def test_accuracy_equals_that_of_lm_eval(bench, tmp_path, tiny_llama):
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = (resources.files("llmtune.evaluate.suites") / "general" / "questions.jsonl").read_text()
    (tmp_path / "questions.jsonl").write_text(rows)
    (tmp_path / "choose.yaml").write_text(CHOOSE)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    settings = {"pretrained": str(tiny_llama), "dtype": "float32"}
    with contextlib.chdir(tmp_path), quietly():
        results = lm_eval.simple_evaluate("hf", settings, tasks=["chosen_colours"], task_manager=manager, device="cpu")
    expected = results["results"]["chosen_colours"]
    found = ask(bench, texts=(), questions=("own",))
    assert found.tuned == {"accuracy": expected["acc,none"], "accuracy_norm": expected["acc_norm,none"]}
    assert 0 < found.tuned["accuracy"] < 1
    assert found.tuned["accuracy"] != found.tuned["accuracy_norm"]
    assert "lm-eval's acc;" in found.signatures["accuracy"]


def test_a_model_tuned_on_little_else_is_found_to_have_forgotten(bench, tmp_path):
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


def test_questions_longer_than_the_context_are_skipped_and_reported(bench, tmp_path):
    rows = [{"question": "word " * 3000, "choices": ["a", "b"], "answer": "b"}]
    rows += [{"question": "Short?", "choices": ["yes", "no"], "answer": 0}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = ask(bench, texts=(), questions=(str(tmp_path / "q.jsonl"),))
    assert found.difference["accuracy"].n == 1
    assert "1 questions skipped: longer than the model's context" in found.signatures["accuracy"]


def test_a_model_that_is_not_a_decoder_is_refused_before_inputs_are_read(tmp_path, console):
    families.build_t5(tmp_path / "t5")
    rows = [{"document": f"The {i}th fox jumps over {i} dogs.", "summary": f"fox {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"task": "summarize", "evaluate": {"metrics": None, "forgetting": {}}}
    recipe = write_recipe(tmp_path / "recipe.yaml", "./t5", "rows.jsonl", **settings)
    for start in (dry_run, run_pipeline):
        with pytest.raises(RecipeError, match="is not a decoder language model") as found:
            start(load_recipe(str(recipe)), RunRequest(out=tmp_path / "out"), console)
        assert "evaluate.forgetting" in str(found.value)
    assert "encode" not in console.file.getvalue()
    forms = {form.model_kind.auto_class: form for form in VARIANTS["summarize"]}
    check_variant(load_recipe(str(recipe)).recipe, forms["AutoModelForCausalLM"], "llama")


# Questions as they are read

GOOD = '{"question": "a?", "choices": ["x", "y"], "answer": "y"}'


def test_the_shipped_questions_have_no_pattern():
    questions = read_questions(("own",))
    assert len(questions) == len({question.question for question in questions}) == 100
    assert Counter(question.right for question in questions) == {0: 25, 1: 25, 2: 25, 3: 25}
    assert set(Counter(question.topic for question in questions).values()) == {10}
    right = [len(question.choices[question.right]) for question in questions]
    wrong = [len(one) for question in questions for i, one in enumerate(question.choices) if i != question.right]
    assert all(len(question.choices) == 4 for question in questions)
    assert sum(right) / len(right) == pytest.approx(sum(wrong) / len(wrong), rel=0.05)


BAD_QUESTIONS = [
    ("{", "Invalid JSON"),
    ('{"question": "a?", "choices": ["x", "x"], "answer": 0}', "two choices are equal"),
    ('{"question": "a?", "choices": ["x", " "], "answer": 0}', "choices.1: empty text"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": 2}', "'answer' is 2; use a choice"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": "z"}', "'answer' is 'z'; use a choice"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": 0, "label": 0}', "label: Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("line", "told"), BAD_QUESTIONS)
def test_an_invalid_question_line_is_reported(tmp_path, line, told):
    (tmp_path / "q.jsonl").write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(DataError, match=r"q\.jsonl:3") as found:
        read_questions((str(tmp_path / "q.jsonl"),))
    assert told in str(found.value)


OFFSETS = "offset_mapping"


def test_each_token_is_scored_once_and_counts_for_its_paragraph(bench):
    texts = [
        make_text("a", "One two.\n\n \nÄ three four.\r\n\r\nfive"),
        make_text("b", "x" * 5000),
        *read_texts(["own"]),
    ]
    found = make_passages(texts, bench.processor, 40)
    places = [place for window in found.paragraphs for place in window]
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
    assert all(len(window.input_ids) <= 40 for window in found.windows)
    firsts = [window.spans[0] for window in found.windows if len(window.input_ids) == 40]
    assert all(first >= 20 for first in firsts if first != 1)


def test_windows_begin_with_the_start_token_if_the_tokenizer_adds_one():
    tokenizer = train_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    text = make_text("a", "The quick brown fox jumps over the lazy dog. " * 20)
    found = make_passages([text], tokenizer, 33)
    ids = tokenizer("".join(text.paragraphs), add_special_tokens=False)["input_ids"]
    assert all(window.input_ids[0] == start and start not in window.input_ids[1:] for window in found.windows)
    assert sum(found.tokens) == len(ids)
    assert found.sizes.sum() == len("".join(text.paragraphs))


def test_a_tokenizer_without_offsets_encodes_each_paragraph():
    text = make_text("a", "One.\n\nTwo, three.")
    found = make_passages([text], ByT5Tokenizer(), None)
    assert found.tokens.tolist() == [5, 11]
    assert found.sizes.tolist() == [5, 11]


def test_the_shipped_texts_are_of_several_kinds():
    texts = read_texts(["own"])
    assert [text.name for text in texts] == ["dictionary", "everyday", "novel", "play", "report"]
    assert all(2000 < sum(map(len, text.paragraphs)) < 4000 for text in texts)
    assert sum(len(text.paragraphs) for text in texts) > 60


def test_unreadable_texts_are_reported_all_at_once(tmp_path):
    (tmp_path / "latin.txt").write_bytes("one\ntwo\ncafé".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(DataError) as found:
        read_texts([str(tmp_path / name) for name in ("latin.txt", "empty.txt", "missing.txt")])
    told = str(found.value)
    assert "latin.txt:3" in told
    assert "0xe9" in told
    assert "no text found" in told
    assert "missing.txt: file not found" in told
