"""Run tools through the cases, and write CONFORMANCE.md and conformance.json: `make conformance TOOLS="llmtune trl"`.

    python benchmarks/conformance/run.py --tools llmtune trl --cases answers_only

Results are cached by the text of case, adapter and reference, and by the tool's version.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from conformance.case import Case, Finding, Job, Result  # noqa: E402
from conformance.models import build_model  # noqa: E402
from conformance.reference import Reference  # noqa: E402

COLUMNS = "default", "documented"
SECONDS = 900
"""Time limit of one process of an adapter."""


@dataclass(frozen=True)
class Tool:
    """One tool in its own environment."""

    name: str
    title: str
    package: str
    requires: Sequence[str]
    cache: Path

    @property
    def python(self) -> Path:
        """The interpreter of the tool's environment, made at the first use."""
        if not self.requires:
            return Path(sys.executable)
        folder = self.cache / "environments" / self.name
        done = folder / ".done"
        if not done.exists() or done.read_text() != "\n".join(self.requires):
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *self.requires], check=True)
            done.write_text("\n".join(self.requires))
        return folder / "bin" / "python"

    def read_version(self) -> str:
        """Return the installed version; raise CalledProcessError if it does not install here."""
        code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        return subprocess.run(
            [self.python, "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="*", help="names in tools.toml; default: all")
    parser.add_argument("--cases", nargs="*", help="names of files in cases/; default: all")
    parser.add_argument("--cache", type=Path, default=Path("build/conformance"))
    parser.add_argument("--fresh", action="store_true", help="run again what is cached")
    asked = parser.parse_args()
    cache = asked.cache.resolve()
    tools, cases = list_tools(cache), list_cases()
    chosen = {name: cases[name] for name in asked.cases or cases}
    for name in asked.tools or tools:
        run_tool(tools[name], chosen, cache, fresh=asked.fresh)
    return 0


def list_tools(cache: Path) -> dict[str, Tool]:
    table = tomllib.loads((HERE / "tools.toml").read_text(encoding="utf-8"))
    return {name: Tool(name=name, cache=cache, **entry) for name, entry in table.items()}


def list_cases() -> dict[str, Case]:
    """Return all cases by the names of their files."""
    names = sorted(path.stem for path in (HERE / "cases").glob("*.py"))
    return {name: importlib.import_module(f"conformance.cases.{name}").CASE for name in names}


def run_tool(tool: Tool, cases: dict[str, Case], cache: Path, fresh: bool) -> None:
    """Bring the stored findings of one tool up to date."""
    version = tool.read_version()
    stale = {
        name: case
        for name, case in cases.items()
        if fresh or read_stored(cache, tool, name).get("key") != make_key(tool, name, version)
    }
    for column in COLUMNS:
        folder = cache / "runs" / tool.name / column
        jobs = [job for name, case in stale.items() for job in place_jobs(name, case, column, folder, cache)]
        run_jobs(tool, jobs, folder)
    for name, case in stale.items():
        found = {}
        for column in COLUMNS:
            folder = cache / "runs" / tool.name / column / name
            finding, results = judge_case(case, folder, cache)
            if finding is not None:
                found[column] = {**asdict(finding), **describe(results)}
            shutil.rmtree(folder, ignore_errors=True)
        stored = {"key": make_key(tool, name, version), "version": version, "columns": found}
        path = stored_path(cache, tool, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(stored, indent=1))
        for column, entry in found.items():
            far = entry["distance"]
            print(tool.name, name, column, entry["verdict"], entry["learned"][:300], "" if far is None else f"{far:.1e}")


def place_jobs(name: str, case: Case, column: str, folder: Path, cache: Path) -> list[Job]:
    """Write rows, build models, and return jobs with their folders."""
    jobs = []
    for key, job in case.make_jobs().items():
        out = folder / name / key
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        rows = {kind: write_rows(out / f"{kind}.{job['file']}", job[kind]) for kind in ("rows", "test_rows")}
        job |= {**rows, "name": f"{name}.{key}", "column": column, "out": str(out), "model": str(model_folder(job, cache))}
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
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    while jobs:
        listed = folder / "jobs.json"
        listed.write_text(json.dumps(jobs))
        adapter = HERE / "tools" / f"{tool.name}.py"
        with (folder / "process.txt").open("wb") as log:
            try:
                command = [tool.python, "-P", adapter, listed]
                code = subprocess.run(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=SECONDS, cwd=folder
                ).returncode
                why = f"the process ended with exit code {code}"
            except subprocess.TimeoutExpired:
                why = f"no end within {SECONDS} s"
        missing = [job for job in jobs if not (Path(job["out"]) / "result.json").exists()]
        if missing:
            tail = (folder / "process.txt").read_text(errors="replace")[-1500:]
            result = {"status": "error", "message": f"{why}\n{tail}"}
            (Path(missing[0]["out"]) / "result.json").write_text(json.dumps(result))
        jobs = missing[1:]


def judge_case(case: Case, folder: Path, cache: Path) -> tuple[Finding | None, dict[str, Result]]:
    """Judge a finished case; None if the column has the settings of the other one."""
    results: dict[str, Result] = {}
    found: dict[str, dict[str, Any]] = {}
    for key, job in case.make_jobs().items():
        out = folder / key
        found[key] = json.loads((out / "result.json").read_text())
        log = (out / "log.txt").read_text(errors="replace") if (out / "log.txt").exists() else ""
        results[key] = Result(
            status=found[key]["status"],
            message=found[key]["message"],
            log=log,
            model=Path(found[key]["model"]) if "model" in found[key] else None,
            configuration=found[key].get("configuration", {}),
            documented=found[key].get("documented", {}),
            job=job,
            found=found[key],
        )
    if all(entry["status"] == "same" for entry in found.values()):
        return None, results
    first = next(iter(results.values())).job
    try:
        return case.decide(Reference(model_folder(first, cache)), results), results
    except (KeyError, FileNotFoundError) as error:
        return Finding("stopped", f"the result cannot be read: {error}"), results


def describe(results: dict[str, Result]) -> dict[str, Any]:
    """Return the configuration for the page."""
    first = next(iter(results.values()))
    return {"configuration": first.configuration}


def make_key(tool: Tool, name: str, version: str) -> str:
    """Hash everything that a finding depends on."""
    files = [HERE / "cases" / f"{name}.py", HERE / "tools" / f"{tool.name}.py"]
    files += [HERE / file for file in ("case.py", "reference.py", "models.py", "adapter.py")]
    return hashlib.sha256(b"\0".join([version.encode(), *(file.read_bytes() for file in files)])).hexdigest()[:16]


def stored_path(cache: Path, tool: Tool, name: str) -> Path:
    return cache / "findings" / tool.name / f"{name}.json"


def read_stored(cache: Path, tool: Tool, name: str) -> dict[str, Any]:
    path = stored_path(cache, tool, name)
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    raise SystemExit(main())
