import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.judging import ScriptedJudge, draw_answers, write_labelled
from support.runs import FAST, finish_run, invoke, write_recipe, write_sums
from support.serving import load_served, serving

from llmtune.errors import DataError, EnvironmentProblem
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.inference import Answers
from llmtune.evaluate.metric import PairedMeasures
from llmtune.evaluate.suites import endpoint_client, judge_client
from llmtune.evaluate.suites.judge import JudgeSuite, read_labelled
from llmtune.evaluate.suites.judge_client import Judge, parse_verdict, write_question
from llmtune.launch.python_api import names_remote, studies_remote
from llmtune.recipe.eval_suites_section import JudgeSection
from llmtune.recipe.loader import load_recipe

KEY = "sk-none-of-your-business-1234567890"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endpoint_client, "RETRIES", 1)
    for name in ("LLMTUNE_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def suite_for(folder, url, pairs, labelled=None, **section):
    """A suite with the answers of both models, as an evaluation in `folder` makes it."""
    (folder / "evaluation").mkdir(exist_ok=True)
    named = {"labelled": str(write_labelled(folder / "labelled.jsonl", labelled))} if labelled else {}
    section = JudgeSection(endpoint=url, **{"model": "scripted", **named, **section})
    recipe = SimpleNamespace(evaluate=SimpleNamespace(judge=section), seed=3)
    rows = range(len(pairs))
    inputs = SimpleNamespace(
        answered=rows,
        origins=[f"t:{i}" for i in rows],
        prompts=[f"prompt {i}" for i in rows],
        clusters=(),
        pictured=frozenset(),
    )
    console = Console(file=io.StringIO(), width=200)
    suite = JudgeSuite(EvalContext(recipe, None, None, inputs, "cpu", console, folder / "evaluation"))
    tuned, base = ({i: pair[side] for i, pair in enumerate(pairs)} for side in (0, 1))
    suite.row_answers = {"tuned": Answers(None, tuned, {}), "base": Answers(None, base, {})}
    return suite


def own_table(study):
    """The table of the judge itself: by measure, values and intervals on test rows and labelled pairs."""
    table = next(one for one in study.tables if one.title == "The judge itself")
    return {row[0].partition(":")[0]: row[1:] for row in table.rows}


def costs(study):
    return dict(next(one for one in study.tables if one.title == "Questions to the judge").rows)


def within(cell, value):
    low, high = map(float, cell.split(" to "))
    return low <= value <= high


def test_a_judge_that_calls_every_row_a_tie_cannot_tell(tmp_path):
    judge = ScriptedJudge(word=lambda verdict: "Verdict: tie")
    with judge.serving() as url:
        study = suite_for(tmp_path, url, [*draw_answers(60, 1, win=0.7), ("same", "same")]).compare(PairedMeasures())
        equal = suite_for(tmp_path, url, [("same", "same")] * 60).compare(PairedMeasures())
    change, own = study.difference["win_rate"], study.intervals["win_rate"]
    assert (change.low, change.high, own.low, own.high) == (-1, 1, 0, 1)
    assert change.test == own.test == "the judge called every row a tie"
    assert study.verdict == "The judge cannot tell: it called every row a tie in both orders."
    assert equal.intervals["win_rate"].low > 0.45, "equal answers are a tie that nobody judged"


def test_the_known_biases_of_a_judge_are_measured_and_corrected(tmp_path):
    judge = ScriptedJudge(position=0.2, length=0.2, error=0.1)
    test, labelled = draw_answers(80, 1, win=0.7, longer=0.75), draw_answers(80, 2, win=0.5, tie=0.05)
    with judge.serving() as url:
        study = suite_for(tmp_path, url, test, labelled).compare(PairedMeasures())
    asked = judge.requests[1:]  # after the check of the endpoint
    assert len(asked) == 2 * 160
    assert all(one["temperature"] == 0 and one["seed"] == 3 and one["model"] == "scripted" for one in asked)
    assert not any("base" in str(one) or "tuned" in str(one) for one in asked)
    own = own_table(study)
    for column in (1, 3):
        assert within(own["inconsistent"][column], 0.2)
        assert within(own["first_position"][column], 0.6)
    assert within(own["length_bias"][3], 0.2)
    assert within(own["error_rate"][3], (0.6 * 0.1 + 0.2 * 0.5) / 0.8)
    truth = sum((1 + better) / 2 for _, _, better in test) / len(test)
    change = study.difference["win_rate"]
    assert (1 + change.low) / 2 <= truth <= (1 + change.high) / 2
    assert study.tuned["win_rate"] == pytest.approx((1 + change.value) / 2)
    assert study.base["win_rate"] + study.tuned["win_rate"] == pytest.approx(1)
    assert "corrected for its errors on 80 labelled pairs" in study.verdict
    assert costs(study)["prompt tokens"] == "32,000"
    assert costs(study)["completion tokens"] == "3,200"
    assert costs(study)["model, as the endpoint names it"] == "scripted-1"


def test_without_labelled_pairs_the_verdict_says_that_nobody_judged_the_judge(tmp_path):
    with ScriptedJudge().serving() as url:
        study = suite_for(tmp_path, url, draw_answers(20, 1, win=1.0)).compare(PairedMeasures())
    assert study.tuned["win_rate"] == 1
    assert "prefers the tuned model" in study.verdict
    assert "The judge's accuracy is unknown: set evaluate.judge.labelled" in study.verdict
    assert "not corrected" in study.signatures["win_rate"]
    assert set(study.base) == {"win_rate"}
    assert "agreement" not in own_table(study)


def test_a_judge_that_answers_at_random_cannot_tell(tmp_path):
    judge = ScriptedJudge(error=0.5)
    with judge.serving() as url:
        suite = suite_for(tmp_path, url, draw_answers(30, 1, win=0.8), draw_answers(20, 2, win=0.5))
        study = suite.compare(PairedMeasures())
    assert (study.difference["win_rate"].low, study.difference["win_rate"].high) == (-1, 1)
    assert "The judge cannot tell: on 20 labelled pairs" in study.verdict


def test_equal_answers_are_a_tie_that_is_not_asked_about(tmp_path):
    judge = ScriptedJudge()
    with judge.serving() as url:
        suite = suite_for(tmp_path, url, [("same", "same ", 0), ("is worth 2", "is worth 1", 1)])
        study = suite.compare(PairedMeasures())
    assert len(judge.requests) == 1 + 2
    assert study.tuned["win_rate"] == 0.75
    assert study.tuned["ties"] == 0.5


# Replies


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: A", "A"),
        ("A is short.\nB is right.\n\nVerdict: B\n", "B"),
        ("**Verdict:** tie", "tie"),
        ("final verdict: answer b.", "B"),
        ("[[A]]", "A"),
        ("B", "B"),
        ('{"verdict": "tie"}', "tie"),
        ('Reasons.\n{"reason": "x", "verdict": "B"}', "B"),
        ('```json\n{\n"verdict": "A"\n}\n```', "A"),
        *(
            (text, None)
            for text in ("", "C", "A or B", "Answer A is better.", "Verdict: A\nNo, wait.", "Verdict: A, B")
        ),
        *((text, None) for text in ("The verdict is A", '{"winner": "A"}', "1", "[" * 100_000)),
    ],
)
def test_a_verdict_is_a_last_line_or_json_and_nothing_else(text, verdict):
    assert parse_verdict(text) == verdict


