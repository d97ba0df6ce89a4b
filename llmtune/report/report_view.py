"""The report's dictionary made ready for the page: every number as text, every picture drawn, nothing required."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.report.class_tables import SIDES, class_counts, class_scores, confusion
from llmtune.report.contamination_section import overlap
from llmtune.report.explain_links import inside
from llmtune.report.metric_info import HEADLINES, LOWER_IS_BETTER, NEAREST_TO_ONE, better_side, direction, note
from llmtune.report.number_format import DASH, chance, count, duration, missing, score, share, signed, size
from llmtune.report.old_charts import bar_chart, interval_chart, line_chart
from llmtune.report.sample_view import base_name, samples
from llmtune.report.seed_table import spread_view
from llmtune.report.slice_tables import flips, slices
from llmtune.report.suite_section import studies
from llmtune.report.verdict import HARMED, HELPED, MIXED, speaking

Facts = Mapping[str, Any]
TOLD = {HELPED: (1,), HARMED: (-1,), MIXED: (1, -1)}
"""Directions of a difference that bear a verdict out."""
KINDS = {1: "better", -1: "worse", 0: "unsure"}
WORDED = frozenset({"exact_match", "f1", "rouge1", "rouge2", "rougeL", "rougeLsum", "chrf", "bleu", "ter"})
"""Metrics that reward wording."""
WRITING_TASKS = frozenset({"chat", "completion", "translate", "summarize", "qa"})
PART_NAMES = {"optimizer": "optimizer state"}


def make_view(report: Facts) -> dict[str, Any]:
    """Return what the template shows; sections that the run has not reached are None."""
    evaluation, task = report.get("evaluation"), report.get("task")
    return {
        "name": report.get("name") or "run",
        "version": report.get("llmtune", ""),
        "chips": chips(report),
        "verdict": report["verdict"],
        "headline": headline(evaluation, report["verdict"]["word"]),
        "gates": report.get("gates") or [],
        "gates_passed": all(gate["passed"] for gate in report.get("gates") or []),
        "gate_note": gate_note(report.get("gates") or []),
        "scores": scores(evaluation, task),
        "base_name": base_name(evaluation or {}),
        "baseline": (evaluation or {}).get("baseline") or "",
        "worded": task in WRITING_TASKS and bool(WORDED & ((evaluation or {}).get("tuned") or {}).keys()),
        "classes": class_scores(evaluation, task),
        "confusion": confusion(evaluation),
        "seeds": spread_view(evaluation),
        "flips": flips(evaluation, task),
        "slices": slices(evaluation),
        "studies": studies(evaluation),
        "overlap": overlap(evaluation),
        "exact_tests": exact_tests(evaluation),
        "samples": samples(evaluation, task),
        "judged": task == "preference",
        "signatures": signatures(evaluation),
        "training": training(report.get("train")),
        "data": data(report.get("data"), task),
        "model": model(report.get("model")),
        "adapter": adapter(report.get("adapter")),
        "steps": steps(report.get("steps") or []),
        "hardware": hardware(report.get("hardware") or {}),
        "deploy": flat(report.get("deploy") or {}),
        "inside": inside(report),
        "recipe": report.get("recipe_yaml") or "",
    }


def chips(report: Facts) -> list[tuple[str, str]]:
    """The few facts that say which run this is."""
    facts = [
        ("task", report.get("task")),
        ("model", (report.get("model") or {}).get("name")),
        ("method", (report.get("adapter") or {}).get("method")),
        ("test rows", count((report.get("evaluation") or {}).get("rows"))),
    ]
    return [(name, str(value)) for name, value in facts if value and value != DASH]


def gate_note(gates: Sequence[Facts]) -> str:
    """How many gates hold."""
    failed = sum(not gate["passed"] for gate in gates)
    if not gates:
        return ""
    words = "gate" if len(gates) == 1 else "gates"
    return f"{failed} of {len(gates)} {words} failed" if failed else f"{len(gates)} {words} passed"


def headline(evaluation: Facts | None, word: str) -> dict[str, str] | None:
    """The one score that says most, big: one of those that bear the verdict `word` out, if there are any."""
    if not evaluation or not evaluation.get("difference"):
        return None
    found = evaluation["difference"]
    ranked = sorted(found, key=lambda name: HEADLINES.index(name) if name in HEADLINES else len(HEADLINES))
    signs = speaking(found)
    telling = [name for name in ranked if signs.get(name) in TOLD.get(word, ())]
    metric = (telling or ranked)[0]
    low, high = found[metric]["interval"]
    return {
        "metric": metric.replace("_", " "),
        "baseline": evaluation.get("baseline") or "",
        "base": score(evaluation["base"].get(metric)),
        "tuned": score(evaluation["tuned"].get(metric)),
        "change": signed(found[metric]["value"]),
        "interval": interval(low, high),
        "kind": KINDS[direction(metric, (low, high))],
    }


def scores(evaluation: Facts | None, task: str | None = None) -> list[dict[str, Any]]:
    """A row a metric; one that only the tuned model has stands there without a difference."""
    changes = (evaluation or {}).get("difference") or {}
    base, tuned = ((evaluation or {}).get(side) or {} for side in ("base", "tuned"))
    unknown = {"value": None, "interval": (None, None)}
    rows = []
    for metric in dict.fromkeys([*tuned, *changes]):
        change = changes.get(metric, unknown)
        low, high = change["interval"]
        rows.append(
            {
                "metric": metric,
                "note": note(metric, task),
                "lower": metric in LOWER_IS_BETTER,
                "base": score(base.get(metric)),
                "tuned": score(tuned.get(metric)),
                "change": signed(change["value"]),
                "interval": DASH if missing(low) and missing(high) else interval(low, high),
                "p": chance(change.get("p")),
                "n": count(change.get("n")),
                "kind": KINDS[direction(metric, (low, high))],
                "compared": metric in changes,
                "picture": difference_picture(metric, change["value"], low, high),
            }
        )
    return rows


def signatures(evaluation: Facts | None) -> dict[str, str]:
    """How each number came about, those of the studies by the names that gates use."""
    found = dict((evaluation or {}).get("signatures") or {})
    for study in studies(evaluation):
        found |= study["signatures"]
    return found


def exact_tests(evaluation: Facts | None) -> str:
    """The metrics whose p is that of McNemar's exact test."""
    changes = (evaluation or {}).get("difference") or {}
    return ", ".join(metric for metric, change in changes.items() if change.get("test") == "McNemar exact")


