"""Writes gates, or the error that ended a run, as JUnit XML for CI systems."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from xml.etree import ElementTree as Tree  # only writes XML, so parser attacks do not apply

from llmtune.display.number_format import score
from llmtune.errors import GateFailed, LlmtuneError
from llmtune.recipe.secrets import redact_all
from llmtune.report.score_sections import describe_new_class
from llmtune.store.atomic_files import write_text
from llmtune.store.report_record import UNFINISHED, Report, ReportedExport, list_exports
from llmtune.store.run_folder import updating_reports

NOT_XML = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(report: Report) -> str:
    """Return one test suite with a test case per gate; verdict and all scores are its properties."""
    gates, exports = report.gates, list_exports(report.deploy)
    failed, unsure = (sum(gate.passed is outcome for gate in gates) for outcome in (False, None))
    broken = [one.failure for one in exports if one.failure]
    errors = sum(failure["exit_code"] != GateFailed.exit_code for failure in broken)
    unfinished = sum(one.state == "unfinished" for one in exports)
    unsure += sum(not gate.applies for gate in gates)
    seconds = next((step.seconds for step in report.steps if step.name == "evaluate"), 0)
    released = report.release
    counts = {"tests": str(len(gates) + len(exports) + (released is not None))}
    counts |= {"failures": str(failed + len(broken) - errors), "errors": str(errors), "time": f"{seconds:.3f}"}
    skipped = unsure + unfinished + (released is not None and not released["promoted"])
    root, suite = begin_suite(report.name, counts, skipped=skipped)
    add_properties(suite, list_scores(report))
    for gate in gates:
        case = Tree.SubElement(suite, "testcase", classname="llmtune.gates", name=xml_text(gate.name), time="0")
        add_properties(case, {"wanted": gate.wanted, "got": gate.got, **({"note": gate.note} if gate.note else {})})
        message = xml_text("; ".join(part for part in (f"wanted {gate.wanted}, got {gate.got}", gate.note) if part))
        if not gate.applies:
            Tree.SubElement(case, "skipped", message=message, type="GateNotApplicable").text = message
        elif gate.passed is None:
            Tree.SubElement(case, "skipped", message=message, type="GateUnsure").text = message
        elif not gate.passed:
            Tree.SubElement(case, "failure", message=message, type="GateFailed").text = message
    for one in exports:
        add_export(suite, one)
    if released is not None:
        case = Tree.SubElement(
            suite, "testcase", classname="llmtune.release", name=xml_text(released["name"]), time="0"
        )
        message = xml_text(released["message"])
        add_properties(case, {"current": released["current"] or ""})
        if not released["promoted"]:
            Tree.SubElement(case, "skipped", message=message, type="NotReleased").text = message
    return write_xml(root)


def add_export(suite: Tree.Element, export: ReportedExport) -> None:
    """Add a test case of an export: passed, failed, in error, or skipped because it is unfinished."""
    case = Tree.SubElement(suite, "testcase", classname="llmtune.exports", name=export.name, time="0")
    if export.state == "unfinished":
        Tree.SubElement(case, "skipped", message=UNFINISHED, type="Unfinished").text = UNFINISHED
    elif export.failure:
        kind, message = export.failure["kind"], xml_text(export.failure["message"])
        tag = "failure" if export.failure["exit_code"] == GateFailed.exit_code else "error"
        Tree.SubElement(case, tag, message=message.splitlines()[0], type=kind).text = message


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
    root, suite = begin_suite(name, {"tests": "1", "failures": "0", "errors": "1", "time": "0"})
    case = Tree.SubElement(suite, "testcase", classname="llmtune.run", name=type(error).__name__, time="0")
    message = xml_text(redact_all(str(error)))
    Tree.SubElement(case, "error", message=message.splitlines()[0], type=type(error).__name__).text = message
    return write_xml(root)


def begin_suite(name: str, counts: Mapping[str, str], skipped: int = 0) -> tuple[Tree.Element, Tree.Element]:
    """Return the root of a file with one test suite, and the suite."""
    root = Tree.Element("testsuites", {"name": "llmtune", **counts})
    attributes = {"name": f"llmtune.{xml_text(name)}", "skipped": str(skipped), **counts}
    return root, Tree.SubElement(root, "testsuite", attributes)


def write_xml(root: Tree.Element) -> str:
    """Return the XML document as text."""
    Tree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Tree.tostring(root, encoding="unicode") + "\n"


def add_properties(element: Tree.Element, values: Mapping[str, str]) -> None:
    """Add named values to an element as properties."""
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
    if evaluation.baseline:
        named["baseline"] = evaluation.baseline
    for model in ("base", "tuned"):
        named |= {f"{model}.{metric}": score(value) for metric, value in evaluation.by_name(model).items()}
    named |= {f"tuned.{metric}.rows": str(interval.n) for metric, interval in evaluation.intervals.items()}
    if simple := evaluation.simple_baseline:
        named |= {f"{simple.name}.{metric}": score(value) for metric, value in simple.scores.items()}
    for name, one in (("teacher", evaluation.teacher), ("control_run", evaluation.control_run)):
        named |= {f"{name}.{metric}": score(value) for metric, value in one.scores.items()} if one else {}
    for name, control in evaluation.controls.items():
        named |= {f"{name}.{metric}": score(value) for metric, value in control.tuned.items()}
    if champion := evaluation.champion:
        named["champion.rows"] = str(champion.rows)
        named |= {f"champion.{metric}": score(value) for metric, value in champion.scores.items()}
        named |= {f"tuned_against_champion.{metric}": score(value) for metric, value in champion.tuned.items()}
        named |= {f"champion.{metric}.rows": str(change.n) for metric, change in champion.difference.items()}
    if champion and (changes := champion.classes):
        named |= {f"champion.new_class.{one.label}": describe_new_class(one) for one in changes.new}
        named |= {"champion.lost_classes": ", ".join(changes.lost)} if changes.lost else {}
        named |= {f"champion.renamed.{name}": f"{old}?" for name, old, *_ in changes.hints}
        named |= {f"champion.renamed.{name}": old for old, name in changes.renamed.items()}
    if champion and (new := champion.new):
        scores = {"base": new.scores.base, "tuned": new.scores.tuned, "champion": new.before}
        named |= {"new.rows": str(new.scores.rows), "champion.new.rows": str(new.rows)}
        for model, values in scores.items():
            named |= {f"{model}.{metric}[new]": score(value) for metric, value in values.items()}
    if overlap := evaluation.contamination:
        named["overlapping_test_rows"] = f"{overlap.overlapping} of {overlap.rows}"
    return named


def xml_text(value: str) -> str:
    """Replace characters that are not allowed in XML."""
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", value)
