"""Gates as JUnit XML, which CI systems show by themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as Tree  # written, never read: nothing of it can be attacked

from llmtune.report.number_format import score

NOT_XML = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(report: Mapping[str, Any]) -> str:
    """Return one test suite with a test case a gate; verdict and all scores are its properties."""
    gates = report.get("gates") or []
    failed = sum(not gate["passed"] for gate in gates)
    seconds = next((s.get("seconds") or 0 for s in report.get("steps") or [] if s.get("name") == "evaluate"), 0)
    counts = {"tests": str(len(gates)), "failures": str(failed), "errors": "0", "time": f"{seconds:.3f}"}
    root = Tree.Element("testsuites", {"name": "llmtune", **counts})
    name = f"llmtune.{clean(report.get('name') or 'run')}"
    suite = Tree.SubElement(root, "testsuite", {"name": name, "skipped": "0", **counts})
    add_properties(suite, describe(report))
    for gate in gates:
        case = Tree.SubElement(suite, "testcase", classname="llmtune.gates", name=clean(gate["name"]), time="0")
        add_properties(case, {"wanted": gate["wanted"], "got": gate["got"]})
        if not gate["passed"]:
            message = clean(f"wanted {gate['wanted']}, got {gate['got']}")
            Tree.SubElement(case, "failure", message=message, type="GateFailed").text = message
    Tree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Tree.tostring(root, encoding="unicode") + "\n"


def add_properties(element: Tree.Element, values: Mapping[str, Any]) -> None:
    """Give an element named values."""
    properties = Tree.SubElement(element, "properties")
    for key, value in values.items():
        Tree.SubElement(properties, "property", name=clean(key), value=clean(value))


def describe(report: Mapping[str, Any]) -> dict[str, str]:
    """Return verdict and scores as named values."""
    evaluation = report.get("evaluation") or {}
    named = {"verdict": f"{report['verdict']['word']}: {report['verdict']['reason']}"}
    if evaluation.get("baseline"):
        named["baseline"] = str(evaluation["baseline"])
    for side in ("base", "tuned"):
        named |= {f"{side}.{metric}": score(value) for metric, value in (evaluation.get(side) or {}).items()}
        for name, study in (evaluation.get("studies") or {}).items():
            named |= {f"{side}.{name}.{metric}": score(value) for metric, value in study[side].items()}
    if overlap := evaluation.get("contamination"):
        named["overlapping_test_rows"] = f"{overlap['overlapping']} of {overlap['rows']}"
    return named


def clean(value: Any) -> str:
    """Leave out characters that XML cannot hold."""
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", str(value))