def test_replies_without_a_verdict_get_one_reminder_and_are_counted(tmp_path):
    judge = ScriptedJudge(word=lambda verdict: "I cannot decide." if verdict == "A" else f"Verdict: {verdict}")
    pairs = [("is worth 2", "is worth 1", 1)] * 3 + [("is worth 1", "is worth 1!", 0)]
    pairs = [(f"{i} {first}", f"{i} {second}", better) for i, (first, second, better) in enumerate(pairs)]
    with judge.serving() as url:
        study = suite_for(tmp_path, url, pairs).compare(PairedMeasures())
    assert costs(study)["without a verdict"] == costs(study)["asked again after a reply without a verdict"] == "3"
    assert len(judge.requests) == 1 + 8 + 3
    assert study.difference["win_rate"].n == 1
    assert "1 of 4 rows" in study.signatures["win_rate"]
    reminded = [one["messages"] for one in judge.requests if len(one["messages"]) == 3]
    assert all(messages[1]["content"] == "I cannot decide." for messages in reminded)


def test_a_judge_that_never_gives_a_verdict_measures_nothing(tmp_path):
    judge = ScriptedJudge(word=lambda verdict: "Hmm.")
    with judge.serving() as url:
        study = suite_for(tmp_path, url, draw_answers(4, 1, win=0.5)).compare(PairedMeasures())
    assert study.tuned == {}
    assert study.signatures["win_rate"] == "not measured: no reply about 4 rows has a verdict"
    assert costs(study)["without a verdict"] == "8"


