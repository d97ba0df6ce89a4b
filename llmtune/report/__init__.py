"""The report: what a run was and what it did, as HTML, Markdown, JSON and JUnit XML; without torch or transformers."""

from llmtune.report.assembly import assemble
from llmtune.report.explain_links import find_explanations
from llmtune.report.redaction import redact, redact_all
from llmtune.report.verdict import verdict
from llmtune.report.write import link_explanations, write_report

__all__ = [
    "assemble",
    "find_explanations",
    "link_explanations",
    "redact",
    "redact_all",
    "verdict",
    "write_report",
]
