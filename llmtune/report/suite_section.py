"""Studies made ready for the page: what base and tuned model were asked beyond the test rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.report.number_format import DASH, chance, count, missing, score, signed
from llmtune.report.old_charts import interval_chart

Facts = Mapping[str, Any]
KINDS = {1: "better", -1: "worse", 0: "unsure"}
SIDED = {1: "", -1: "; lower is better", 0: "; neither more nor less is better"}


def studies(evaluation: Facts | None) -> list[dict[str, Any]]:
    """Return each study with its scores as rows, its tables, and what the numbers can and cannot show."""
    found = (evaluation or {}).get("studies") or {}
    return [
        {
            "name": name,
            "title": study["title"],
            "scores": [_row(name, metric, study) for metric in study["tuned"]],
            "tables": study.get("tables") or [],
            "limits": study.get("limits") or "",
            "signatures": {f"{name}.{metric}": text for metric, text in (study.get("signatures") or {}).items()},
        }
        for name, study in found.items()
    ]


def _row(name: str, metric: str, study: Facts) -> dict[str, Any]:
    change = study["difference"].get(metric) or {"value": None, "interval": (None, None)}
    low, high = change["interval"]
    known = not (missing(low) or missing(high))
    side = study["better"].get(metric, 0)
    return {
        "metric": metric,
        "gate": f"{name}.{metric}",
        "note": study["meanings"].get(metric, "") + SIDED[side],
        "base": score(study["base"].get(metric)),
        "tuned": score(study["tuned"].get(metric)),
        "change": signed(change["value"]),
        "interval": f"{signed(low)} to {signed(high)}" if known else DASH,
        "p": chance(change.get("p")),
        "n": count(change.get("n")),
        "kind": KINDS[side * _direction(low, high)],
        "picture": _picture(metric, change["value"], low, high, side) if known and side else "",
    }


def _direction(low: Any, high: Any) -> int:
    """Return 1 where the interval lies above zero, -1 where it lies below, else 0."""
    if missing(low) or missing(high):
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def _picture(metric: str, value: Any, low: Any, high: Any, side: int) -> Any:
    words = f"{metric}: {signed(value)}, 95 % interval {signed(low)} to {signed(high)}"
    reach = max(abs(end) for end in (low, high, value))
    return interval_chart(value, low, high, reach=reach, better=side, label=words)
