"""A metric for answers in JSON: the share of fields that are right."""

import json
from typing import Annotated


def json_fields(row: dict, answer: str) -> Annotated[float, 0, 1]:
    """The share of the reference's fields that the answer has with the same value; 0 for an answer that is no JSON."""
    expected = json.loads(row["messages"][-1]["content"])
    try:
        fields = json.loads(answer)
        json.dumps(fields, allow_nan=False)  # Python reads NaN and 1e999, which are no JSON
    except ValueError:
        return 0.0
    if not isinstance(fields, dict):
        return 0.0
    return sum(key in fields and fields[key] == value for key, value in expected.items()) / len(expected)
