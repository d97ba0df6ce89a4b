"""White space after a passage does not make it another passage."""

from dataclasses import replace

from conformance.cases import repeated_passages
from conformance.cases.repeated_passages import write_rows

CASE = replace(
    repeated_passages.CASE,
    title="White space after a passage",
    question="The same rows, but each second one has a space after the relevant passage. Is it the same passage in "
    "recall, with the score of either spelling?",
    failed="it counted the passage for each row: recall@1 was 0.188 for 0.250, 0.500 or 0.750, by spelling",
    settings={
        **repeated_passages.CASE.settings,
        "test_rows": write_rows(lambda relevant: [relevant, f"{relevant} "] * 2),
    },
)
