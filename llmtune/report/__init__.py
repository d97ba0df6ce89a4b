"""The report: what a run was and what it did, as HTML, Markdown, JSON and JUnit XML; without torch or transformers."""

from llmtune.report.assemble import assemble
from llmtune.report.explanations import find_explanations
from llmtune.report.meanings import LOWER_IS_BETTER
from llmtune.report.redaction import redact, redact_all
from llmtune.report.verdict import verdict
from llmtune.report.writing import link_explanations, write_report

__all__ = [
    "LOWER_IS_BETTER",
    "assemble",
    "find_explanations",
    "link_explanations",
    "redact",
    "redact_all",
    "verdict",
    "write_report",
]
