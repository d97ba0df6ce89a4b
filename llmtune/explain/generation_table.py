"""The four stages of an answer as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmtune.explain.target import BASE, TUNED
from llmtune.explain.token_json import shown

Facts = Mapping[str, Any]
STAGES = ("Prompt to tokens", "Model processing", "Word prediction", "Output so far")
HEAD, TAIL = 70, 30
"""Tokens of a long prompt that are shown."""
COLOURS = {BASE: "yellow", TUNED: "cyan"}
MOST_LAYERS = 40


def print_generation(told: Facts, console: Console, top: int) -> None:
    """Print the stages, and of a run where base and tuned model part; `top` tokens of a step are listed."""
    parted = parted_step(told)
    parts: list[RenderableType] = [heading(1, f"{len(told['tokens'])} tokens"), indented(tokens(told["tokens"]))]
    if told["note"]:
        parts.append(indented(Text(told["note"], style="yellow")))
    where = f"step {parted + 1}" + (", where they part" if told["parting"] is not None else "")
    parts += [heading(2, f"what each layer would say (logit lens) at {where}"), indented(lens(told, parted))]
    parts.append(heading(3, choice_line(told["choice"])))
    parts += [indented(steps(side, trace, told, top)) for side, trace in told["traces"].items()]
    parts += [heading(4, ""), indented(outputs(told))]
    if len(told["traces"]) > 1:
        parts += [Text("\nWhere they part", style="bold"), indented(part(told, top))]
    if told["comparison"]:
        parts += [Text("\nHow the tuning moved each word of the tuned answer", style="bold")]
        parts.append(indented(moved(told["comparison"])))
    console.print(Group(*parts), highlight=False)


def parted_step(told: Facts) -> int:
    """Return the step at which layers are looked at: where the sides part, else the first."""
    at = told["parting"]
    return int(at) if at is not None and all(at < len(trace["steps"]) for trace in told["traces"].values()) else 0


def heading(number: int, rest: str) -> Text:
    """Return the head of a stage."""
    text = Text(f"\n{number}  {STAGES[number - 1]}", style="bold")
    return text.append(f"  {rest}", style="not bold dim") if rest else text


def indented(part: RenderableType) -> Padding:
    """Set it in by the width of a stage's number."""
    return Padding(part, (0, 0, 0, 3))


def tokens(found: Sequence[Facts]) -> Text:
    """Return tokens one after the other, a line between them."""
    text = Text()
    cut = len(found) > HEAD + TAIL
    for at, token in enumerate([*found[:HEAD], *found[-TAIL:]] if cut else found):
        if cut and at == HEAD:
            text.append(f" … {len(found) - HEAD - TAIL:,} more … ", style="dim italic")
        elif at:
            text.append("│", style="dim")
        text.append(plain(token), style="magenta" if token["special"] else "")
    return text


def plain(token: Facts) -> str:
    """Return a token as it stands in a text: its space is a space."""
    return shown(token, 40).replace("␣", " ", 1) if str(token["text"]).startswith(" ") else shown(token, 40)