def difference_picture(metric: str, value: Any, low: Any, high: Any) -> Any:
    """A difference and its interval about zero, the better side on the right, if there is one."""
    if any(missing(end) for end in (low, high, value)) or metric in NEAREST_TO_ONE:
        return ""
    words = f"{metric}: {signed(value)}, 95 % interval {interval(low, high)}"
    reach = max(abs(end) for end in (low, high, value))
    return interval_chart(value, low, high, reach=reach, better=better_side(metric), label=words)


def interval(low: Any, high: Any) -> str:
    """Both ends with their signs."""
    return f"{signed(low)} to {signed(high)}"


def training(train: Facts | None) -> dict[str, Any] | None:
    """Losses, curves and speed."""
    if not train:
        return None
    curve = [line for line in train.get("curve") or [] if not missing(line.get("step"))]
    facts = [
        ("first loss", score(train.get("first_loss"))),
        ("last training loss", score(train.get("train_loss"))),
        ("validation loss", score(train.get("validation_loss"))),
        ("steps", count(train.get("steps"))),
        ("epochs", score(train.get("epochs"))),
        ("best step", count(train.get("best_step"))),
        ("tokens", count(train.get("tokens"))),
        ("padding", "" if missing(train.get("padding_share")) else f"{100 * train['padding_share']:.1f} %"),
        ("speed", f"{count(train.get('tokens_per_second'))} tokens/s"),
        ("time", duration(train.get("wall_seconds"))),
        ("peak memory", size(train.get("peak_bytes"))),
        ("stopped early", train.get("stopped_early")),
        ("resumed from step", count(train.get("resumed_from"))),
    ]
    return {
        "facts": [(name, text) for name, text in facts if text and not text.startswith(DASH)],
        "loss": loss_chart(curve),
        "validated": any(not missing(line.get("validation_loss")) for line in curve),
        "rate": line_chart([("other", series(curve, "learning_rate"))], label="learning rate by step", height=150),
        "norm": line_chart([("other", series(curve, "grad_norm"))], label="gradient norm by step", height=150),
    }


def loss_chart(curve: Sequence[Facts]) -> Any:
    """Training and validation loss over the steps."""
    lines = [("train", series(curve, "loss")), ("validation", series(curve, "validation_loss"))]
    return line_chart(lines, label="training and validation loss by step", height=300)


def series(curve: Sequence[Facts], key: str) -> list[tuple[float, float]]:
    """The points of one column of the metrics."""
    return [(float(line["step"]), float(line[key])) for line in curve if not missing(line.get(key))]


def data(facts: Facts | None, task: str | None = None) -> dict[str, Any] | None:
    """Rows in, kept and dropped; tokens and what of them is learned."""
    if not facts:
        return None
    kept = facts.get("kept") or facts.get("rows") or {}
    tokens = facts.get("tokens") or {}
    supervised = facts.get("supervised_tokens") or facts.get("supervised") or {}
    histogram = facts.get("histogram") or facts.get("lengths") or {}
    dropped = facts.get("dropped") or {}
    by_token = facts.get("supervised_share", 1) is not None
    return {
        "rows_in": count(facts.get("rows_in")),
        "sides": [
            {
                "side": side,
                "rows": count(kept.get(side)),
                "tokens": count(tokens.get(side)),
                "supervised": count(supervised.get(side)),
                "share": share(supervised.get(side), tokens.get(side)),
            }
            for side in SIDES
            if side in kept
        ],
        "dropped": [(reason, count(number)) for reason, number in sorted(dropped.items(), key=lambda item: -item[1])],
        "dropped_sum": count(sum(dropped.values())),
        "share": share(sum(supervised.values()), sum(tokens.values()) or None) if by_token else "",
        "classes": class_counts(facts, task),
        "lengths": lengths_chart(histogram),
        "example": pieces(facts.get("example")),
    }


