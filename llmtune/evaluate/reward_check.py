"""Checks rewards before they train: right answers against answers that must not win, errors, chance and length.

Shapes: N rows, L lengths.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from llmtune.data.answer_parser import ParsedAnswer, read_written
from llmtune.data.chat_rows import ToolCall, write_answer
from llmtune.data.column_mapping import rename
from llmtune.data.conversation_texts import last_answer, split_reference
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_formats import parse_row
from llmtune.data.row_hash import write_columns
from llmtune.data.row_kind import MESSAGES
from llmtune.data.sources import resolve_inputs
from llmtune.display.console import spinner
from llmtune.errors import DataError, Problem
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import measure_shares, own_interval, paired_difference
from llmtune.evaluate.rewards import Reward, RewardError, RewardPair, call_reward, weigh_rewards
from llmtune.evaluate.suites.own_metric_process import RAISED
from llmtune.evaluate.suites.own_metrics import Failure, describe_failure
from llmtune.recipe.data_section import DataSection, Source
from llmtune.recipe.reinforce_section import SLACK
from llmtune.records import Difference, Json, Row

READ_ROWS, CHECKED_ROWS, FEWEST_ROWS = 5000, 100, 10
LEAST_GAP = 0.1
"""References must win by this share of the rewards' range, with an interval above zero."""
STRONG = 0.5
"""Rank correlation with the length from which a reward is said to reward length."""
SWALLOWED_SHARE = 0.05
"""Share of references on which the file may catch an exception and score them like other answers."""
MOST_OPTIONS = 16
SHOWN = 5
LIMIT_FLAGS = ("raise --seconds", "give --network")
REFERENCE_SHARE = 0.9
"""`accept` is the reward that this share of references reaches."""
DIGITS = 9
"""Decimals of `accept`: rounding moves it by less than the slack of its comparison."""
MALFORMED = (
    "{",
    "[1, 2",
    "\\boxed{",
    "<think>",
    "<answer></answer>",
    "NaN",
    "1e999",
    "\\frac{1}{0}",
    "null",
    "\n",
    "```",
)
NEUTRAL = (
    "well then we may say this in some other way as it was before and now it seems so to us here while others "
    "often look at that from far away or near by day and night until they come home again with more of the same"
)
LENGTHS = (0, 4, 16, 64, 256)
"""Neutral words after a wrong answer."""
PROBES = {
    "reference": "reference answers",
    "other": "other rows' references",
    "empty": "empty answers",
    "prompt": "the copied prompt",
    "options": "all references in one answer",
    "malformed": "malformed text",
    "padded": f"other rows' references, then {LENGTHS[-1]} neutral words",
}
"""Answers to each row, by name; all but the first must not win."""
FAULTS = {
    "raises": "raises exceptions",
    "invalid": "returns invalid values",
    "changes": "differs from call to call",
    "not_applicable": "returns None for the references",
    "swallows_exceptions": "swallows exceptions",
    "constant": "is constant",
    "rewards_length": "rewards length",
    "accepts_substring": "accepts a substring",
    "ignores_reference": "ignores the reference",
    "accepts_prompt": "accepts the copied prompt",
    "accepts_empty": "accepts empty answers",
    "accepts_malformed": "accepts malformed text",
    "accepts_padded": "accepts wrong answers with more words",
    "no_spread": "has no spread",
}
"""Faults of a reward, in the order of the report."""


@dataclass(frozen=True)
class RewardLimits:
    """What a reward may use."""

    seconds: float
    network: bool


@dataclass
class Observed:
    """What the calls showed, for each probe and row: `values[probe]` is [N], NaN for None and errors."""

    values: dict[str, Floats]
    errors: list[Json] = field(default_factory=list)
    changes: list[Json] = field(default_factory=list)
    caught: dict[int, Json] = field(default_factory=dict)
    """By row, the first exception that a file caught on its reference."""
    nones: Counter[str] = field(default_factory=Counter)
    """Answers that a reward does not apply to, by probe."""
    seconds: float = 0.0
    """Median of a call to all rewards."""


