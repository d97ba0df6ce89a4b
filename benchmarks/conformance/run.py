"""Run tools through the cases, and write CONFORMANCE.md and conformance.json: `make conformance TOOLS="llmtune trl"`.

    python benchmarks/conformance/run.py --tools llmtune trl --cases answers_only

Runs are kept, with their logs, in `build/conformance/runs/TOOL/COLUMN/CASE/JOB`, and are used again while the case's
jobs, the adapter and the tool's version are the same; llmtune's code counts as its version. They are judged each time.
A silently wrong one is run twice.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from conformance.case import Case, Finding, Job, Result  # noqa: E402
from conformance.environments import VARIABLES, Tool, list_tools  # noqa: E402
from conformance.models import build_model  # noqa: E402
from conformance.page import PAGE, TABLE, collect, render  # noqa: E402
from conformance.pictures import draw  # noqa: E402
from conformance.reference import Reference  # noqa: E402
from conformance.statements import Statements, read_statements  # noqa: E402

Entry = dict[str, Any]
"""A finding, with the tool's configuration and the number of runs."""
COLUMNS = "default", "documented"
SECONDS = 1800
"""Time limit of one process of an adapter, which may do many jobs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="*", help="names in tools.toml; default: all that the page shows")
    parser.add_argument("--cases", nargs="*", help="names of files in cases/; default: all")
    parser.add_argument("--cache", type=Path, default=Path("build/conformance"))
    parser.add_argument("--fresh", action="store_true", help="run again what is cached")
    parser.add_argument("--no-page", action="store_true", help="print the findings only")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a tool is wrong or stops in a case")
    options = parser.parse_args()
    cache = options.cache.resolve()
    tools, cases = list_tools(cache), list_cases()
    shown = [name for name, tool in tools.items() if not tool.absent]
    pairs = [(tool, case) for tool in options.tools or shown for case in options.cases or cases]
    wrong = list[str]()
    for name in dict.fromkeys(tool for tool, _ in pairs):
        wrong += run_tool(
            tools[name], {case: cases[case] for tool, case in pairs if tool == name}, cache, options.fresh
        )
    if not options.no_page:
        table = collect(cases, tools, cache, pairs)
        TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(render(table), encoding="utf-8")
    if options.strict and wrong:
        print("not right:", *wrong)
        return 1
    return 0


def list_cases() -> dict[str, Case]:
    """Return all cases by the names of their files."""
    names = sorted(path.stem for path in (HERE / "cases").glob("*.py"))
    return {name: importlib.import_module(f"conformance.cases.{name}").CASE for name in names}


def run_tool(tool: Tool, cases: Mapping[str, Case], cache: Path, fresh: bool) -> list[str]:
    """Bring the stored findings of one tool up to date; return the cases in which it is wrong or stops."""
    try:
        versions = tool.read_versions()
    except subprocess.CalledProcessError as error:
        print(f"{tool.name} does not install here: {(error.stderr or str(error)).strip()[-300:]}", flush=True)
        return [*cases]
    keys = {name: make_key(tool, case, versions) for name, case in cases.items()}
    columns: dict[str, dict[str, Any]] = {name: {} for name in cases}
    for column in COLUMNS:
        folder, again = cache / "runs" / tool.name / column, cache / "runs" / tool.name / f"{column}-again"
        todo = {name: case for name, case in cases.items() if not columns[name].get("default", {}).get("same")}
        first = judge_all(tool, todo, keys, folder, cache, fresh)
        wrong = {name: cases[name] for name, entry in first.items() if entry["verdict"] == "silently wrong"}
        second = judge_all(tool, wrong, keys, again, cache, fresh)
        for name, entry in first.items():
            columns[name][column] = compare_runs(entry, second[name]) if name in second else entry
            learned = columns[name][column]["learned"][:200].replace("\n", " ")
            print(tool.name, name, column, columns[name][column]["verdict"], learned, flush=True)
    for name, entries in columns.items():
        origin = read_origin(cache / "runs" / tool.name / "default" / name)
        store(cache, tool, name, cases[name], versions, origin, entries)
    right = {"right", "refused", "not offered"}
    return [name for name, found in columns.items() if not {entry["verdict"] for entry in found.values()} <= right]


def compare_runs(first: Entry, second: Entry) -> Entry:
    """Return what two runs agree on."""
    if (first["verdict"], first["learned"]) == (second["verdict"], second["learned"]):
        return {**first, "runs": 2}
    return {**first, "verdict": "not run", "learned": f"two runs differ: {first['learned']}; {second['learned']}"}


def judge_all(
    tool: Tool, cases: Mapping[str, Case], keys: Mapping[str, str], folder: Path, cache: Path, fresh: bool
) -> dict[str, Entry]:
    """Run the jobs of the cases that have not been run, and judge all; `same`: both columns have the same settings."""
    jobs = [job for name, case in cases.items() for job in place_jobs(case, keys[name], folder / name, cache, fresh)]
    run_jobs(tool, jobs, folder)
    found, statements = {}, read_statements(tool.adapter.with_suffix(".toml"))
    for name, case in cases.items():
        results = read_results(case, folder / name)
        finding = asdict(judge_case(case, results, statements.of(name), cache))
        finding["configuration"] = next(iter(results.values())).configuration
        found[name] = json.loads(hide_folders(json.dumps(finding)))
        found[name]["same"] = all(result.found.get("same") for result in results.values())
    return found


def place_jobs(case: Case, key: str, folder: Path, cache: Path, fresh: bool) -> list[Job]:
    """Write rows, build models, and return the jobs of a case, unless all are done."""
    jobs = case.make_jobs()
    done = all((folder / name / "result.json").exists() for name in jobs)
    if done and not fresh and read_origin(folder).get("key") == key:
        return []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    origin = {"key": key, "commit": read_commit(), "date": datetime.now(UTC).date().isoformat()}
    (folder / "origin.json").write_text(json.dumps(origin))
    for name, job in jobs.items():
        out = folder / name
        out.mkdir()
        job["model"] = str(model_folder(job, cache))
        job["column"] = folder.parent.name.removesuffix("-again")
        job["out"] = str(out)
        job |= {kind: write_rows(out / f"{kind}.{job['file']}", job[kind]) for kind in ("rows", "test_rows")}
        job["micro_batch_size"] = job["micro_batch_size"] or job["batch_size"]
        job["resume_from"] = str(folder / job["resume_from"]) if job["resume_from"] else None
    return list(jobs.values())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str | None:
    if not rows:
        return None
    for row in rows:
        row |= {"images": [draw(name, path.parent) for name in row["images"]]} if "images" in row else {}
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def model_folder(job: Job, cache: Path) -> Path:
    text = (HERE / "models.py").read_bytes()
    folder = cache / "models" / f"{job['model']}-{hashlib.sha256(text).hexdigest()[:8]}"
    return folder if folder.exists() else build_model(job["model"], folder)


def run_jobs(tool: Tool, jobs: list[Job], folder: Path) -> None:
    """Run jobs in one process; after a crash or a timeout, continue after the job that caused it."""
    folder.mkdir(parents=True, exist_ok=True)
    while jobs:
        listed, log = folder / "jobs.json", folder / "process.txt"
        listed.write_text(json.dumps(jobs))
        with log.open("wb") as file:
            command = [tool.interpreter(), tool.adapter, listed]
            process = subprocess.Popen(
                command,
                env={**os.environ, **VARIABLES},
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,
            )
            try:
                why = f"the process ended with exit code {process.wait(SECONDS)}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                why = f"no end within {SECONDS} s"
        missing = [job for job in jobs if not (Path(job["out"]) / "result.json").exists()]
        if missing:
            result = {"status": "error", "message": f"{why}\n{log.read_text(errors='replace')[-1500:]}"}
            (Path(missing[0]["out"]) / "result.json").write_text(json.dumps(result))
        jobs = missing[1:]


def read_results(case: Case, folder: Path) -> dict[str, Result]:
    """Return what the adapter wrote for each job of a case."""
    results = {}
    for key, job in case.make_jobs().items():
        found = json.loads((folder / key / "result.json").read_text())
        log = folder / key / "log.txt"
        results[key] = Result(
            status=found["status"],
            message=hide_folders(found["message"]),
            log=hide_folders(read_plain(log)) if log.exists() else "",
            model=Path(found["model"]) if "model" in found else None,
            configuration=found.get("configuration", {}),
            job=job | {"column": folder.parent.name.removesuffix("-again")},
            found=found,
        )
    return results


def judge_case(case: Case, results: Mapping[str, Result], statements: Statements, cache: Path) -> Finding:
    first = next(iter(results.values())).job
    try:
        return case.decide(open_reference(model_folder(first, cache)), results, statements)
    except Exception as error:  # a tool may leave anything
        return Finding("stopped", f"the result cannot be read: {type(error).__name__}: {error}")


@functools.cache
def open_reference(folder: Path) -> Reference:
    return Reference(folder)


def read_plain(log: Path) -> str:
    """Return a log without the codes of colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))