def lengths_chart(histogram: Any) -> Any:
    """The histogram of row lengths, if there is one."""
    edges, counts = (histogram.get("edges"), histogram.get("counts")) if isinstance(histogram, dict) else (None, None)
    if not edges or not counts or len(edges) != len(counts) + 1:
        return ""
    return bar_chart(edges, counts, label="training examples by length in tokens")


def pieces(example: Any) -> list[tuple[str, bool]]:
    """Stretches of the shown example and whether they are learned."""
    return [(str(text), bool(learned)) for text, learned in example or []]


def model(facts: Facts | None) -> dict[str, Any] | None:
    """Name, revision, memory plan and ranking."""
    if not facts:
        return None
    plan = facts.get("plan") or {}
    parts = plan.get("parts") or {}
    total = sum(parts.values())
    whole = max(total, plan.get("limit") or 0) or 1
    named = [("name", facts.get("name")), ("revision", facts.get("revision")), ("number format", facts.get("dtype"))]
    named += [("parameters", count(facts.get("parameters"))), ("sha256", facts.get("sha256"))]
    return {
        "facts": [(name, str(value)) for name, value in named if value and value != DASH],
        "parts": [
            {"name": PART_NAMES.get(name, name), "size": size(number), "percent": f"{100 * number / whole:.2f}"}
            for name, number in parts.items()
            if number
        ],
        "total": size(total),
        "bound": size(plan.get("lower_bound")),
        "limit": size(plan.get("limit")),
        "device": plan.get("device") or "",
        "ranking": ranking(facts.get("ranking")),
    }


def ranking(found: Any) -> list[dict[str, str]]:
    """Candidates, the best first; those left out with the reason."""
    rows = found.get("candidates") or [] if isinstance(found, dict) else found or []
    return [
        {
            "name": str(row.get("name", "")),
            "bits": score(row.get("bits_per_byte")),
            "memory": size(row.get("lower_bound")),
            "context": count(row.get("context")),
            "reason": str(row.get("reason") or ""),
        }
        for row in rows
        if isinstance(row, dict)
    ]


def adapter(facts: Facts | None) -> dict[str, Any] | None:
    """Method, share that is trained, matched modules."""
    if not facts:
        return None
    total = facts.get("all", facts.get("total"))
    matched = facts.get("matched_modules")
    number = len(matched) if isinstance(matched, list | tuple) else matched
    rows = [
        ("method", facts.get("method")),
        ("rank", count(facts.get("r"))),
        ("alpha", count(facts.get("lora_alpha"))),
        ("trained", f"{count(facts.get('trainable'))} of {count(total)} parameters"),
        ("share", share(facts.get("trainable"), total, 2)),
        ("on disk", size(facts.get("bytes", facts.get("adapter_bytes")))),
        ("modules", count(number)),
    ]
    targets = facts.get("targets") or {}
    return {
        "facts": [(name, str(text)) for name, text in rows if text and text != DASH],
        "targets": [(str(ending), count(times)) for ending, times in targets.items()]
        if isinstance(targets, dict)
        else [],
        "names": list(matched) if isinstance(matched, list | tuple) else [],
    }


def steps(found: Sequence[Facts]) -> list[dict[str, Any]]:
    """Time and memory of each step, with a bar of its share of the time."""
    longest = max([step.get("seconds") or 0 for step in found], default=0) or 1
    return [
        {
            "name": step.get("name", ""),
            "time": duration(step.get("seconds")),
            "percent": f"{100 * (step.get('seconds') or 0) / longest:.1f}",
            "peak": size(step.get("peak_bytes")),
            "skipped": bool(step.get("skipped")),
        }
        for step in found
    ]


def hardware(facts: Facts) -> list[tuple[str, str]]:
    """Where it ran, packages last."""
    plain = [(key, str(value)) for key, value in facts.items() if not isinstance(value, dict) and value]
    packages = facts.get("packages") or {}
    return [*plain, *((name, str(version)) for name, version in packages.items())]


def flat(facts: Facts) -> list[tuple[str, str]]:
    """Any facts as pairs of text; what is nested is left to report.json."""
    return [(key.replace("_", " "), str(value)) for key, value in facts.items() if not isinstance(value, dict | list)]
