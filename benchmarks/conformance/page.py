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
from conformance.statements import flatten

PAGE = HERE.parent / "CONFORMANCE.md"
TABLE = HERE.parent / "conformance.json"
GROUPS = "what is learned", "what is computed", "what is measured", "what ships"
VERDICTS = {
    "right": "the result is that of plain torch, or what the case asks for",
    "refused": "an error, or a row left out, and the output names the reason",
    "wrong, with a warning": "another result; the output names the reason",
    "**silently wrong**": "another result without a word; two runs agree, and the documentation was searched in vain",
    "unexplained": "another result, which no known mistake explains, or whose documentation was not searched",
    "documented otherwise": "another result, which the documentation names for this setting",
    "stopped": "an error that does not name the reason",
    "not offered": "the tool has no such feature, or none that runs on a CPU",
    "not run": "the tool does not install or run here, or was not run",
}
INTRO = """# Conformance

Famous failures of fine-tuning that raise no error, run through each tool. Made by `make conformance`, {date}.

**llmtune's authors chose the cases**, mostly failures that llmtune guards against, so other tools meet them unprepared.
Cases that llmtune fails are as welcome: [add one](#add-a-case). Those that it failed when they were added say
what it did, and since which commit it passes.

Each tool trains a tiny random model for one step of plain SGD, from the same rows. The change of its weights, divided
by the learning rate, is the gradient that it used. Plain torch (`conformance/reference.py`) computes the gradient of
the text that the case states by hand, and those of known mistakes. So the table shows what each tool learned, from its
weights alone. Some cases compare something else, such as answers or exported files. In cases on rewards each tool
samples its own answers, and plain torch rewards and learns those. Of a model that reads pictures, a gradient is that of
its language model, as several tools freeze the rest by default.

A cell has two lines where the documented defaults differ from the setting that the documentation names for the task.
**The documented setting counts**, here and in the README. Each tool has the newest version that installs here, and
computes in float32 on a CPU. "Trainer and PEFT" is a plain script, as the documentation of both shows it. Tools with
transformers' Trainer log every step, to show their warnings.

Code makes each verdict, by the same rules for all tools (`Case.decide` in `conformance/case.py`); none is edited later:

- A crash, or a result that no known mistake explains, is not "silently wrong".
- A refusal must name the reason, in the error or in a line of the output. Frames of a traceback do not count.
- A row that is left out counts as refused if the output names the reason, and as another result if it does not.
- A sentence that names the reason is a warning, also if it is a printed `nan`. A percentage or a setting is not.
- A result is documented if the adapter gives an address for this outcome, this column and this value of one setting.
  The documentation is the tool's own, or that of transformers, PEFT or Accelerate where the tool leaves it to them.
- A result is "silently wrong" only if the adapter says where and when the documentation was searched in vain, and two
  runs agree. Until then it is "unexplained". `conformance/tools/NAME.toml` has both kinds of statements.

{made}

Not shown:

{absent}
- torchtune 0.6.1: it does not import with the torchao of 2026-11-29.
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

serve("the-distribution", configure, train)
```

`job["model"]`, `job["rows"]` and `job["out"]` are paths. Write the rows in the tool's documented format; `formats.py`
has some. Then read its documentation, and write what it says about each outcome that is "unexplained" into
`benchmarks/conformance/tools/NAME.toml`:

```toml
[[documented]]                      # a choice of the tool
outcome = "the whole text"          # the beginning of the outcome's name
column = "default"
setting = "mask_prompt"             # without a `value`: the tool's own default
address = "https://its.documentation"

[[searched]]                        # not found
case = "null_answer"
outcome = "the word None"
where = "docs/ of owner/name at commit 0123456: null, None, empty"
date = 2026-11-30
```
"""