# Endpoints that fail


def test_after_a_failure_nothing_is_asked_again(tmp_path):
    broken = (503, {"error": {"message": "overloaded"}}, {})
    judge = ScriptedJudge(fails=lambda number: broken if number > 12 else None)
    pairs = draw_answers(20, 1, win=0.6)
    with judge.serving() as url:
        suite = suite_for(tmp_path, url, pairs)
        with pytest.raises(EnvironmentProblem, match="status 503") as raised:
            suite.compare(PairedMeasures())
        assert raised.value.exit_code == 4
        assert "the same command continues" in str(raised.value)
        known = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
        assert len(known) == 11  # and the check of the endpoint
        with (tmp_path / "judge.jsonl").open("a") as file:
            file.write('{"key": "cut off by a ki')
        judge.fails, judge.requests = lambda number: None, []
        study = suite_for(tmp_path, url, pairs).compare(PairedMeasures())
        assert len(judge.requests) == 40 - 11
        again = suite_for(tmp_path, url, pairs).compare(PairedMeasures())
        assert len(judge.requests) == 40 - 11
    assert again == study
    saved = [json.loads(line) for line in (tmp_path / "evaluation" / "judge.jsonl").read_text().splitlines()]
    assert len(saved) == 40
    assert {"messages", "texts", "verdict", "model", "prompt_tokens", "completion_tokens"} <= saved[0].keys()


def test_another_question_or_model_asks_anew(tmp_path):
    judge, pairs = ScriptedJudge(), draw_answers(3, 1, win=0.6)
    with judge.serving() as url:
        for section in ({}, {"question": "Which one is more polite?"}, {"model": "another"}):
            judge.requests = []
            suite_for(tmp_path, url, pairs, **section).compare(PairedMeasures())
            assert len(judge.requests) >= 6
            if "question" in section:
                assert all("Which one is more polite?" in str(one) for one in judge.requests)


def test_a_busy_endpoint_is_asked_again(tmp_path):
    busy = (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})
    judge = ScriptedJudge(fails=lambda number: busy if number == 3 else None)
    with judge.serving() as url:
        study = suite_for(tmp_path, url, draw_answers(2, 1, win=0.6)).compare(PairedMeasures())
    assert study.difference["win_rate"].n == 2


def test_parameters_that_the_endpoint_does_not_know_are_left_out(tmp_path):
    def fails(number):
        unknown = set(judge.requests[number - 1]) - {"model", "messages", "max_completion_tokens", "temperature"}
        return (400, {"error": {"message": f"unknown {sorted(unknown)}"}}, {}) if unknown else None

    judge = ScriptedJudge(fails=fails)
    with judge.serving() as url:
        study = suite_for(tmp_path, url, draw_answers(4, 1, win=0.6)).compare(PairedMeasures())
    assert study.difference["win_rate"].n == 4
    assert len(judge.requests) < 8 + 8
    assert set(judge.requests[-1]) == {"model", "messages"}


def test_a_question_that_the_endpoint_refuses_is_counted(tmp_path):
    def fails(number):
        refused = "prompt 1\n" in str(judge.requests[number - 1]["messages"][0]["content"])
        return (400, {"error": {"message": "too long"}}, {}) if refused else None

    judge = ScriptedJudge(fails=fails)
    with judge.serving() as url:
        study = suite_for(tmp_path, url, draw_answers(4, 1, win=0.6)).compare(PairedMeasures())
    assert study.difference["win_rate"].n == 3
    assert costs(study)["refused by the endpoint"] == "2"


