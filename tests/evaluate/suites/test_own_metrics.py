"""Metrics in the user's own files: read without importing them, run in a process of their own, used like any other."""

import io
import json
import re
import resource
import shutil
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from support.classifying import colour_rows, recipe_for, run
from support.runs import finish_run, invoke, write_recipe, write_sums

from llmtune.errors import GateFailed, RecipeError
from llmtune.evaluate.opened_runs import open_run_scores, pair_measures
from llmtune.evaluate.per_row_scores import load_measures
from llmtune.evaluate.suites.own_metrics import (
    Failure,
    OwnMetricSuite,
    describe_failure,
    list_own_metrics,
    read_metric,
    run_metric,
)
from llmtune.pipeline import run_pipeline
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.gate_grammar import RESERVED
from llmtune.recipe.loader import load_recipe
from llmtune.records import Json, Row
from llmtune.store.run_request import RunRequest
from llmtune.store.verification import verify_run

PAIRS: list[tuple[Row, object]] = [({"n": 1}, "one"), ({"n": 2}, "two"), ({"n": 3}, "three")]


def write_metric(folder: Path, body: str, returns: str = "float", head: str = "from typing import Annotated") -> Path:
    """Write `metrics.py` with one function `mine`, whose body starts at line 4 or after `head`."""
    path = folder / "metrics.py"
    lines = body.strip().replace("\n", "\n    ")
    path.write_text(f"{head}\n\ndef mine(row: dict, answer: str) -> {returns}:\n    {lines}\n")
    return path


def run_on_pairs(folder: Path, body: str, returns: str = "float", **section: object) -> list[float] | Failure:
    """Run a metric with this body on three pairs."""
    path = write_metric(folder, body, returns)
    section = {"metrics": (f"{path}:mine",), "metric_seconds": 20, **section}
    return run_metric(read_metric(f"{path}:mine"), PAIRS, EvaluateSection.model_validate(section))


def test_a_metric_gets_row_and_answer_and_its_values_come_back_in_order(tmp_path: Path) -> None:
    assert run_on_pairs(tmp_path, "return row['n'] * 10 + len(answer)") == [13, 23, 35]
    assert run_on_pairs(tmp_path, "return row['n'] > 1", "bool") == [0, 1, 1]
    assert run_on_pairs(tmp_path, "import numpy\nreturn numpy.float32(row['n'])") == [1, 2, 3]
    assert run_on_pairs(tmp_path, "print('noise', answer)\nreturn 0.5") == [0.5, 0.5, 0.5]


def test_a_metric_that_changes_the_row_changes_only_its_copy(tmp_path: Path) -> None:
    before = json.dumps(PAIRS)
    assert run_on_pairs(tmp_path, "row['n'] += 1\nrow.pop('n')\nreturn len(row)") == [0, 0, 0]
    assert json.dumps(PAIRS) == before


@pytest.mark.parametrize(
    ("body", "returns", "what"),
    [
        ("return float('nan') if row['n'] == 2 else 1.0", "float", "it returned nan, which is not a finite number"),
        ("return float('inf') if row['n'] == 2 else 1.0", "float", "it returned inf, which is not a finite number"),
        ("return None if row['n'] == 2 else 1.0", "float", "it returned None, which is not a finite number"),
        (
            "return 1e308 if row['n'] == 2 else 1.0",
            "float",
            "it returned 1e+308, which is not a finite number of at most 1e+30",
        ),
        ("return 'yes' if row['n'] == 2 else 1.0", "float", "it returned 'yes', which is not a finite number"),
        ("return 0.5 if row['n'] == 2 else True", "bool", "it returned 0.5, but is annotated to return bool"),
        ("return row['n'] * 0.6", "Annotated[float, 0, 1]", "it returned 1.2, but is annotated to return numbers"),
    ],
)
def test_a_value_that_is_no_number_of_its_kind_is_refused_with_its_row(
    tmp_path: Path, body: str, returns: str, what: str
) -> None:
    found = run_on_pairs(tmp_path, body, returns)
    assert isinstance(found, Failure)
    assert found.what.startswith(what)
    assert found.pair == 1


