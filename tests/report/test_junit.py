"""Test gates as JUnit XML, read back by an independent parser."""

from dataclasses import replace

import pytest
from junitparser import Failure, Skipped
from junitparser.xunit2 import JUnitXml

from llmtune.errors import RecipeError
from llmtune.records import Difference
from llmtune.report.junit import error_to_junit, to_junit
from llmtune.store.score_records import Champion, Contamination, SimpleBaseline, Study


def read(report):
    xml = JUnitXml.fromstring(to_junit(report).encode())
    (suite,) = list(xml)
    return xml, suite


def test_each_gate_is_a_test_case_and_a_failed_gate_names_the_wanted_value(report):
    xml, suite = read(report)
    assert (xml.tests, xml.failures, xml.errors) == (suite.tests, suite.failures, suite.errors) == (2, 1, 0)
    assert suite.name == "llmtune.support-tickets"
    assert suite.time == pytest.approx(71.5)
    passed, failed = list(suite)
    assert passed.name == "choice_accuracy.low > base"
    assert passed.classname == failed.classname == "llmtune.gates"
    assert passed.is_passed
    (result,) = failed.result
    assert isinstance(result, Failure)
    assert result.type == "GateFailed"
    assert result.message == "wanted exact_match >= 0.9, got 0.8"
    assert named(failed) == {"wanted": "exact_match >= 0.9", "got": "0.8"}


def test_the_scores_of_a_simple_baseline_are_properties(report):
    simple = SimpleBaseline("tfidf", "TF-IDF", {"choice_accuracy": 0.5}, {}, {"choice_accuracy": 0.75}, "")
    _, suite = read(replace(report, evaluation=replace(report.evaluation, simple_baselines={"tfidf": simple})))
    assert named(suite)["tfidf.choice_accuracy"] == "0.5000"


def test_an_inconclusive_gate_is_skipped_with_a_reason(report):
    gate = replace(report.gates[1], passed=None, note="inconclusive: 8 rows are too few")
    _, suite = read(replace(report, gates=(report.gates[0], gate)))
    assert (suite.tests, suite.failures, suite.skipped) == (2, 0, 1)
    (result,) = list(suite)[1].result
    assert isinstance(result, Skipped)
    assert result.message == "wanted exact_match >= 0.9, got 0.8; inconclusive: 8 rows are too few"


def named(element):
    return {one.name: one.value for one in element.properties()}


def test_verdict_and_scores_are_properties_of_the_suite(report, headed):
    suite = Study("Forgetting", {"perplexity": 20.0}, {"perplexity": 21.5}, {}, {}, {})
    overlap = Contamination(148, 9, 0, 0, 0, 0, 0, 3, 0, {}, (), ())
    evaluation = replace(report.evaluation, studies={"forgetting": suite}, contamination=overlap)
    found = named(read(replace(report, evaluation=evaluation))[1])
    assert found["verdict"].startswith("better: Better in")
    assert (found["base.exact_match"], found["tuned.exact_match"]) == ("0.0000", "0.8000")
    assert (found["base.forgetting.perplexity"], found["tuned.forgetting.perplexity"]) == ("20.00", "21.50")
    assert found["overlapping_test_rows"] == "3 of 148"
    assert named(read(headed)[1])["baseline"] == "the most frequent class"


def test_a_run_without_gates_is_a_suite_without_cases(report):
    xml, suite = read(replace(report, gates=(), evaluation=None))
    assert (xml.tests, list(suite)) == (0, [])


def test_special_and_invalid_xml_characters_are_handled(report):
    gate = replace(report.gates[1], name='a<b & \x00\ufffe "c" > base', got="]]>")
    (failed,) = list(read(replace(report, gates=(gate,)))[1])
    assert failed.name == 'a<b & \ufffd\ufffd "c" > base'
    assert failed.result[0].message.endswith("got ]]>")


def test_each_score_has_the_number_of_its_rows(report):
    own = {"decided_error": Difference(0.15, 0.1, 0.2, 1, 244)}
    champion = Champion(
        "first",
        {"decided_error": 0.0},
        {"decided_error": Difference(0.14, 0.1, 0.2, 0.01, 280)},
        {},
        tuned={"decided_error": 0.14},
        rows=280,
    )
    tuned = {**report.evaluation.tuned, "decided_error": 0.15}
    evaluation = replace(report.evaluation, rows=289, tuned=tuned, intervals=own, champion=champion)
    found = named(read(replace(report, evaluation=evaluation))[1])
    assert (found["tuned.decided_error"], found["tuned.decided_error.rows"]) == ("0.1500", "244")
    both = [found[f"{model}.decided_error"] for model in ("champion", "tuned_against_champion")]
    assert (both, found["champion.decided_error.rows"]) == (["0.0000", "0.1400"], "280")


def test_an_error_has_no_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-of-mine")
    written = error_to_junit("run", RecipeError.of("it raised s3cr3t-of-mine", "a.py:3", "Correct it."))
    assert "it raised [removed]" in written
    assert "s3cr3t" not in written