def read_checked_rows(path: str, seed: int) -> list[tuple[str, Row]]:
    """Return a random sample of the file's rows with a reference, with their other columns, and where they are from.

    Raises DataError if fewer than `FEWEST_ROWS` have one, or all references are equal.
    """
    rows, bad = list[tuple[str, Row]](), list[Problem]()
    for detected in resolve_inputs(DataSection(train=(Source(path=path),)), "chat"):
        for origin, value in islice(detected.input.raw_rows(), READ_ROWS):
            try:
                if isinstance(value, RowError):
                    raise value
                raw = rename(value, detected.columns, detected.roles)
                row = parse_row(raw, detected.row_format, "chat", detected.input.folder)
                columns = {name: cell for name, cell in raw.items() if name not in detected.row_format.columns}
                rows.append((origin, {**json.loads(write_columns(columns)), **row}))  # as training reads them
            except RowError as error:
                bad.append(Problem(str(error), origin))
    if len(rows) < FEWEST_ROWS:
        what = f"{len(rows)} rows have a reference answer; a check needs at least {FEWEST_ROWS}"
        raise DataError(Problem(what, path, "Add rows whose last message is the right answer."), *bad[:SHOWN])
    if len({split_reference(row)[1] for _, row in rows}) == 1:
        fix = "Add rows with other answers."
        raise DataError.of("all reference answers are equal, so a wrong one cannot be told from a right one", path, fix)
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:CHECKED_ROWS]]


def check_rewards(
    rewards: Sequence[Reward],
    rows: Sequence[tuple[str, Row]],
    answer_form: str,
    seed: int,
    limits: RewardLimits,
    console: Console,
) -> Json:
    """Return the document of `llmtune reward check` without a model. Raises RewardError if a reward cannot run."""
    probes = make_probes([row for _, row in rows], answer_form, seed)
    with spinner(console, f"{sum(map(len, probes.values())):,} answers, twice"):
        seen = observe_rewards(rewards, rows, probes, limits)
    described = [{"name": one.name, "weight": one.weight, "signature": one.signature} for one in rewards]
    return {"rewards": described, **judge_rewards(seen, seed)}


def make_probes(rows: Sequence[Row], answer_form: str, seed: int) -> dict[str, list[ParsedAnswer]]:
    """Return the answers [N] of each probe, and of `LENGTHS` as `padded0` and so on.

    `answer_form` is how an answer is written, with {} for the text of a row's reference; its calls are apart.
    """
    generator = np.random.default_rng(seed)
    written = [split_reference(row)[1] or "" for row in rows]
    references = {text: (last_answer(row), split_reference(row)[2]) for text, row in zip(written, rows, strict=True)}
    distinct = sorted(references)
    probes = {name: list[ParsedAnswer]() for name in (*PROBES, *(f"padded{words}" for words in LENGTHS))}

    def answer(names: Sequence[str], words: Sequence[str] = ()) -> ParsedAnswer:
        calls: list[ToolCall] = [call for name in names for call in references[name][1]]
        text = answer_form.replace("{}", "\n".join(filter(None, (references[name][0] for name in names))))
        return read_written(" ".join(filter(None, [text, *words])), calls)

    for number, (row, reference) in enumerate(zip(rows, written, strict=True)):
        others = [distinct[i] for i in generator.permutation(len(distinct)) if distinct[i] != reference]
        options = [reference, *others][:MOST_OPTIONS]
        options = [options[i] for i in generator.permutation(len(options))]
        probes["reference"].append(answer([reference]))
        probes["other"].append(answer(others[:1]))
        probes["empty"].append(read_written(""))
        probes["prompt"].append(read_written(MESSAGES.row_input(split_reference(row)[0]).query))
        probes["options"].append(answer(options))
        # A call that is written as text is none: clients read it as text.
        is_call = number % 2 and references[reference][1]
        probes["malformed"].append(read_written(reference if is_call else MALFORMED[number % len(MALFORMED)]))
        for words in LENGTHS:
            probes[f"padded{words}"].append(answer(others[:1], (NEUTRAL.split() * LENGTHS[-1])[:words]))
    return {**probes, "padded": probes[f"padded{LENGTHS[-1]}"]}


