"""From what a run folder knows to the parts of a report, and from the report to its JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.records import Json
from llmtune.report.report_record import Report
from llmtune.report.text_files import as_json

DATA_KEYS = ("dropped", "examples", "tokens", "supervised_share", "longest", "example")
"""Of the facts of `encode`; what it dropped includes the rows that `prepare` did."""
RENAMED = {"total": "all", "adapter_bytes": "bytes"}
"""Facts of the adapter that the report has under another name."""


def collect_facts(manifest: Mapping[str, Any], curve: Sequence[Mapping[str, object]]) -> Json:
    """Return what the steps found out, by the report's names; what a stopped run has not reached is None.

    `manifest` is run.json, `curve` the lines of metrics.jsonl.
    """
    done: Json = {name: step["facts"] for name, step in manifest["steps"].items() if step["state"] == "done"}
    prepared, encoded, adapted, trained = (done.get(name) for name in ("prepare", "encode", "adapt", "train"))
    data = {key: prepared[key] for key in ("rows_in", "kept", "dropped")} if prepared else None
    if data and encoded:
        data |= {key: encoded[key] for key in DATA_KEYS}
        data |= {"supervised_tokens": encoded["supervised"], "lengths": encoded["histogram"]}
        data |= {"classes": encoded.get("classes") or {}, "lost": encoded.get("lost") or {}}
    began = max((step["started"] for step in manifest["steps"].values()), default=None)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(began)) if began else "",
        "data": data,
        "model": done.get("select"),
        "adapter": {RENAMED.get(key, key): value for key, value in adapted.items()} if adapted else None,
        "train": {**trained, "curve": curve} if trained else None,
        "deploy": done.get("deploy"),
    }


def report_json(report: Report) -> Json:
    """Return what report.json holds: the fields of the report, the seeds among the scores."""
    values: Json = as_json(report)
    seeds, verdict = values.pop("seeds"), values.pop("verdict")
    if values["evaluation"]:
        del values["evaluation"]["gates"]  # they stand beside it
        values["evaluation"]["seeds"] = seeds
    return values | {"verdict": verdict}
