"""CONFORMANCE.md, rendered from conformance.json."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conformance.case import Case
from conformance.environments import HERE, Tool

PAGE = HERE.parent / "CONFORMANCE.md"
TABLE = HERE.parent / "conformance.json"
GROUPS = "what is learned", "what is computed", "what is measured", "what ships"
VERDICTS = {
    "right": "the result is that of plain torch, or what the case asks for",
    "refused": "an error, or a row left out, with the reason",
    "wrong, with a warning": "another result; the output names the reason",
    "**silently wrong**": "another result without a word; seen in two runs",
    "unexplained": "another result, which none of the case's known mistakes explains; it may be right",
    "documented otherwise": "another result, which the documentation names as the tool's choice",
    "stopped": "an error that does not name the reason",
    "not offered": "the tool has no such feature, or none that runs on a CPU",
    "not run": "the tool does not install or run here, or was not run",
}
INTRO = """# Conformance

Famous failures of fine-tuning that raise no error, run through each tool. Made by `make conformance`, {date}.

Each tool trains a tiny random model for one step of plain SGD, from the same rows. The change of its weights, divided
by the learning rate, is the gradient that it used. Plain torch (`conformance/reference.py`) computes the gradient of
the text that the case states by hand, and those of known mistakes. So the table shows what each tool learned, from its
weights alone. Some cases compare something else, such as answers or exported files.

A cell has two lines where the documented defaults differ from the setting that the documentation names for the task.
Each tool has the newest version that installs here, and computes in float32 on a CPU. "Trainer and PEFT" is a plain
script, as the documentation of both shows it. Tools with transformers' Trainer log every step, to show their warnings.

Code makes each verdict, by the same rules for all tools (`Case.decide` in `conformance/case.py`); none is edited later.
A crash is not "silently wrong". Neither is a result that no known mistake explains, a result that the output warns
of, nor a documented choice. A choice counts as documented if an address is given for it, in the tool's own
documentation, or in that of transformers or PEFT where the tool leaves the matter to them.

{made}

Not shown: axolotl, LitGPT and unsloth, whose adapters here do not yet run every case in a way that can be explained,
and torchtune 0.6.1, which does not import with the current torchao.

