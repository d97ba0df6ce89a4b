"""Writes gates, or the error that ended a run, as JUnit XML for CI systems."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Tree  # only writes XML, so parser attacks do not apply

from llmtune.display.number_format import score
from llmtune.errors import GateFailed, LlmtuneError
from llmtune.evaluate.significance import outcome
from llmtune.recipe.secrets import redact_all
from llmtune.report.score_sections import describe_new_class
from llmtune.store.atomic_files import write_text
from llmtune.store.report_record import UNFINISHED, Report, ReportedExport, list_exports
from llmtune.store.run_folder import updating_reports

GATE_RESULTS = {True: ("", ""), False: ("failure", "GateFailed"), None: ("skipped", "GateUnsure")}
NOT_XML = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(report: Report) -> str:
    """Return one test suite with a test case per gate; verdict and all scores are its properties."""
    seconds = next((step.seconds for step in report.steps if step.name == "evaluate"), 0.0)
    suite = begin_suite(report.name, seconds)
    add_properties(suite, list_scores(report))
    for gate in report.gates:
        given = {"wanted": gate.wanted, "got": gate.got, **({"note": gate.note} if gate.note else {})}
        tag, kind = GATE_RESULTS[gate.passed] if gate.applies else ("skipped", "GateNotApplicable")
        add_case(suite, "gates", gate.name, (tag, kind, f"wanted {outcome(gate)}"), given)
    for one in list_exports(report.deploy):
        add_export(suite, one)
    if released := report.release:
        tag, current = "" if released["promoted"] else "skipped", {"current": released["current"] or ""}
        add_case(suite, "release", released["name"], (tag, "NotReleased", released["message"]), current)
    return write_suite(suite)


def add_export(suite: Tree.Element, export: ReportedExport) -> None:
    """Add a test case of an export: passed, failed, in error, or skipped because it is unfinished."""
    result = ("skipped", "Unfinished", UNFINISHED) if export.state == "unfinished" else ("", "", "")
    if export.failure:
        tag = "failure" if export.failure["exit_code"] == GateFailed.exit_code else "error"
        result = tag, export.failure["kind"], export.failure["message"]
    add_case(suite, "exports", export.name, result)


def add_case(
    suite: Tree.Element, group: str, name: str, result: tuple[str, str, str], given: Mapping[str, str] | None = None
) -> None:
    """Add a test case with its `result`: tag (empty if it passed), type and message; and its properties `given`."""
    case = Tree.SubElement(suite, "testcase", classname=f"llmtune.{group}", name=xml_text(name), time="0")
    add_properties(case, given or {})
    tag, kind, message = result
    if tag:
        text = xml_text(message)
        Tree.SubElement(case, tag, message=text.splitlines()[0], type=kind).text = text


@contextmanager
def failures_in_junit(folder: Path, name: str) -> Iterator[None]:
    """Write an error that ends the block to `folder/junit.xml`, except those that are already there."""
    try:
        yield
    except LlmtuneError as error:
        if not (error.reported or isinstance(error, GateFailed)):
            with suppress(OSError, LlmtuneError):  # the error may be a full disk, or a damaged run.json
                folder.mkdir(parents=True, exist_ok=True)
                with updating_reports(folder):
                    write_text(folder / "junit.xml", error_to_junit(name, error))
        raise


def error_to_junit(name: str, error: LlmtuneError) -> str:
    """Return one test suite with a test case in error, and all problems as its text."""
    suite, kind = begin_suite(name), type(error).__name__
    add_case(suite, "run", kind, ("error", kind, redact_all(str(error))))
    return write_suite(suite)


def begin_suite(name: str, seconds: float = 0.0) -> Tree.Element:
    """Return a test suite without cases."""
    return Tree.Element("testsuite", {"name": f"llmtune.{xml_text(name)}", "time": f"{seconds:.3f}"})


def write_suite(suite: Tree.Element) -> str:
    """Return the XML document with a test suite, and with the counts of its results, as text."""
    paths = {"tests": "testcase", **{f"{tag}s": f"testcase/{tag}" for tag in ("failure", "error")}}
    counts = {name: str(len(suite.findall(path))) for name, path in paths.items()}
    suite.attrib |= {"skipped": str(len(suite.findall("testcase/skipped"))), **counts}
    root = Tree.Element("testsuites", {"name": "llmtune", "time": suite.attrib["time"], **counts})
    root.append(suite)
    Tree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Tree.tostring(root, encoding="unicode") + "\n"


def add_properties(element: Tree.Element, values: Mapping[str, str]) -> None:
    """Add named values to an element as properties."""
    if not values:
        return
    properties = Tree.SubElement(element, "properties")
    for key, value in values.items():
        Tree.SubElement(properties, "property", name=xml_text(key), value=xml_text(value))


def list_scores(report: Report) -> dict[str, str]:
    """Return verdict and scores as named values, with the number of rows of each score.

    `champion` and `tuned_against_champion` have the scores of both on their common rows, `tuned` those on all.
    """
    evaluation = report.evaluation
    named = {"verdict": f"{report.verdict.word}: {report.verdict.reason}"}
    named |= {"doubtful_files": " ".join(report.doubts)} if report.doubts else {}
    if evaluation is None:
        return named
    named |= {"baseline": evaluation.baseline} if evaluation.baseline else {}
    named |= {f"tuned.{metric}.rows": str(interval.n) for metric, interval in evaluation.intervals.items()}
    champion = evaluation.champion
    others: dict[str, Any] = {
        "teacher": evaluation.teacher,
        "control_run": evaluation.control_run,
        "champion": champion,
        **evaluation.simple_baselines,
    }
    scores = {model: evaluation.by_name(model) for model in ("base", "tuned")}
    scores |= {name: one.scores for name, one in others.items() if one}
    scores |= {name: control.tuned for name, control in evaluation.controls.items()}
    if champion:
        scores["tuned_against_champion"] = champion.tuned
        named["champion.rows"] = str(champion.rows)
        named |= {f"champion.{metric}.rows": str(change.n) for metric, change in champion.difference.items()}
    named |= {f"{model}.{metric}": score(value) for model, one in scores.items() for metric, value in one.items()}
    if champion and (changes := champion.classes):
        named |= {f"champion.new_class.{one.label}": describe_new_class(one) for one in changes.new}
        named |= {"champion.lost_classes": ", ".join(changes.lost)} if changes.lost else {}
        named |= {f"champion.renamed.{name}": f"{old}?" for name, old, *_ in changes.hints}
        named |= {f"champion.renamed.{name}": old for old, name in changes.renamed.items()}
    if champion and (new := champion.new):
        on_new = {"base": new.scores.base, "tuned": new.scores.tuned, "champion": new.before}
        named |= {"new.rows": str(new.scores.rows), "champion.new.rows": str(new.rows)}
        named |= {f"{model}.{name}[new]": score(value) for model, one in on_new.items() for name, value in one.items()}
    if overlap := evaluation.contamination:
        named["overlapping_test_rows"] = f"{overlap.overlapping} of {overlap.rows}"
    return named


def xml_text(value: str) -> str:
    """Replace characters that are not allowed in XML."""
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", value)