def lens(told: Facts, at: int) -> RenderableType:
    """Return what each layer would say at one step, of all sides beside one another."""
    sides = {side: trace["steps"][at]["layers"] for side, trace in told["traces"].items() if trace["steps"]}
    if not sides or not all(sides.values()):
        return Text("The layers of this model cannot be read by themselves.", style="yellow")
    table = new_table()
    table.add_column("layer", justify="right", style="dim")
    for side in sides:
        table.add_column("says" if len(sides) == 1 else f"{side} says", style=COLOURS.get(side, ""), no_wrap=True)
        table.add_column("p", justify="right")
        table.add_column("p(chosen)", justify="right", style="dim")
    number = len(next(iter(sides.values())))
    every = -(-number // MOST_LAYERS)
    for layer in [i for i in range(number) if i % every == 0 or i == number - 1]:
        row = ["0: input" if layer == 0 else str(layer)]
        for layers in sides.values():
            first = layers[layer]["says"][0]
            row += [shown(first), share(first["probability"]), share(layers[layer]["chosen"])]
        table.add_row(*map(Text, row))
    return table


def choice_line(choice: Facts) -> str:
    """Say how a token is chosen, and what would be kept."""
    kept = f"temperature {choice['temperature']:g}, top-p {choice['top_p']:g}"
    if choice["top_k"]:
        kept += f", top-k {choice['top_k']}"
    return f"drawn with {kept}, seed {choice['seed']}" if choice["sample"] else f"greedy; kept: by {kept}"


def steps(side: str, trace: Facts, told: Facts, top: int) -> RenderableType:
    """Return a row a step: the word, how likely it was, and the others."""
    table = new_table()
    if len(told["traces"]) > 1:
        table.title, table.title_justify, table.title_style = side, "left", f"bold {COLOURS.get(side, '')}"
    table.add_column("", justify="right", style="dim")
    table.add_column("word" if not told["masked"] else "mask", no_wrap=True)
    table.add_column("p", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("kept", justify="right")
    table.add_column("could also be")
    for number, step in enumerate(trace["steps"], 1):
        others = [one for one in step["candidates"] if one["id"] != step["token"]["id"]][: max(0, top - 1)]
        told_others = Text(", ").join(
            Text(f"{shown(one)} {share(one['probability'])}", style="" if one["kept"] else "dim") for one in others
        )
        facts = (str(number), shown(step["token"]), share(step["probability"]), f"{step['entropy_bits']:.2f}")
        table.add_row(*map(Text, facts), Text(f"{step['kept_tokens']:,}"), told_others)
    return table


def outputs(told: Facts) -> Text:
    """Return each side's answer, token by token."""
    text = Text()
    for number, (side, trace) in enumerate(told["traces"].items()):
        text.append("\n" if number else "")
        if len(told["traces"]) > 1:
            text.append(f"{side:>6}  ", style=f"bold {COLOURS.get(side, '')}")
        text.append_text(tokens([step["token"] for step in trace["steps"]]))
        if not trace["ended"]:
            text.append(f" … ({len(trace['steps'])} tokens, no end)", style="dim")
    return text


def part(told: Facts, top: int) -> RenderableType:
    """Return what base and tuned model could say at the step where their answers part."""
    at, traces = told["parting"], told["traces"]
    if at is None:
        return Text("They do not: both say the same.")
    common = [step["token"] for step in traces[TUNED]["steps"][:at]]
    head = Text("At the first word." if not at else f"At word {at + 1}, after: ")
    head.append_text(tokens(common))
    table = new_table()
    for side in (BASE, TUNED):
        table.add_column(side, style=COLOURS[side], no_wrap=True)
        table.add_column("p", justify="right")
    columns = [traces[side]["steps"][at : at + 1] for side in (BASE, TUNED)]
    for rank in range(top):
        row: list[str] = []
        for found in columns:
            candidates = found[0]["candidates"] if found else []
            one = candidates[rank] if rank < len(candidates) else None
            row += [shown(one), share(one["probability"])] if one else ["", ""]
        table.add_row(*map(Text, row))
    return Group(head, table)


def moved(comparison: Sequence[Facts]) -> RenderableType:
    """Return how likely each token of the tuned model's answer is to both."""
    table = new_table()
    table.add_column("word", no_wrap=True)
    for name in ("base", "tuned", "times"):
        table.add_column(name, justify="right")
    table.add_column("its rank in the base", justify="right")
    table.add_column("there the base says")
    for row in comparison:
        first = row["base_says"]
        facts = (
            shown(row),
            share(row["base"], exact=True),
            share(row["tuned"], exact=True),
            times(row["base"], row["tuned"]),
        )
        says = "the same" if row["base_rank"] == 1 else f"{shown(first)} {share(first['probability'])}"
        table.add_row(*map(Text, facts), Text(f"{row['base_rank']:,}"), Text(says))
    return table


def new_table() -> Table:
    """Return an empty table without a frame."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")


def share(value: float, *, exact: bool = False) -> str:
    """Write a probability in five letters; a small one as such, or with its power of ten."""
    if value >= 0.995:
        return "1.00" if value >= 0.9995 else f"{value:.3f}"
    if value >= 0.005:
        return f"{value:.2f}"
    if exact:
        return f"{value:.0e}" if value else "0"
    return f"{value:.3f}" if value >= 0.0005 else "<.001"


def times(base: float, tuned: float) -> str:
    """Write by which factor a probability grew or shrank."""
    if not base:
        return "∞" if tuned else "1"
    factor = tuned / base
    return f"× {factor:,.0f}" if factor >= 9.5 else f"× {factor:.1f}" if factor >= 0.1 else f"× {factor:.0e}"