llmtune's authors chose the cases, mostly failures that llmtune guards against, so other tools meet them unprepared.
Cases that llmtune fails are as welcome: [add one](#add-a-case).
"""
ADD = """
## Add a case

Write `benchmarks/conformance/cases/NAME.py` with a `CASE`:

```python
from conformance.case import Case
from conformance.conversations import RIGHT, WHOLE, learns, qwen, row

TURNS = [("system", "You are brief."), ("user", "Which colour is the sky?"), ("assistant", "Blue.")]
CASE = Case(
    title="Only answers are learned", group="what is learned", question="Is only the answer learned?",
    threads=["https://github.com/huggingface/trl/issues/2424"],  # where users met it
    rows=[row(*TURNS)], settings={"batch_size": 1},              # the keys of a job, in README.md
    right=learns(qwen, [TURNS], RIGHT), wrong=learns(qwen, [TURNS], WHOLE),  # any of `right`; named mistakes
    reason=r"no assistant",                                      # finds the reason in an error or a warning
)
```

`qwen` writes the text of a conversation as Qwen's template does. The first turn is the system message, as the template
adds one otherwise. `RIGHT` allows the line breaks around an answer; use `ALL` if the case is not about masks. Without a
`reason`, an error counts as "stopped". Choose words that no tool prints among its settings.

Try it. The first run of another tool installs it, except for `trl` and `trainer`:

    .venv/bin/python benchmarks/conformance/run.py --no-page --cases NAME --tools llmtune trl

Then `make conformance` writes this page. A case that compares something else than one gradient has a `judge`, such as
`cases/seed.py`. All keys, models and verdicts are in
[benchmarks/conformance/README.md](conformance/README.md).

## Add a tool

Add a section to `benchmarks/conformance/tools.toml`:

```toml
[name]
title = "The Tool"
package = "the-distribution"
requires = ["the-distribution"]     # installed by pip in an environment of its own
```

Then write `benchmarks/conformance/tools/NAME.py`:

```python
from conformance.adapter import NotOffered, serve

def configure(job):             # the tool's own settings for a job; raise NotOffered("no packing") if it has none
    return {"lr": job["learning_rate"], "mask_prompt": job["column"] == "documented"}

def train(job, settings):       # run the tool; return the folder with the safetensors of the trained model or adapter
    return {"model": run_the_tool(job["model"], job["rows"], settings, job["out"])}

serve("the-distribution", configure, train, documented={"the whole text": "https://its.documentation"})
```

`job["model"]`, `job["rows"]` and `job["out"]` are paths. Write the rows in the tool's documented format; `formats.py`
has some. `documented` lists outcomes that the tool documents as its choice, by their names in a case's `wrong`.
"""


def collect(cases: Mapping[str, Case], tools: Mapping[str, Tool], cache: Path) -> dict[str, Any]:
    """Put the stored findings of all tools together."""
    found: dict[str, Any] = {}
    for tool in tools:
        paths = {name: cache / "findings" / tool / f"{name}.json" for name in cases}
        found[tool] = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    known = {tool: findings for tool, findings in found.items() if findings}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "tools": {
            tool: {"title": tools[tool].title, **describe_tool(list(findings.values()))}
            for tool, findings in known.items()
        },
        "cases": {
            name: {
                "title": case.title,
                "group": case.group,
                "question": case.question,
                "threads": list(case.threads),
                "findings": {tool: findings[name]["columns"] for tool, findings in known.items() if name in findings},
            }
            for name, case in cases.items()
        },
    }


def describe_tool(findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the versions of a tool and of its libraries, and the commits that its findings are from."""
    versions = dict(findings[0]["versions"])
    own = next(iter(versions), None)
    commits = sorted({finding["commit"] for finding in findings})
    return {"version": versions.pop(own, ""), "libraries": versions, "commits": commits}


def render(table: Mapping[str, Any]) -> str:
    """Return the page."""
    tools, cases = table["tools"], table["cases"]
    lines = [INTRO.format(date=table["date"], made=how_made(table)), "| verdict | meaning |", "|---|---|"]
    lines += [f"| {verdict} | {meaning} |" for verdict, meaning in VERDICTS.items()]
    lines += ["", *summary(table), "", "## Cases and tools", ""]
    titles = [f"{tool['title']} {tool['version']}" for tool in tools.values()]
    lines += [f"| case | {' | '.join(titles)} |", "|---" * (len(tools) + 1) + "|"]
    for group in GROUPS:
        members = {name: case for name, case in cases.items() if case["group"] == group}
        lines += [f"| *{group}* |{' |' * len(tools)}"] if members else []
        for case in members.values():
            cells = [cell(case["findings"].get(tool, {})) for tool in tools]
            lines.append(f"| [{case['title']}](#{anchor(case['title'])}) | {' | '.join(cells)} |")
    for name, case in cases.items():
        lines += ["", *describe_case(name, case, tools)]
    return "\n".join(lines) + "\n" + ADD


def how_made(table: Mapping[str, Any]) -> str:
    """Say which commits and versions the results are from."""
    commits = sorted({commit for tool in table["tools"].values() for commit in tool["commits"]})
    one = len(commits) == 1 and "dirty" not in commits[0]
    origin = f"one pass, from commit {commits[0]}" if one else f"several passes, from commits {', '.join(commits)}"
    lines = [f"All results are from {origin}, on {table['machine']}. The tools and their libraries:", ""]
    for tool in table["tools"].values():
        libraries = ", ".join(f"{name} {version}" for name, version in tool["libraries"].items())
        lines.append(f"- {tool['title']} {tool['version']}: {libraries}")
    return "\n".join(lines)


def summary(table: Mapping[str, Any]) -> Iterator[str]:
    """Count, for each tool, the verdicts of its best column."""
    shown = [verdict.strip("*") for verdict in VERDICTS]
    yield f"| tool | {' | '.join(shown)} |"
    yield "|---" * (len(shown) + 1) + "|"
    for entry, counts in count_verdicts(table):
        yield f"| {entry['title']} {entry['version']} | {' | '.join(str(counts[verdict] or '') for verdict in shown)} |"
    yield ""
    yield "This counts the documented setting where it differs from the default."


def short_summary(table: Mapping[str, Any]) -> list[str]:
    """Return the README's table."""
    lines = [
        "| tool | right or refused | wrong, but warned or documented | silently wrong | not offered or no verdict |"
    ]
    lines.append("|---|---|---|---|---|")
    for entry, counts in count_verdicts(table):
        said = counts["wrong, with a warning"] + counts["documented otherwise"]
        rest = counts["not offered"] + counts["stopped"] + counts["unexplained"] + counts["not run"]
        sums = counts["right"] + counts["refused"], said, counts["silently wrong"], rest
        lines.append(f"| {entry['title']} {entry['version']} | {' | '.join(str(number) for number in sums)} |")
    return lines


def count_verdicts(table: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Counter[str]]]:
    """Yield each tool with its verdicts, on the documented setting where it differs from the default."""
    for tool, entry in table["tools"].items():
        findings = [case["findings"].get(tool, {}) for case in table["cases"].values()]
        yield entry, Counter(final_verdict(columns) for columns in findings)


def final_verdict(columns: Mapping[str, Any]) -> str:
    entry = columns.get("documented") or columns.get("default") or {"verdict": "not run"}
    return str(entry["verdict"])


def cell(columns: Mapping[str, Any]) -> str:
    words = {name: strong(entry["verdict"]) for name, entry in columns.items()}
    if len(set(words.values())) <= 1:
        return next(iter(words.values()), "not run")
    return "<br>".join(f"{name}: {word}" for name, word in words.items())


def strong(verdict: str) -> str:
    return f"**{verdict}**" if verdict == "silently wrong" else verdict


def describe_case(name: str, case: Mapping[str, Any], tools: Mapping[str, Any]) -> Iterator[str]:
    """Show the question, the threads, and what each tool did."""
    links = ", ".join(f"[{short(link)}]({link})" for link in case["threads"])
    yield f"## {case['title']}\n\n{case['question']} Case `{name}`, met in {links}.\n"
    right, others = [], []
    for tool, columns in case["findings"].items():
        for column, entry in columns.items():
            who = tools[tool]["title"] + (f" ({column})" if len(columns) > 1 else "")
            if entry["verdict"] == "right":
                right.append(who)
            else:
                others.append((who, entry))
    if right:
        yield f"- right: {', '.join(right)}"
    for who, entry in others:
        did, runs = first_line(entry["learned"]), f", in {entry['runs']} runs" if "runs" in entry else ""
        yield f"- {who}: {strong(entry['verdict'])}{': ' + did if did else ''}{runs}"
        if entry["verdict"] in ("silently wrong", "wrong, with a warning"):
            yield f"  `{json.dumps(entry.get('configuration', {}), ensure_ascii=False)}`"


def first_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line.replace("|", "\\|").replace("<", "\\<")[:240]


def short(link: str) -> str:
    """Return owner/name#number of an issue's address."""
    parts = link.removeprefix("https://github.com/").split("/")
    return f"{parts[0]}/{parts[1]}#{parts[-1]}" if len(parts) == 4 else link


def anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")