def collect(
    cases: Mapping[str, Case], tools: Mapping[str, Tool], cache: Path, fresh: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Put the stored findings of `fresh` pairs of tool and case into the table; other findings stay as they are.

    A tool that does not install here has none, so its column stays too.

    A finding is dropped if the jobs of its case have changed since, and a note on a commit with its last finding.
    """
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"tools": {}, "cases": {}}
    stored: dict[str, dict[str, Any]] = {name: {} for name in cases}
    for tool, name in fresh:
        if (path := cache / "findings" / tool / f"{name}.json").exists():
            stored[name][tool] = json.loads(path.read_text())
    libraries = {tool: entry["libraries"] for tool, entry in table["tools"].items()}
    described: dict[str, Any] = {}
    for name, case in cases.items():
        before = table["cases"].get(name, {})
        kept = before.get("findings", {}) if before.get("jobs") == case.hash_jobs() else {}
        findings = {**kept, **{tool: split_versions(entry, libraries, tool) for tool, entry in stored[name].items()}}
        described[name] = {
            **{key: getattr(case, key) for key in ("title", "group", "question", "added", "failed", "passed")},
            "threads": list(case.threads),
            "jobs": case.hash_jobs(),
            "findings": {tool: findings[tool] for tool in tools if tool in findings and not tools[tool].absent},
        }
    shown = [tool for tool in tools if any(tool in case["findings"] for case in described.values())]
    commits = {finding["commit"] for case in described.values() for finding in case["findings"].values()}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "tools": {tool: describe_tool(tools[tool], libraries.get(tool, {}), described, tool) for tool in shown},
        "notes": {commit: note for commit, note in table.get("notes", {}).items() if commit in commits},
        "absent": {tool.title: tool.absent for tool in tools.values() if tool.absent},
        "cases": described,
    }


def split_versions(entry: Mapping[str, Any], libraries: dict[str, Any], tool: str) -> dict[str, Any]:
    """Return a finding with the tool's version, and remember those of its libraries."""
    versions = dict(entry["versions"])
    version = versions.pop(next(iter(versions), ""), "")
    libraries[tool] = versions or libraries.get(tool, {})
    return {"version": version, **{key: entry[key] for key in ("commit", "date", "columns")}}


def describe_tool(
    tool: Tool, libraries: Mapping[str, str], cases: Mapping[str, Mapping[str, Any]], name: str
) -> dict[str, Any]:
    """Return a tool's title and newest version, what it is given, and the passes that its findings are from."""
    passes: dict[tuple[str, str, str], list[str]] = {}
    for key, case in cases.items():
        if finding := case["findings"].get(name):
            passes.setdefault((finding["date"], finding["version"], finding["commit"]), []).append(key)
    newest = max(passes)
    runs = [
        {"date": date, "version": version, "commit": commit, "cases": names}
        for (date, version, commit), names in sorted(passes.items(), key=lambda entry: -len(entry[1]))
    ]
    return {"title": tool.title, "version": newest[1], "given": tool.given, "libraries": libraries, "passes": runs}


def render(table: Mapping[str, Any]) -> str:
    """Return the page."""
    tools, cases = table["tools"], table["cases"]
    intro = INTRO.format(date=table["date"], made=how_made(table), absent=say_absent(table))
    lines = [intro, "| verdict | meaning |", "|---|---|"]
    lines += [f"| {verdict} | {meaning} |" for verdict, meaning in VERDICTS.items()]
    lines += ["", *summary(table), "", "## Cases and tools", ""]
    titles = [f"{tool['title']} {tool['version']}" for tool in tools.values()]
    lines += [f"| case | {' | '.join(titles)} |", "|---" * (len(tools) + 1) + "|"]
    for group in GROUPS:
        members = {name: case for name, case in cases.items() if case["group"] == group}
        lines += [f"| *{group}* |{' |' * len(tools)}"] if members else []
        for case in members.values():
            cells = [cell(columns_of(case, tool)) for tool in tools]
            lines.append(f"| [{case['title']}](#{anchor(case['title'])}) | {' | '.join(cells)} |")
    shared = {tool: find_shared(table, tool) for tool in tools}
    lines += ["", *describe_settings(tools, shared)]
    for name, case in cases.items():
        lines += ["", *describe_case(name, case, tools, shared)]
    return "\n".join(lines) + "\n" + ADD


def columns_of(case: Mapping[str, Any], tool: str) -> Mapping[str, Any]:
    """Return the verdicts of a tool on a case, by column."""
    columns: Mapping[str, Any] = case["findings"].get(tool, {}).get("columns", {})
    return columns


def how_made(table: Mapping[str, Any]) -> str:
    """Say which commits, days and versions the results are from."""
    passes = [entry for tool in table["tools"].values() for entry in tool["passes"]]
    commits = sorted({entry["commit"] for entry in passes})
    one = len(commits) == 1 and "dirty" not in commits[0]
    origin = f"runs of commit {commits[0]}" if one else f"runs of commits {', '.join(commits)}"
    lines = [f"All results are from {origin}, on {table['machine']}. The tools and their libraries:", ""]
    for tool in table["tools"].values():
        libraries = ", ".join(f"{name} {version}" for name, version in tool["libraries"].items())
        lines.append(f"- {tool['title']} {tool['version']}: {libraries}. {'. '.join(say_passes(tool['passes']))}.")
    notes = [f"- Commit {commit}: {note}" for commit, note in table.get("notes", {}).items()]
    return "\n".join(lines + notes)


def say_absent(table: Mapping[str, Any]) -> str:
    return "\n".join(f"- {title}: {reason}" for title, reason in table["absent"].items())


def say_passes(passes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say when the most cases were run, and which were run at another time."""
    for number, entry in enumerate(passes):
        names = f"{len(entry['cases'])} cases" if number == 0 else ", ".join(f"`{name}`" for name in entry["cases"])
        yield f"{names}: {entry['date']}, version {entry['version']}, commit {entry['commit']}"


def find_shared(table: Mapping[str, Any], tool: str) -> dict[str, Any]:
    """Return the settings that more than half of a tool's configurations have."""
    several = [
        flatten(entry["configuration"])
        for case in table["cases"].values()
        for entry in columns_of(case, tool).values()
        if entry.get("configuration")
    ]
    counts = Counter((name, json.dumps(value)) for settings in several for name, value in settings.items())
    return {name: json.loads(value) for (name, value), count in counts.items() if 2 * count > len(several)}


def describe_settings(tools: Mapping[str, Any], shared: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Show what each tool is given in most cases; a case shows where it differs."""
    yield "## Settings\n\nEach tool has these settings, unless a case shows others:\n"
    for tool, entry in tools.items():
        given = f" {entry['given']}" if entry["given"] else ""
        yield f"- {entry['title']}:{given}\n  `{json.dumps(shared[tool], ensure_ascii=False)}`"


def say_difference(configuration: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
    """Return the settings that differ from the shared ones, and the names of those that are missing."""
    settings = flatten(configuration)
    other = {name: value for name, value in settings.items() if name not in shared or shared[name] != value}
    missing = [name for name in shared if name not in settings]
    parts = [f"`{json.dumps(other, ensure_ascii=False)}`"] if other else []
    return ", ".join(parts + ([f"without {', '.join(missing)}"] if missing else []))


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
    titles = (
        "right or refused",
        "another result, warned of or documented",
        "silently wrong",
        "not offered or no verdict",
    )
    lines = [f"| tool | {' | '.join(titles)} |", "|---|---|---|---|---|"]
    for entry, counts in count_verdicts(table):
        said = counts["wrong, with a warning"] + counts["documented otherwise"]
        rest = counts["not offered"] + counts["stopped"] + counts["unexplained"] + counts["not run"]
        sums = counts["right"] + counts["refused"], said, counts["silently wrong"], rest
        lines.append(f"| {entry['title']} {entry['version']} | {' | '.join(str(number) for number in sums)} |")
    return lines


def count_verdicts(table: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Counter[str]]]:
    """Yield each tool with its verdicts, on the documented setting where it differs from the default."""
    for tool, entry in table["tools"].items():
        findings = [columns_of(case, tool) for case in table["cases"].values()]
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


def describe_case(
    name: str, case: Mapping[str, Any], tools: Mapping[str, Any], shared: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Show the question, the threads, what each tool did, and the settings that differ from its shared ones."""
    links = ", ".join(f"[{short(link)}]({link})" for link in case["threads"])
    added = f" Added {case['added']}, when llmtune failed it: {case['failed']}." if case["added"] else ""
    added += f" It passes since {case['passed']}." if case["passed"] else ""
    yield f"## {case['title']}\n\n{case['question']} Case `{name}`, met in {links}.{added}\n"
    entries = [
        (tools[tool]["title"] + (f" ({column})" if len(finding["columns"]) > 1 else ""), tool, entry)
        for tool, finding in case["findings"].items()
        for column, entry in finding["columns"].items()
    ]
    if right := [who for who, _, entry in entries if entry["verdict"] == "right"]:
        yield f"- right: {', '.join(right)}"
    for who, _, entry in entries:
        if entry["verdict"] != "right":
            yield describe_entry(who, entry)
    differences = [
        (who, say_difference(entry.get("configuration") or {}, shared[tool]))
        for who, tool, entry in entries
        if entry.get("configuration")
    ]
    if lines := [f"- {who}: {difference}" for who, difference in differences if difference]:
        yield "\n".join(["\n<details><summary>Settings</summary>\n", *lines, "\n</details>"])


def describe_entry(who: str, entry: Mapping[str, Any]) -> str:
    did = f": {first_line(entry['learned'])}" if entry["learned"].strip() else ""
    runs = f", in {entry['runs']} runs" if "runs" in entry else ""
    searched = f". Searched in vain: {entry['searched']}" if entry.get("searched") else ""
    return f"- {who}: {strong(entry['verdict'])}{did}{runs}{searched}"


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