def observe_rewards(
    rewards: Sequence[Reward],
    rows: Sequence[tuple[str, Row]],
    probes: Mapping[str, Sequence[ParsedAnswer]],
    limits: RewardLimits,
) -> Observed:
    """Call the rewards on all answers, twice and in another order. Raises RewardError if a reward cannot run."""
    places = [(name, number) for name, answers in probes.items() for number in range(len(answers))]
    pairs: list[RewardPair] = [(rows[number][1], probes[name][number]) for name, number in places]
    origins, seen = [rows[number][0] for _, number in places], Observed({})
    columns, times = list[dict[str, float | None]]([{} for _ in pairs]), list[float]()
    failed = set[int]()
    for reward in rewards:
        started = perf_counter()
        first = _run_reward(reward, pairs, origins, limits, "exceptions")
        times.append((perf_counter() - started) / len(pairs))
        again = _run_reward(reward, pairs[::-1], origins[::-1], limits, "values")[::-1]
        if reward.file is not None:
            times[-1] = median(one["seconds"] for one in again)
        for i, ((name, number), one, other) in enumerate(zip(places, first, again, strict=True)):
            columns[i][reward.name] = one["value"]
            shown = write_answer(pairs[i][1].sampled, pairs[i][1].tool_calls)
            facts = {"reward": reward.name, "row": origins[i], "answer": shown[:80]}
            if "error" in one:
                failed.add(i)
                seen.errors.append({**facts, "line": one["line"], "what": one["error"]})
            elif one["value"] != other["value"] or "error" in other:
                seen.changes.append({**facts, "values": [one["value"], other["value"]]})
            elif one["value"] is None:
                seen.nones[name] += name in PROBES
            if name == "reference" and "caught" in one:
                seen.caught.setdefault(number, {**facts, "line": one["caught"][0], "what": one["caught"][1]})
    sums = [None if i in failed else weigh_rewards(rewards, column) for i, column in enumerate(columns)]
    for (name, _), value in zip(places, sums, strict=True):
        earlier_values = seen.values.get(name, np.empty(0))
        seen.values[name] = np.append(earlier_values, np.nan if value is None else value)
    return replace(seen, seconds=sum(times), nones=+seen.nones)


def _run_reward(
    reward: Reward, pairs: Sequence[RewardPair], origins: Sequence[str], limits: RewardLimits, observe: str
) -> list[Json]:
    outcomes = call_reward(reward, pairs, seconds=limits.seconds, network=limits.network, observe=observe)
    if isinstance(outcomes, Failure):
        raise RewardError(describe_failure(reward, outcomes, origins, LIMIT_FLAGS))
    return outcomes


def judge_rewards(seen: Observed, seed: int) -> Json:
    """Return intervals by probe, faults, and values for a recipe."""
    values = {name: seen.values[name] for name in PROBES}
    low, high = find_range([*seen.values.values()])
    probes, unclear = dict[str, Json](), dict[str, str]()
    for name, title in PROBES.items():
        # Only the compared answers set the range: long answers may have rewards far from all others.
        least, most = find_range([values[name], values["reference"]])
        least, most = (least, most) if most > least else (low, high)  # all of them are equal
        reach = most - least
        scaled, best = ((values[one] - least) / (reach or 1.0) for one in (name, "reference"))
        shares = scaled[np.isfinite(scaled)]
        mean = own_interval(measure_shares("reward", shares.tolist(), ""), seed)
        probes[name] = {"answers": title, "rows": len(shares), "reward": rescale_interval(mean, reach, least)}
        if name != "reference":
            both = np.isfinite(scaled) & np.isfinite(best)
            lower, upper = (measure_shares("reward", one[both].tolist(), "") for one in (scaled, best))
            gap = paired_difference(lower, upper, seed)
            is_clear = not len(shares) or bool(gap.low > 0 and gap.value >= LEAST_GAP)  # without a reward nothing wins
            probes[name] |= {"gap": rescale_interval(gap, reach, 0.0), "clear": is_clear}
            unclear |= {} if is_clear else {name: title}
    length = correlate_length(np.array([seen.values[f"padded{words}"] for words in LENGTHS]), seed)
    faults = find_faults(seen, probes, unclear, length, high - low)
    best = values["reference"][np.isfinite(values["reference"])]
    accept = None if faults else round(float(np.quantile(best, 1 - REFERENCE_SHARE, method="lower")), DIGITS)
    return {
        "ok": not faults,
        "faults": [{"name": name, "what": FAULTS[name], "why": faults[name]} for name in FAULTS if name in faults],
        "rows": len(values["reference"]),
        "range": [low, high],
        "probes": probes,
        "length_correlation": length,
        "errors": seen.errors,
        "changes": seen.changes,
        "caught": [*seen.caught.values()],
        "none": dict(seen.nones),
        "seconds_per_call": seen.seconds,
        "model": None,
        "recipe": {"accept": accept, "samples": None},
    }


