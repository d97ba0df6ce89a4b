"""Keys that only another row's call has are not learned as nulls, from JSON lines that have none."""

from dataclasses import replace

from conformance.cases import nulls_of_other_rows

CASE = replace(
    nulls_of_other_rows.CASE,
    title="Nulls that reading adds",
    question="The same rows as JSON lines, where no null is written. Does reading them as a table add nulls that are "
    "learned?",
    settings={**nulls_of_other_rows.CASE.settings, "file": "jsonl"},
)