def test_an_exception_names_the_row_and_the_line(tmp_path: Path) -> None:
    body = "checked = len(answer)\nif row['n'] == 3:\n    return row['missing']\nreturn checked"
    assert run_on_pairs(tmp_path, body) == Failure("it raised KeyError: 'missing'", 2, 6)


@pytest.mark.parametrize(
    "body",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', 9))\nreturn 1.0",
        "import socket\nsocket.socket()\nreturn 1.0",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9/')\nreturn 1.0",
        "import socket\ntry:\n    socket.gethostbyname('localhost')\nexcept Exception:\n    pass\nreturn 1.0",
    ],
)
def test_a_metric_has_no_network_even_if_it_catches_the_error(tmp_path: Path, body: str) -> None:
    found = run_on_pairs(tmp_path, body)
    assert isinstance(found, Failure)
    assert (found.what, found.pair) == ("it used the network", 0)
    assert found.line in (5, 6)


def test_the_recipe_may_allow_the_network(tmp_path: Path) -> None:
    body = "import socket\nsocket.socket().close()\nreturn 1.0"
    assert run_on_pairs(tmp_path, body, metric_network=True) == [1, 1, 1]


def test_a_local_socket_pair_as_of_asyncio_is_no_network(tmp_path: Path) -> None:
    body = "import asyncio\nasync def work(): return 2.0\nreturn asyncio.run(work())"
    assert run_on_pairs(tmp_path, body) == [2, 2, 2]


def test_a_metric_that_sleeps_ends_at_its_limit_with_row_and_line(tmp_path: Path) -> None:
    started = time.monotonic()
    body = "import time\nif row['n'] == 2:\n    time.sleep(600)\nreturn 1.0"
    found = run_on_pairs(tmp_path, body, metric_seconds=1.0)
    assert found == Failure("it took more than 1 s", 1, 6)
    assert time.monotonic() - started < 10


def test_an_exception_that_mentions_the_network_has_the_usual_fix(tmp_path: Path) -> None:
    path = tmp_path / "metrics.py"
    path.write_text("def mine(row, answer) -> bool: ...")
    failure = Failure("it raised ValueError: the neural network took more than one argument", 0, 1)
    assert describe_failure(read_metric(f"{path}:mine"), failure, ["rows.jsonl:1"]).fix == "Correct the function."


def test_a_metric_that_hides_from_its_limit_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtune.evaluate.suites.own_metrics.GRACE_SECONDS", 1.0)
    body = "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nif row['n'] == 2:\n    time.sleep(600)"
    found = run_on_pairs(tmp_path, f"{body}\nreturn 1.0", metric_seconds=0.5)
    assert found == Failure("it took more than 0.5 s", 1, None)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("raise SystemExit(0)", "it raised SystemExit: 0"),
        ("import os\nos._exit(3)", "its process ended with status 3"),
        ("import os\nos.kill(os.getpid(), 9)", "its process was killed by SIGKILL"),
        ("import os\nos.kill(os.getpid(), 40)", "its process was killed by signal 40"),
    ],
)
def test_a_metric_cannot_end_unseen(tmp_path: Path, body: str, what: str) -> None:
    found = run_on_pairs(tmp_path, body)
    assert isinstance(found, Failure)
    assert (found.what, found.pair) == (what, 0)
    fix = describe_failure(read_metric(f"{write_metric(tmp_path, body)}:mine"), found, ["rows.jsonl:1"]).fix
    assert fix is not None
    assert fix.startswith("Run the command again") == ("killed" in what), "the function may be right"


def test_random_numbers_and_sets_are_the_same_each_time(tmp_path: Path) -> None:
    body = "import random\nreturn random.random() + float([*{'a', 'b', 'c', 'd', 'e'}].index('c'))"
    assert run_on_pairs(tmp_path, body) == run_on_pairs(tmp_path, body)