def find_range(columns: Sequence[Floats]) -> tuple[float, float]:
    """Return the lowest and the highest finite reward; NaN without any."""
    flat = np.concatenate(columns)
    finite = flat[np.isfinite(flat)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (np.nan, np.nan)


def add_samples(document: Json, samples: Json) -> Json:
    """Return the document with what a model's samples show; without any spread the rewards cannot train it."""
    faults, recipe = document["faults"], {**document["recipe"], "samples": samples["samples_needed"]}
    if samples["spread"]["value"] == 0:
        answers = f"all {samples['samples']} answers of {samples['name']}"
        why = f"{answers} to each of {samples['prompts']} prompts get the same reward"
        faults = [*faults, {"name": "no_spread", "what": FAULTS["no_spread"], "why": why}]
    return {**document, "ok": not faults, "faults": faults, "model": samples, "recipe": recipe}


def rescale_interval(one: Difference, factor: float, offset: float) -> Json:
    """Return a value and its interval, multiplied by `factor`, plus `offset`."""
    ends = {"value": one.value, "low": one.low, "high": one.high}
    return {name: offset + factor * end for name, end in ends.items()}


def correlate_length(values_LN: Floats, seed: int) -> Json:
    """Return the mean rank correlation between the length of a row's wrong answers and their reward."""
    import scipy.stats  # type: ignore[import-untyped]  # takes a third of a second

    values_LN = values_LN[:, np.isfinite(values_LN).all(0)]
    ranks_LN: NDArray[np.float64] = scipy.stats.rankdata(values_LN, axis=0)
    ranks_LN = ranks_LN - ranks_LN.mean(0) if ranks_LN.size else ranks_LN
    lengths_L = np.arange(len(LENGTHS)) - (len(LENGTHS) - 1) / 2
    norm_N = np.sqrt((lengths_L**2).sum() * (ranks_LN**2).sum(0))
    correlation_N = np.divide(lengths_L @ ranks_LN, norm_N, out=np.zeros(len(norm_N)), where=norm_N > 0)
    return rescale_interval(
        own_interval(measure_shares("length", ((correlation_N + 1) / 2).tolist(), ""), seed), 2.0, -1.0
    )


def find_faults(
    seen: Observed, probes: Mapping[str, Json], unclear: Mapping[str, str], length: Json, spread: float
) -> dict[str, str]:
    """Return why the rewards cannot train, by the names of `FAULTS`."""
    faults, rows = dict[str, str](), len(seen.values["reference"])
    raised = [one for one in seen.errors if one["what"].startswith(RAISED)]
    for name, errors in (("raises", raised), ("invalid", [one for one in seen.errors if one not in raised])):
        if errors:
            faults[name] = f"on {len(errors)} answers; {_place(errors[0])} {errors[0]['what']}"
    if seen.changes:
        first = seen.changes[0]
        was, now = first["values"]
        faults["changes"] = f"on {len(seen.changes)} answers; {_place(first)} it returned {was}, then {now}"
    others = np.fmax.reduce([seen.values[name] for name in PROBES if name != "reference"])
    lost = [number for number in seen.caught if not seen.values["reference"][number] > others[number]]
    if len(lost) > SWALLOWED_SHARE * rows:
        first = seen.caught[lost[0]]
        why = f"line {first['line']} raised {first['what']} on {len(lost)} of {rows} references"
        faults["swallows_exceptions"] = f"{why}, which score no better than other answers to their rows"
    if probes["reference"]["rows"] < rows / 2 and not seen.errors:
        faults["not_applicable"] = f"for {rows - probes['reference']['rows']} of {rows}"
    elif spread == 0:
        faults["constant"] = f"every answer gets {seen.values['reference'][0]:g}"
    elif spread <= 2 * SLACK:  # no `accept` would separate them
        faults["constant"] = f"rewards differ by {spread:g}, which training takes as equal; raise the weight"
    elif not seen.errors:
        faults |= name_unclear(probes, unclear, length)
    return faults


def name_unclear(probes: Mapping[str, Json], unclear: Mapping[str, str], length: Json) -> dict[str, str]:
    """Return a fault for the answers that references do not beat."""
    means = {name: f"{one['reward']['value']:.3g}" for name, one in probes.items()}
    why = {name: f"{title} get {means[name]}, references {means['reference']}" for name, title in unclear.items()}
    if length["value"] > STRONG and "padded" in unclear:
        return {"rewards_length": why["padded"]}
    faults = {f"accepts_{name}": text for name, text in why.items() if name not in ("other", "options")}
    if "other" in unclear:
        faults.pop("accepts_padded", None)  # wrong answers are accepted anyway
        return {**faults, "ignores_reference": f"{why['other']}; weigh it with a reward that reads the reference"}
    return {**faults, **({"accepts_substring": why["options"]} if "options" in unclear else {})}


def _place(fact: Json) -> str:
    line = f"line {fact['line']}, " if fact.get("line") else ""
    return f"{line}row {fact['row']}, answer {fact['answer'][:40]!r}:"