def hide_folders(text: str) -> str:
    """Shorten absolute paths to their last part, as they name this machine; addresses stay."""
    return re.sub(r"(?<![\w:/.])(?:/[\w.+~@-]+)+/", "", text)


def make_key(tool: Tool, case: Case, versions: Mapping[str, str]) -> str:
    """Hash everything that a run depends on."""
    files = [tool.adapter, *(HERE / f"{name}.py" for name in ("adapter", "formats", "models", "pictures"))]
    source = [hash_source(HERE.parents[1] / tool.source)] if tool.source else []
    stated = json.dumps([versions, case.hash_jobs(), [read_code(file) for file in files], *source])
    return hashlib.sha256(stated.encode()).hexdigest()[:16]


@functools.cache
def hash_source(folder: Path) -> str:
    """Hash the code of all modules in a folder."""
    return hashlib.sha256("".join(map(read_code, sorted(folder.rglob("*.py")))).encode()).hexdigest()


@functools.cache
def read_code(file: Path) -> str:
    """Return a module's code without comments, docstrings and layout."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
    return ast.dump(tree)


def read_origin(folder: Path) -> dict[str, str]:
    """Return the key, the commit and the date of the run in a folder, if there is one."""
    path = folder / "origin.json"
    return json.loads(path.read_text()) if path.exists() else {}


def store(
    cache: Path,
    tool: Tool,
    name: str,
    case: Case,
    versions: Mapping[str, str],
    origin: Mapping[str, str],
    columns: Mapping[str, Entry],
) -> None:
    path = cache / "findings" / tool.name / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"commit": origin.get("commit", ""), "date": origin.get("date", ""), "jobs": case.hash_jobs()}
    path.write_text(json.dumps({**made, "versions": versions, "columns": columns}, indent=1))


@functools.cache
def read_commit() -> str:
    """Return the commit of the suite; "-dirty" follows if cases, adapters or models differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()

    files = "cases", "tools/*.py", "adapter.py", "formats.py", "models.py", "pictures.py"
    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return f"{commit}-dirty" if git("status", "--porcelain", "--", *files) else commit


if __name__ == "__main__":
    raise SystemExit(main())
