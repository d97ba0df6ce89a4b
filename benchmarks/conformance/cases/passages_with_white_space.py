"""White space after a passage does not make it another passage."""

from dataclasses import replace

from conformance.cases import repeated_passages
from conformance.cases.repeated_passages import write_rows

CASE = replace(
    repeated_passages.CASE,
    title="White space after a passage",
    question="The same rows, but each second one has a space after the relevant passage. Is it the same passage in "
    "recall?",
    settings={
        **repeated_passages.CASE.settings,
        "test_rows": write_rows(lambda relevant: [relevant, f"{relevant} "] * 2),
    },
)
