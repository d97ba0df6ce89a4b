"""Run tools through the cases, and write CONFORMANCE.md and conformance.json: `make conformance TOOLS="llmtune trl"`.

    python benchmarks/conformance/run.py --tools llmtune trl --cases answers_only

Findings are cached by the code of case, adapter and reference, and by the tool's version. A silently wrong one is
run twice.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from conformance.case import Case, Finding, Job, Result  # noqa: E402
from conformance.environments import VARIABLES, Tool, list_tools  # noqa: E402
from conformance.models import build_model  # noqa: E402
from conformance.page import PAGE, TABLE, collect, render  # noqa: E402
from conformance.reference import Reference  # noqa: E402

COLUMNS = "default", "documented"
SECONDS = 1800
"""Time limit of one process of an adapter, which may do many jobs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="*", help="names in tools.toml; default: all")
    parser.add_argument("--cases", nargs="*", help="names of files in cases/; default: all")
    parser.add_argument("--cache", type=Path, default=Path("build/conformance"))
    parser.add_argument("--fresh", action="store_true", help="run again what is cached")
    parser.add_argument("--no-page", action="store_true", help="print the findings only")
    asked = parser.parse_args()
    cache = asked.cache.resolve()
    tools, cases = list_tools(cache), list_cases()
    for name in asked.tools or tools:
        run_tool(tools[name], {case: cases[case] for case in asked.cases or cases}, cache, fresh=asked.fresh)
    if not asked.no_page:
        table = collect(cases, tools, cache)
        TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(render(table), encoding="utf-8")
    return 0


def list_cases() -> dict[str, Case]:
    """Return all cases by the names of their files."""
    names = sorted(path.stem for path in (HERE / "cases").glob("*.py"))
    return {name: importlib.import_module(f"conformance.cases.{name}").CASE for name in names}


def run_tool(tool: Tool, cases: Mapping[str, Case], cache: Path, fresh: bool) -> None:
    """Bring the stored findings of one tool up to date."""
    try:
        version = tool.read_version()
    except subprocess.CalledProcessError as error:
        why = f"does not install here: {(error.stderr or str(error)).strip()[-300:]}"
        for name in cases:
            store(
                cache,
                tool,
                name,
                {"key": "", "version": "", "columns": {"default": {"verdict": "not run", "learned": why}}},
            )
        return
    keys = {name: make_key(tool, name, case, version) for name, case in cases.items()}
    stale = {name: case for name, case in cases.items() if fresh or read_key(cache, tool, name) != keys[name]}
    found: dict[str, dict[str, Any]] = {name: {} for name in stale}
    for column in COLUMNS:
        first = judge_all(tool, stale, column, cache)
        wrong = {name: stale[name] for name, entry in first.items() if entry["verdict"] == "silently wrong"}
        for name, again in judge_all(tool, wrong, column, cache).items():
            if (again["verdict"], again["learned"]) != (first[name]["verdict"], first[name]["learned"]):
                first[name] = {
                    "verdict": "not run",
                    "learned": f"two runs differ: {first[name]['learned']}; {again['learned']}",
                }
            first[name]["runs"] = 2
        for name, entry in first.items():
            found[name][column] = entry
            print(tool.name, name, column, entry["verdict"], entry["learned"][:200].replace("\n", " "), flush=True)
    for name, columns in found.items():
        store(cache, tool, name, {"key": keys[name], "version": version, "columns": columns})


def judge_all(tool: Tool, cases: Mapping[str, Case], column: str, cache: Path) -> dict[str, dict[str, Any]]:
    """Run all jobs of the cases and judge them; a case whose settings are those of the other column is left out."""
    folder = cache / "runs" / tool.name / column
    shutil.rmtree(folder, ignore_errors=True)
    run_jobs(
        tool, [job for name, case in cases.items() for job in place_jobs(name, case, column, folder, cache)], folder
    )
    found = {}
    for name, case in cases.items():
        results = read_results(case, folder / name)
        if all(result.status == "same" for result in results.values()):
            continue
        finding = judge_case(case, results, cache)
        settings = next(iter(results.values())).configuration
        entry = {name: value for name, value in asdict(finding).items() if value is not None}
        found[name] = json.loads(hide_folders(json.dumps({**entry, "configuration": settings})))
    return found


def place_jobs(name: str, case: Case, column: str, folder: Path, cache: Path) -> list[Job]:
    """Write rows, build models, and return jobs with their folders."""
    jobs = []
    for key, job in case.make_jobs().items():
        out = folder / name / key
        out.mkdir(parents=True)
        rows = {kind: write_rows(out / f"{kind}.{job['file']}", job[kind]) for kind in ("rows", "test_rows")}
        job |= {
            **rows,
            "name": f"{name}.{key}",
            "column": column,
            "out": str(out),
            "model": str(model_folder(job, cache)),
        }
        job["micro_batch_size"] = job["micro_batch_size"] or job["batch_size"]
        if job["resume_from"]:
            job["resume_from"] = str(folder / name / job["resume_from"])
        jobs.append(job)
    return jobs


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str | None:
    if not rows:
        return None
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
            log=hide_folders(log.read_text(errors="replace")) if log.exists() else "",
            model=Path(found["model"]) if "model" in found else None,
            configuration=found.get("configuration", {}),
            documented=found.get("documented", {}),
            job=job,
            found=found,
        )
    return results


def judge_case(case: Case, results: Mapping[str, Result], cache: Path) -> Finding:
    first = next(iter(results.values())).job
    try:
        return case.decide(open_reference(model_folder(first, cache)), results)
    except (KeyError, FileNotFoundError) as error:
        return Finding("stopped", f"the result cannot be read: {error}")


@functools.cache
def open_reference(folder: Path) -> Reference:
    return Reference(folder)


def hide_folders(text: str) -> str:
    """Shorten absolute paths to their last part, as they name this machine; addresses stay."""
    return re.sub(r"(?<![\w:/.])(?:/[\w.+~@-]+)+/", "", text)


def make_key(tool: Tool, name: str, case: Case, version: str) -> str:
    """Hash everything that a finding depends on."""
    shared = [file for file in sorted(HERE.glob("*.py")) if file.stem not in ("run", "page", "environments")]
    files = [HERE / "cases" / f"{name}.py", tool.adapter, *shared]
    stated = json.dumps([version, case.make_jobs(), [read_code(file) for file in files]])
    return hashlib.sha256(stated.encode()).hexdigest()[:16]


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


def stored_path(cache: Path, tool: Tool, name: str) -> Path:
    return cache / "findings" / tool.name / f"{name}.json"


def read_key(cache: Path, tool: Tool, name: str) -> str:
    path = stored_path(cache, tool, name)
    return json.loads(path.read_text())["key"] if path.exists() else ""


def store(cache: Path, tool: Tool, name: str, finding: dict[str, Any]) -> None:
    path = stored_path(cache, tool, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finding, indent=1))


if __name__ == "__main__":
    raise SystemExit(main())