def test_a_metric_does_not_see_the_files_next_to_it(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("")
    path = write_metric(tmp_path, "return 1.0", head="import neighbour")
    found = run_metric(read_metric(f"{path}:mine"), [], EvaluateSection())
    assert found == Failure("importing its file raised ModuleNotFoundError: No module named 'neighbour'", None, 1)


# What a metric leaves behind

CHILD = "import subprocess\nsubprocess.Popen(['sleep', '987'], stdout={out}, start_new_session={alone})\nreturn 1.0"
FORK = "import os, time\nif row['n'] == 2 and os.fork() == 0:\n    {session}time.sleep(987)\nreturn 1.0"


def sleepers() -> list[str]:
    """Return processes of the tests that sleep, wherever they are in the tree of processes."""
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    lines = [(one.pid, one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
    return [" ".join(words) for pid, words in lines if words[:2] == ["sleep", "987"] or (pid in mine and words)]


@pytest.mark.parametrize(
    "body",
    [
        *(CHILD.format(out=out, alone=alone) for out in (None, "subprocess.DEVNULL") for alone in (False, True)),
        FORK.format(session=""),
        FORK.format(session="os.setsid()\n    "),
        "import threading, time\nthreading.Thread(target=time.sleep, args=(987,)).start()\nreturn 1.0",
        "import atexit, time\natexit.register(time.sleep, 987)\nreturn 1.0",
    ],
)
def test_processes_and_threads_that_a_metric_leaves_are_ended_at_once(tmp_path: Path, body: str) -> None:
    before, started = sleepers(), time.monotonic()
    assert run_on_pairs(tmp_path, body) == [1, 1, 1]
    assert time.monotonic() - started < 5
    assert sleepers() == before


def test_a_child_of_a_metric_that_takes_too_long_is_ended_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtune.evaluate.suites.own_metrics.GRACE_SECONDS", 0.5)
    before = sleepers()
    body = CHILD.format(out=None, alone=True).replace("return 1.0", "import signal, time\n")
    body += "signal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(986)\nreturn 1.0"
    assert run_on_pairs(tmp_path, body, metric_seconds=0.5) == Failure("it took more than 0.5 s", 0, None)
    assert sleepers() == before


@pytest.mark.parametrize("where", ["1", "2"])
def test_prints_of_a_metric_are_not_kept(tmp_path: Path, where: str) -> None:
    body = f"import os\nblock = b'x' * 2**20\nfor _ in range(150):\n    os.write({where}, block)\nreturn 1.0"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run_on_pairs(tmp_path, body) == [1, 1, 1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


PIPE = "import os\nfor pipe in range(3, 9):\n    try:\n        {write}\n    except OSError:\n        pass\nreturn 1.0"


@pytest.mark.parametrize(
    "written",
    [
        *(b"garbage\n", b"\xff\xfe\n", b"5\n", b"[]\n", b"null\n", b"{}\n", b'{"value": "x"}\n', b'{"value": NaN}\n'),
        *(
            b'{"value": 1e999}\n',
            b'{"value": true}\n' * 9,
            b'{"error": 5, "line": null}\n',
            b'{"value": 1' + b"0" * 400,
        ),
        *(b"[" * 5000 + b"\n", b"9" * 5000 + b"\n", b'{"value": 1}\n' * 9, b'{"error": "x", "line": "y"}\n'),
    ],
)
def test_garbage_among_the_values_of_a_metric_is_a_failure(tmp_path: Path, written: bytes) -> None:
    found = run_on_pairs(tmp_path, PIPE.format(write=f"os.write(pipe, {written!r})"))
    assert isinstance(found, Failure)
    assert "into the pipe of its values" in found.what


def test_endless_output_among_the_values_ends_at_its_limit(tmp_path: Path) -> None:
    found = run_on_pairs(tmp_path, PIPE.format(write="while True: os.write(pipe, b'x' * 2**16)"))
    assert isinstance(found, Failure)
    assert (
        found.what == "it wrote more than 65,728 bytes into the pipe of its values; print to stdout or stderr instead"
    )


@pytest.mark.parametrize(
    "text",
    [
        f"x = {'(' * 150}1{')' * 150}\ndef mine(row, answer) -> bool: return {'-' * 9_000}1",
        f"def mine(row, answer) -> bool: return {'+'.join(['1'] * 100_000)}",
        f"def mine(row, answer) -> {'|'.join(['int'] * 5_000)}: return 1",
        f"def mine(row, answer) -> bool: return {'not ' * 100_000}1",
        f"def mine(row, answer) -> bool: return a{'.a' * 100_000}",
        "def mine(row, answer) -> bool: return '\0'",
    ],
)
def test_a_file_with_deep_expressions_is_refused_or_fails(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.py"
    path.write_text(text)
    with suppress(RecipeError):
        found = run_metric(read_metric(f"{path}:mine"), PAIRS, EvaluateSection(metric_seconds=20))
        assert isinstance(found, Failure)


# Reading a file without importing it


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("def mine(row, answer): return 1.0", "mine does not state what it returns"),
        ("def mine(row, answer) -> str: return ''", "mine is annotated to return str"),
        ("def mine(row) -> bool: return True", "mine cannot be called with a row and an answer"),
        ("def mine(row, answer, more) -> bool: return True", "mine cannot be called with a row and an answer"),
        ("def mine(row, answer, *, more) -> bool: return True", "mine cannot be called with a row and an answer"),
        ("def mino(row, answer) -> bool: return True", "no function 'mine'"),
        ("def mine(row, answer) -> bool\n    return True", "not Python"),
        ("mine = 3", "no function 'mine'"),
    ],
)
def test_a_function_that_is_no_metric_is_refused_without_importing_it(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "metrics.py"
    path.write_text(f"import os\nos._exit(1)\n{text}\n")
    with pytest.raises(RecipeError, match=what):
        read_metric(f"{path}:mine")


def test_the_first_line_of_a_docstring_has_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "k3y-0123456789")
    file = write_metric(tmp_path, '"""Score with k3y-0123456789 and hf_abcdefghijklmnopqrstuvwxyz."""\nreturn 1.0')
    assert read_metric(f"{file}:mine").summary == "Score with [removed] and [removed]."


def test_the_kind_comes_from_the_annotation(tmp_path: Path) -> None:
    path, kinds = tmp_path / "metrics.py", {"bool": "bool", "float": "number", "int": "number"}
    kinds |= {"'bool'": "bool", "Annotated[float, 0, 1]": "share", "typing.Annotated[float, 0.0, 1.0]": "share"}
    for returns, kind in kinds.items():
        path.write_text(f"def mine(row, answer, *more) -> {returns}:\n    '''What it is.\n\n    More.\n    '''\n")
        assert (read_metric(f"{path}:mine").kind, read_metric(f"{path}:mine").summary) == (kind, "What it is.")


def test_all_bad_files_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def one(row) -> bool: ...")
    section = EvaluateSection(metrics=(f"{tmp_path}/a.py:one", f"{tmp_path}/b.py:two"))
    with pytest.raises(RecipeError) as error:
        list_own_metrics(section)
    assert len(error.value.problems) == 2


def test_a_file_that_cannot_be_imported_ends_the_run_before_it_begins(tmp_path: Path, tiny_llama: Path) -> None:
    path = write_metric(tmp_path, "return 1.0", head="raise ImportError('no such thing')")
    write_sums(tmp_path / "rows.jsonl")
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_llama, "rows.jsonl", evaluate={"metrics": ["metrics.py:mine"]})
    with pytest.raises(RecipeError, match="no such thing") as error:
        OwnMetricSuite.read(load_recipe(recipe).recipe)
    assert error.value.problems[0].where == f"{path}:1"
    result = invoke("run", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert not (tmp_path / "run" / "run.json").exists()


# In a run

METRICS = """
from typing import Annotated


def has_digit(row: dict, answer: str) -> bool:
    "The answer contains a digit."
    return any(letter.isdigit() for letter in answer)


def right_letters(row: dict, answer: str) -> Annotated[float, 0, 1]:
    wanted = row["messages"][-1]["content"]
    return sum(letter in answer for letter in wanted) / len(wanted)


def length_cost(row: dict, answer: str) -> int:
    return abs(len(answer) - len(row["messages"][-1]["content"]))
"""
OWN = [f"../metrics.py:{name}" for name in ("has_digit", "right_letters", "length_cost")]
GATES = ["has_digit >= 0", "length_cost <= 10000", "length_cost.high < base"]
EVALUATE = {"metrics": ["loss", *OWN], "gates": GATES, "when_unsure": "pass"}


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with three metrics of its own."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "metrics.py").write_text(METRICS)
    with suppress(GateFailed):
        finish_run(folder / "recipe", tiny_llama, evaluate=EVALUATE)
    return folder / "recipe" / "runs" / "tiny"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, with its recipe, rows and metrics, which a test may change."""
    shutil.copytree(finished.parents[2], tmp_path / "own")
    return tmp_path / "own" / finished.relative_to(finished.parents[2])


def run_again(run: Path) -> str:
    """Run the recipe of a copied run again in the same folder, and return its output."""
    output = io.StringIO()
    with suppress(GateFailed):
        run_pipeline(load_recipe(run.parents[1] / "tiny.yaml"), RunRequest(out=run), Console(file=output, width=200))
    return output.getvalue()


def test_own_metrics_are_paired_gated_and_in_every_report(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    gates, report = {gate["name"]: gate for gate in report["gates"]}, report["evaluation"]
    for name in ("has_digit", "right_letters", "length_cost"):
        change = report["difference"][name]
        assert change["value"] == pytest.approx(report["tuned"][name] - report["base"][name])
        assert (change["interval"] == [None, None]) == (name == "length_cost")  # no range, and fewer than ten rows
        assert f"tuned.{name}" in (finished / "junit.xml").read_text()
    assert report["signatures"]["has_digit"].startswith("The answer contains a digit. (metrics.py, sha256 ")
    assert report["flips"]["has_digit"]["rows"] == report["rows"]
    assert gates["length_cost <= 10000"]["passed"]
    assert "too few for an interval" in gates["length_cost.high < base"]["note"]
    assert "Annotated[float, 0, 1]" in report["signatures"]["length_cost"]
    assert re.search("length_cost.{0,99}lower is better", (finished / "report.html").read_text(), re.DOTALL)


@pytest.mark.promise("metric", "referee", equal="the function on the saved answers", place="own (bool)")
@pytest.mark.promise("metric", "referee", equal="the function on the saved answers", place="own (share)")
@pytest.mark.promise("metric", "referee", equal="the function on the saved answers", place="own (number)")
def test_values_are_those_of_the_saved_answers(finished: Path) -> None:
    answered = [*map(json.loads, (finished / "evaluation" / "predictions.jsonl").read_text().splitlines())]
    measures = load_measures(finished / "evaluation").tuned
    costs = [abs(len(line["tuned"]) - len(line["reference"])) for line in answered]
    assert measures["length_cost"].sums_NK[:, 0].tolist() == costs
    assert len({*costs}) > 1
    tuned = [line["tuned"] for line in answered]
    wanted = [line["reference"] for line in answered]
    shares = [sum(a in text for a in want) / len(want) for text, want in zip(tuned, wanted, strict=True)]
    assert measures["right_letters"].sums_NK[:, 0].tolist() == shares
    assert measures["has_digit"].sums_NK[:, 0].tolist() == [any(map(str.isdigit, text)) for text in tuned]
    assert measures["length_cost"].bounds is None
    assert measures["right_letters"].bounds is not None
    assert measures["has_digit"].right_wrong


def test_reference_answers_are_tried_before_training(copied: Path) -> None:
    shutil.rmtree(copied)
    told = run_again(copied)
    assert "evaluate.metrics: has_digit is 1.000 on the reference answers of" in told
    assert told.index("length_cost is") < told.index("\ntrain")
    (copied.parents[2] / "metrics.py").write_text(METRICS.replace("/ len(wanted)", "/ (len(wanted) - len(answer))"))
    shutil.rmtree(copied)
    with pytest.raises(RecipeError, match=r"right_letters: it raised ZeroDivisionError: .*, on the row .*rows.jsonl:"):
        run_again(copied)
    assert not (copied / "adapter").exists()


def test_an_edited_file_is_evaluated_again_without_training_or_generating(copied: Path) -> None:
    path = copied.parents[2] / "metrics.py"
    run_again(copied)
    trained = (copied / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert "evaluate unchanged, skipped" in run_again(copied)
    path.write_text(METRICS.replace("return abs", "return 1000 + abs"))
    (finding,) = [one for one in verify_run(copied).failed if one.kind == "metrics"]
    assert (finding.name, finding.state) == (str(path), "changed")
    told = run_again(copied)
    assert "base: reusing its answers" in told
    assert "tuned: reusing its answers" in told
    assert (copied / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == trained
    assert json.loads((copied / "report.json").read_text())["evaluation"]["tuned"]["length_cost"] >= 1000
    assert not verify_run(copied).failed


def test_a_metric_that_fails_loses_nothing(copied: Path, finished: Path) -> None:
    path = copied.parents[2] / "metrics.py"
    wrong = "    if answer != row['messages'][-1]['content']:\n        raise ValueError('too long')\n    return abs"
    path.write_text(METRICS.replace("    return abs", wrong))
    for _ in range(2):  # the failure is not forgotten
        with pytest.raises(RecipeError, match=r"length_cost: it raised ValueError: too long, on the row .*:") as error:
            run_again(copied)
    assert error.value.problems[0].where == f"{path}:17"
    report, before = (json.loads((run / "report.json").read_text())["evaluation"] for run in (copied, finished))
    assert report["difference"]["loss"] == before["difference"]["loss"]
    assert report["difference"]["has_digit"] == before["difference"]["has_digit"]
    assert "length_cost" not in report["difference"]
    assert report["signatures"]["length_cost"].startswith("not measured: length_cost: it raised ValueError")
    path.write_text(METRICS)
    told = run_again(copied)
    assert "tuned: reusing its answers" in told
    assert json.loads((copied / "report.json").read_text())["evaluation"]["tuned"] == before["tuned"]


def test_runs_measured_with_another_file_are_not_compared_in_its_metrics(finished: Path, copied: Path) -> None:
    (copied.parents[2] / "metrics.py").write_text(METRICS + "\n# edited\n")
    run_again(copied)
    pairs, left_out = pair_measures(open_run_scores(finished, "one"), open_run_scores(copied, "two"))
    assert "loss" in pairs
    assert left_out["has_digit"].startswith("measured with another file")


def test_a_classifier_gives_label_and_scores_and_a_row_has_the_columns_of_slices(tmp_path: Path, built: Any) -> None:
    metrics = """
def right_in_big(row: dict, answer: dict) -> bool:
    assert row["size"] in ("big", "small")
    scores = answer["scores"]
    assert max(scores, key=scores.get) == answer["label"] and abs(sum(scores.values()) - 1) < 1e-4
    return answer["label"] == row["label"] and row["size"] == "big"
"""
    (tmp_path / "metrics.py").write_text(metrics)
    rows = [{**row, "size": "big" if i % 2 else "small"} for i, row in enumerate(colour_rows())]
    evaluate = {"metrics": ["accuracy", "metrics.py:right_in_big"], "slices": ["size"], "gates": ["right_in_big >= 0"]}
    recipe = recipe_for(tmp_path / "r.yaml", built("bert"), rows, evaluate=evaluate)
    report, _ = run(recipe)
    assert report["gates"][0]["passed"]
    scored = {part["value"]: part["tuned"] for part in report["evaluation"]["slices"]["size"]}
    assert scored["big"]["right_in_big"] == scored["big"]["accuracy"] > 0
    assert scored["small"]["right_in_big"] == 0


# In a recipe


@pytest.mark.parametrize(
    ("evaluate", "what"),
    [
        ({"metrics": ["metrics.py"]}, "unknown metric 'metrics.py'"),
        ({"metrics": ["metrics.py:accuracy"]}, "'accuracy' is the name of one of llmtune's metrics"),
        *(({"metrics": [f"m.py:{name}"]}, f"'{name}' is the name of one of llmtune's") for name in sorted(RESERVED)),
        ({"metrics": ["metrics.py:no-name"]}, "'no-name' cannot be the name of a metric"),
        ({"metrics": ["metrics.py:one", "other.py:one"]}, "names a metric twice"),
        ({"metrics": ["loss"], "metric_seconds": 5.0}, "'evaluate.metric_seconds' has no effect"),
        ({"metrics": ["loss"], "metric_network": True}, "'evaluate.metric_network' has no effect"),
        ({"metrics": ["metrics.py:one"], "gates": ["two > 0.5"]}, "the gate 'two > 0.5' uses an unknown metric"),
    ],
)
def test_a_recipe_refuses_what_cannot_be_a_metric(tmp_path: Path, evaluate: Json, what: str) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", "model", "rows.jsonl", evaluate=evaluate)
    with pytest.raises(RecipeError, match=re.escape(what)):
        load_recipe(recipe)


def test_masked_models_give_no_answers_to_measure(tmp_path: Path) -> None:
    masked = {"task": "completion", "completion": {"objective": "masked"}, "evaluate": {"metrics": ["metrics.py:one"]}}
    recipe = write_recipe(tmp_path / "tiny.yaml", "model", "rows.jsonl", generation=None, **masked)
    with pytest.raises(RecipeError, match=r"with completion.objective: masked a model gives none"):
        load_recipe(recipe)


def test_checking_a_recipe_reads_the_file_and_does_not_import_it(tmp_path: Path, tiny_llama: Path) -> None:
    write_sums(tmp_path / "rows.jsonl")
    write_metric(tmp_path, "return 1.0", head="import os; os._exit(1)")
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_llama, "rows.jsonl", evaluate={"metrics": ["metrics.py:mine"]})
    assert invoke("recipes", "check", recipe).exit_code == 0
    (tmp_path / "metrics.py").unlink()
    checked = invoke("recipes", "check", recipe)
    assert checked.exit_code == 2
    assert "Check the path: it is relative to the recipe file" in checked.output
    assert load_recipe(recipe).recipe.evaluate.own_metrics == {"mine": f"{tmp_path}/metrics.py:mine"}


@pytest.mark.parametrize("key", ["metric_seconds", "metric_network"])
def test_a_recipe_with_a_reward_of_its_own_may_set_the_limits(tmp_path: Path, key: str) -> None:
    evaluate = {"metrics": ["reward"], key: 5.0 if key == "metric_seconds" else True}
    for rewards, obeys in (({"rewards.py:mine": 1.0}, True), ({"exact_match": 1.0}, False)):
        sections: Json = {"task": "reinforce", "reinforce": {"rewards": rewards}, "evaluate": evaluate}
        recipe = write_recipe(tmp_path / "tiny.yaml", "model", "rows.jsonl", **sections)
        with nullcontext() if obeys else pytest.raises(RecipeError, match=f"'evaluate.{key}' has no effect"):
            load_recipe(recipe)