@pytest.mark.parametrize(
    ("body", "words"),
    [(b"<html>", "shape"), ({"choices": []}, "shape"), ({"choices": [{"message": {"content": ["a"]}}]}, "shape")],
)
def test_an_answer_of_another_shape_is_an_error(tmp_path, body, words):
    with (
        ScriptedJudge(fails=lambda number: (200, body, {})).serving() as url,
        pytest.raises(EnvironmentProblem, match=words),
    ):
        suite_for(tmp_path, url, draw_answers(2, 1, win=0.6))


# Keys and hosts


def test_the_key_is_sent_and_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_JUDGE", KEY)
    judge = ScriptedJudge(
        fails=lambda number: (401, {"error": {"message": f"bad key {KEY}"}}, {}) if number > 3 else None
    )
    with judge.serving() as url:
        suite = suite_for(tmp_path, url, draw_answers(4, 1, win=0.6), api_key_env="MY_JUDGE")
        with pytest.raises(EnvironmentProblem, match="rejects the API key") as raised:
            suite.compare(PairedMeasures())
    assert all(one["authorization"] == f"Bearer {KEY}" for one in judge.headers)
    assert KEY not in str(raised.value)
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_openais_key_goes_to_openai_only(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge = ScriptedJudge()
    with judge.serving() as url:
        Judge(JudgeSection(endpoint=url, model="m"), 0).check()
    assert KEY not in str(judge.headers)
    monkeypatch.setenv("LLMTUNE_JUDGE_KEY", "own")
    with judge.serving() as url:
        Judge(JudgeSection(endpoint=url, model="m"), 0).check()
    assert judge.headers[-1]["authorization"] == "Bearer own"
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LLMTUNE_JUDGE_KEY")
    assert Judge(JudgeSection(endpoint="https://api.openai.com/v1", model="m"), 0).key == KEY
    versioned = Judge(JudgeSection(endpoint="https://example.com/v1beta/openai", model="m"), 0)
    with versioned.connected() as client:
        assert str(client.base_url) == "https://example.com/v1beta/openai/"
    assert versioned.key is None


def test_a_missing_key_and_a_remote_judge_offline_are_refused(monkeypatch):
    with pytest.raises(EnvironmentProblem, match="NO_SUCH_KEY is not set"):
        Judge(JudgeSection(endpoint="http://localhost:1", model="m", api_key_env="NO_SUCH_KEY"), 0)
    with pytest.raises(EnvironmentProblem, match=r"example\.com is asked over the network, which --offline"):
        Judge(JudgeSection(endpoint="https://example.com", model="m"), 0).check()


@pytest.mark.parametrize(("url", "remote"), [("https://example.com", True), ("http://127.0.0.1:9", False)])
def test_only_a_remote_judge_needs_the_network(here, tiny_llama, url, remote):
    recipe = write_judged(here, tiny_llama, url)
    assert names_remote(load_recipe(recipe).recipe) == studies_remote(load_recipe(recipe).recipe) == remote
    done = invoke("run", recipe, "--out", "run", "--offline")
    assert done.exit_code == 4
    assert ("which --offline forbids" in done.output) == remote


# Labelled pairs


def test_labelled_pairs_are_read_from_any_table(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('question,answer_a,answer_b,label\n"1 + 1",2,3,a\n"1 + 1",3,2,B\nx,y,z, Tie \n')
    pairs = read_labelled(str(path))
    assert [(pair.prompt, pair.first, pair.people, pair.cluster) for pair in pairs] == [
        ("1 + 1", "2", 1.0, 0),
        ("1 + 1", "3", -1.0, 0),
        ("x", "y", 0.0, 1),
    ]


def test_bad_labelled_rows_are_listed_with_their_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "p", "answer_a": "a", "answer_b": "b", "label": "A"}
    rows = [good, {**good, "label": "left"}, {**good, "answer_b": 5}, {"prompt": "p"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    with pytest.raises(DataError) as raised:
        read_labelled(str(path))
    text = str(raised.value)
    for words in (
        "pairs.jsonl:2: the label is 'left'",
        "pairs.jsonl:3: no text in answer_b",
        "pairs.jsonl:5: not valid",
    ):
        assert words in text
    assert "pairs.jsonl:4: no text in answer_a, answer_b, label" in text
    assert "pairs.jsonl:1" not in text
    path.write_text("")
    with pytest.raises(DataError, match="no labelled pair found"):
        read_labelled(str(path))
    for name, words in (("none.jsonl", "file not found"), ("a.txt", "not that of a table")):
        (tmp_path / "a.txt").touch()
        with pytest.raises(DataError, match=words):
            read_labelled(str(tmp_path / name))


def test_texts_cannot_break_out_of_the_question():
    (message,) = write_question("Which {one}?", "{prompt}", "{answer_b}", "plain")
    assert "Which {one}?" in message["content"]
    assert "<answer_a>\n{answer_b}\n</answer_a>" in message["content"]


# Runs


def write_judged(folder, tiny_llama, url, **evaluate):
    write_sums(folder / "rows.jsonl")
    write_labelled(folder / "labelled.jsonl", draw_answers(12, 2, win=0.5))
    judge = {"endpoint": url, "model": "scripted", "labelled": "labelled.jsonl"}
    sections = {"metrics": ["loss"], "judge": judge, **evaluate}
    return write_recipe(folder / "tiny.yaml", tiny_llama, "rows.jsonl", train=FAST, evaluate=sections)


def test_a_run_is_judged_gated_and_reported(here, tiny_llama):
    judge, gates = (
        ScriptedJudge(),
        ["judge.win_rate.low > base - 2.5", "judge.agreement.low >= 0.5", "judge.win_rate.high > 0.1"],
    )
    with judge.serving() as url:
        recipe = write_judged(here, tiny_llama, url, gates=gates)
        done = invoke("run", recipe, "--out", "run")
        assert done.exit_code == 0, done.output
        asked = len(judge.requests)
        assert invoke("run", recipe, "--out", "run").exit_code == 0
        assert len(judge.requests) == asked
    assert "on 12 labelled pairs" in " ".join(done.output.split())
    lock = json.loads((here / "run" / "llmtune.lock").read_text())
    assert lock["judge"] == {"model": "scripted", "host": url.removeprefix("http://")}
    report = json.loads((here / "run" / "report.json").read_text())
    assert report["evaluation"]["studies"]["judge"]["tuned"]["agreement"] == 1
    assert "labelled pairs" in report["verdict"]["reason"]
    page = (here / "run" / "report.md").read_text()
    assert "The judge itself" in page
    assert "judge.win_rate" in page


def test_a_judge_that_is_down_ends_the_run_before_training(here, tiny_llama):
    recipe = write_judged(here, tiny_llama, "http://127.0.0.1:9")
    done = invoke("run", recipe, "--out", "run")
    assert done.exit_code == 4
    assert "does not answer" in done.output
    assert not (here / "run" / "adapter").exists()
    (here / "labelled.jsonl").write_text("{}\n")
    assert invoke("run", recipe, "--out", "run").exit_code == 3


def test_a_served_run_without_a_clue_is_counted_as_such(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(judge_client, "REPLY_TOKENS", 4)
    run = finish_run(tmp_path / "made", tiny_llama, train=FAST)
    with serving(*load_served(judge=run).values()) as url:
        study = suite_for(tmp_path, url, draw_answers(2, 1, win=0.6), model="judge").compare(PairedMeasures())
    assert costs(study)["without a verdict"] == costs(study)["questions"] == "4"
    assert (
        costs(study)["refused by the endpoint"]
        == costs(study)["replies whose tokens the endpoint did not count"]
        == "0"
    )
    assert int(costs(study)["prompt tokens"].replace(",", "")) > 8 * 100
    assert 8 <= int(costs(study)["completion tokens"]) <= 8 * 4


def test_a_judge_of_rows_with_pictures_is_said_to_read_text_alone(tmp_path):
    with ScriptedJudge().serving() as url:
        suite = suite_for(tmp_path, url, [("is worth 2", "is worth 1", 1)])
    assert "pictures" not in suite.limits()
    suite.context.inputs.pictured = frozenset({0})
    assert "The judge reads text alone: it does not see the pictures" in suite.limits()
