"""`llmtune reward`: check rewards on your rows before they train."""

from __future__ import annotations

from contextlib import suppress
from math import isfinite
from typing import Annotated

import typer

from llmtune.cli.options import AsJson, Offline
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.errors import GateFailed, Problem, RecipeError, refuse_repeated
from llmtune.records import Json

MOST_WEIGHT = 1000
app = typer.Typer(help="Rewards: check.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Rewards of `task: reinforce`."""


@app.command("check")
@handled
def check_reward(
    rewards: Annotated[
        list[str],
        typer.Argument(metavar="REWARD...", help="FILE.py:FUNCTION or the name of a metric; several with =WEIGHT."),
    ],
    rows: Annotated[str, typer.Option("--rows", help="Rows with reference answers: a file, folder or glob.")],
    answer_form: Annotated[
        str, typer.Option("--answer-form", metavar="TEXT", help=r"How a right answer is written: '\boxed{}'.")
    ] = "{}",
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time limit of each reward.")] = 300,
    network: Annotated[bool, typer.Option("--network", help="Let rewards use the network.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which rows are checked.")] = 0,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Also sample answers of this model.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=2, max=1024, help="With --model: answers per prompt.")] = 8,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, max=2**20, help="With --model: the longest answer.")
    ] = 256,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Check on your rows that right answers get more reward than wrong ones; exit 6 if they do not."""
    from pathlib import Path

    from llmtune.evaluate.rewards import read_rewards
    from llmtune.recipe.evaluate_section import absolute_metric

    if "{}" not in answer_form:
        raise RecipeError.of(f"{answer_form!r} has no place for the answer", "--answer-form", "Write {} at its place.")
    pairs = [(absolute_metric(name, Path.cwd()), weight) for name, weight in map(read_weight, rewards)]
    refuse_repeated([name for name, _ in pairs], "llmtune reward check")
    stated = dict(pairs)
    listed = read_rewards(stated, "llmtune reward check")
    from llmtune.evaluate.reward_check import RewardLimits, add_samples, check_rewards, read_checked_rows

    checked, console = read_checked_rows(rows, seed), stderr_console()
    limits = RewardLimits(seconds, network)
    document = check_rewards(listed, checked, answer_form, seed, limits, console)
    if model is not None and document["ok"]:
        from llmtune.explain.reward_samples import SampleRequest, describe_samples

        request = SampleRequest(model, samples, max_new_tokens, document["recipe"]["accept"], seed, offline)
        document = add_samples(document, describe_samples(request, listed, checked, limits, console))
    if as_json:
        print_json(document)
        raise typer.Exit(0 if document["ok"] else GateFailed.exit_code)
    print_check(document)
    name = " + ".join(one.name for one in listed)
    GateFailed.collect(Problem(f"{name} {fault['what']}: {fault['why']}", rows) for fault in document["faults"])


def read_weight(text: str) -> tuple[str, float]:
    """Read `NAME=WEIGHT`; the weight is 1 if not stated. Raises RecipeError."""
    name, equals, weight = text.rpartition("=")
    with suppress(ValueError):
        if not equals or 0 < float(weight) <= MOST_WEIGHT:
            return (name, float(weight)) if equals else (text, 1.0)
    raise RecipeError.of(f"{weight!r} is not a weight", text, f"Write a number up to {MOST_WEIGHT}: exact_match=1.0.")


def print_check(document: Json) -> None:
    """Print the rewards of each kind of answer, and what else the calls showed."""
    from llmtune.display.blocks import Column, Table
    from llmtune.display.console import print_blocks
    from llmtune.launch.python_api import make_console

    def interval(one: Json) -> list[str]:
        if not isfinite(one["value"]):  # the reward failed on each of them, or does not apply
            return ["none", "no reward"]
        return [f"{one['value']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}"]

    table = []
    for one in document["probes"].values():
        gap = [*interval(one["gap"]), "" if one["clear"] else "not clear"] if "gap" in one else ["", "", ""]
        table.append([one["answers"], *interval(one["reward"]), *gap])
    heads = ("reward", "95 %", "references are above by", "95 %", "")
    title = f"{document['rows']} rows; " + "; ".join(
        f"{one['name']}: {one['signature']}" for one in document["rewards"]
    )
    console = make_console(stderr=False)
    print_blocks([Table(["answers", *(Column(name, "number") for name in heads)], table, title)], console)
    correlation = interval(document["length_correlation"])
    longer = "; longer ones get more" if document["length_correlation"]["low"] > 0 else ""
    lines = [f"Rank correlation of wrong answers with their length: {correlation[0]} ({correlation[1]}){longer}"]
    lines += [f"Time per call: {1000 * document['seconds_per_call']:.3g} ms"]
    lines += [f"None, not applicable: {sum(document['none'].values())} answers"] if document["none"] else []
    if one := document["model"]:
        names = ("pass@1", f"pass@{one['samples']}", "spread")
        shown = (f"{name} {' ('.join(interval(one[name]))})" for name in names)
        lines += [f"{one['name']}, {one['prompts']} prompts: {', '.join(shown)}, truncated {one['truncated']:.0%}"]
    stated = {name: value for name, value in document["recipe"].items() if value is not None}
    suggested = ", ".join(f"reinforce.{name}: {value:.15g}" for name, value in stated.items())
    lines += [f"Suggested: {suggested}"] if document["ok"] else []
    console.print("\n".join(lines), highlight=False, markup=False)
