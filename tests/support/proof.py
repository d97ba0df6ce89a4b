"""The ledger of proof, docs/proof.json: what each test last showed, when, and whether its code has changed since.

    python -m support.proof run --minutes 30 [--only WORD ...]   run what was never run, then the stalest
    python -m support.proof check                                exit 1 on a failure; warn of what is stale or never run
    python -m support.proof merge OTHER                          add the results of another ledger; the later ones count

A line is a result, so two ledgers also merge in git (.gitattributes: union); of two lines on one test the later counts.
With CI set, `run` leaves the ledger alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from support.executed import ROOT, Code, pack, read_children, write_settings
from support.recorder import now

LEDGER = ROOT / "docs" / "proof.json"
JOURNALS = ROOT / "build" / "proof"
STATES = ("proven", "stale", "failed", "never run")
OLD = timedelta(days=14)
BATCH = 240.0
"""Expected seconds of a batch of tests, which share a process."""
STARTUP = 30.0
"""Seconds until the first test of a batch runs."""
UNKNOWN = {"promise": 5.0, "slow": 15.0, "torture": 15.0, "same": 240.0, "conformance": 20.0}
"""Expected seconds of what was never run; of commands on their own, below."""
ALONE = {"hostile": 600.0, "bench-guard": 700.0, "test-fake-cuda": 1200.0, "test-extras": 1200.0}
ALONE |= {"test-oldest": 2400.0, "test-newest": 2400.0}


@dataclass
class Entry:
    """The last result of one test, or of one command."""

    test: str
    kind: str
    outcome: str = "never run"
    """`passed`, `failed`, `skipped` (nothing is known, but for the reason) or `never run`."""
    seconds: float = 0.0
    """Of an outcome `never run`: those after which it was stopped, as the minutes had passed."""
    date: str = ""
    commit: str = ""
    hash: str = ""
    code: str = ""
    """The functions that it executed (`support.executed.pack`); `hash` is that of their code at the time."""

    @property
    def known(self) -> bool:
        return self.outcome in ("passed", "failed")

    @property
    def expected(self) -> float:
        return 1.3 * self.seconds + 0.3 if self.seconds or self.known else UNKNOWN.get(self.kind, 60.0)

    def find_state(self, code: Code) -> str:
        if not self.known:
            return "never run"
        unchanged = self.hash and self.hash == code.hash(self.code)
        return "failed" if self.outcome == "failed" else "proven" if unchanged else "stale"


Ledger = dict[str, Entry]
Counts = dict[str, Any]
"""`date` and `commit` of a run, and by kind the numbers of each state."""


def read_ledger(path: Path = LEDGER) -> tuple[Ledger, Counts]:
    """Read the ledger, and the counts at its last run. After a merge in git there may be several lines on one test."""
    ledger, counts = Ledger(), Counts()
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        line = json.loads(text.removesuffix(",")) if text.startswith("{") else {}
        if "test" in line:
            add(ledger, Entry(**line))
        elif line.get("date", "") > counts.get("date", ""):
            counts = line
    return ledger, counts


def add(ledger: Ledger, entry: Entry) -> None:
    """Add a result; the later one counts, and any counts more than a skipped test."""
    before = ledger.get(entry.test)
    if before is None or (entry.known, entry.date) > (before.known, before.date):
        ledger[entry.test] = entry


def write_ledger(ledger: Ledger, counts: Counts, path: Path = LEDGER) -> None:
    lines = [{key: value for key, value in asdict(ledger[test]).items() if value} for test in sorted(ledger)]
    text = ",\n".join(json.dumps(line, ensure_ascii=False) for line in [*lines, counts])
    new = path.with_suffix(".new")
    new.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    new.replace(path)


def count(ledger: Ledger, code: Code) -> Counts:
    states = Counter((entry.kind, entry.find_state(code)) for entry in ledger.values())
    kinds = sorted({kind for kind, _ in states})
    return {"date": now(), "commit": commit(), "counts": {k: [states[k, state] for state in STATES] for k in kinds}}


def commit() -> str:
    return git("rev-parse", "--short=8", "HEAD")


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()


# What there is to prove.


def list_all() -> Iterator[Entry]:
    """Yield all that there is to prove, as if it had never been run."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import same

    files = sorted(set((ROOT / "tests").rglob("test_*.py")) - set((ROOT / "tests/fake_cuda").glob("*")))
    marked = [str(path) for path in files if re.search(r"mark\.(slow|promise)", path.read_text())]
    yield from collect(marked)  # importing the others would take a minute
    yield from (Entry(f"make same ONLY={name}", "same") for name in [*same.RUNS, *same.STATIC])
    cases = sorted((ROOT / "benchmarks/conformance/cases").glob("*.py"))
    yield from (Entry(f"conformance {path.stem}", "conformance") for path in cases)
    yield from (Entry(f"make {target}", target, seconds=seconds) for target, seconds in ALONE.items())


def collect(files: Iterable[str]) -> list[Entry]:
    """Collect the slow tests and those that hold a promise, in a process that ends."""
    with tempfile.NamedTemporaryFile() as listed:
        if start_python("list", listed.name, *files, stdout=sys.stderr).wait():
            raise SystemExit("a module of the tests could not be collected")
        return [Entry(*pair) for pair in json.loads(listed.read())]


def command_of(entry: Entry, *others: Entry) -> list[str]:
    """Return the command that proves what is not a test of pytest. `make same` compares with the last equal commit."""
    if entry.kind == "conformance":
        options = ["--tools", "llmtune", "--no-page", "--strict", "--fresh", "--cases"]
        cases = [one.test.split()[1] for one in (entry, *others)]
        return [sys.executable, "benchmarks/conformance/run.py", *options, *cases]
    base = entry.commit if git("cat-file", "-t", entry.commit or "none") == "commit" else "HEAD"
    variables = [f"VENV={sys.prefix}", *([f"BASE={base}"] if entry.kind == "same" else [])]
    return [*entry.test.split(), *variables]


def start_python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start the module that runs tests."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return start([sys.executable, "-m", "support.recorder", *arguments], env=environment, **options)


def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a command in a session of its own, which `kill` ends."""
    return subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **options)


# Choosing and running within the minutes.


@dataclass
class Proof:
    """A run: what is to be proven, until when, and what has been tried."""

    ledger: Ledger
    code: Code
    until: float
    path: Path
    journals: Path
    only: list[str] = field(default_factory=list)
    jobs: int = 1
    tried: set[str] = field(default_factory=set)
    running: set[subprocess.Popen[str]] = field(default_factory=set)
    results: list[Entry] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    commit: str = field(default_factory=commit)

    def __post_init__(self) -> None:
        self.slots = threading.Semaphore(self.jobs)

    def choose(self) -> list[Entry]:
        """Return what to run next: a command, or a batch of tests by files; nothing if no time is left."""
        with self.lock:
            left, chosen, used = self.until - time.time(), list[Entry](), 0.0
            for entry in sorted(self.ledger.values(), key=self.order):
                fresh = entry.test not in self.tried and (not self.only or any(w in entry.test for w in self.only))
                joins = not chosen or (group(entry) == group(chosen[0]) and used + entry.expected <= BATCH)
                if fresh and joins and STARTUP + used + entry.expected <= left:
                    chosen.append(entry)
                    used += entry.expected
            self.tried |= {entry.test for entry in chosen}
            return sorted(chosen, key=lambda entry: entry.test.partition("::")[0])

    def order(self, entry: Entry) -> tuple[object, ...]:
        state = entry.find_state(self.code)
        rank = 0 if entry.outcome == "never run" else 2 if state == "proven" else 1
        return rank, entry.date[:10], entry.expected, entry.test

    def work(self) -> None:
        """Run batch after batch, and keep the results of each."""
        while chosen := self.choose():
            wanted = self.jobs if chosen[0].kind == "bench-guard" else 1  # speeds are measured alone
            for _ in range(wanted):
                self.slots.acquire()
            (self.run_tests if group(chosen[0]) == "pytest" else self.run_command)(chosen)
            self.slots.release(wanted)

    def save(self) -> None:
        """Write the ledger, with what other runs have added meanwhile."""
        with self.lock:
            for entry in read_ledger(self.path)[0].values():
                if entry.test in self.ledger:
                    add(self.ledger, entry)
            write_ledger(self.ledger, count(self.ledger, self.code), self.path)

    def run_tests(self, chosen: list[Entry]) -> None:
        journal = self.journals / f"{os.getpid()}-{len(self.tried)}.jsonl"
        plan, log = journal.with_suffix(".plan"), journal.with_suffix(".log")
        tests = {entry.test: entry.expected for entry in chosen}
        about = {"tests": tests, "until": self.until, "parent": os.getpid(), "journal": str(journal)}
        plan.write_text(json.dumps(about))
        with log.open("w") as file:
            code = self.wait(start_python("run", str(plan), stdout=file, stderr=subprocess.STDOUT))
        if code not in (0, 1, None):  # 1: a test failed, and is in the journal
            print(log.read_text()[-4000:], file=sys.stderr)
        plan.unlink()
        self.absorb(journal, "killed" if code is None else f"its process ended with exit code {code}")

    def run_command(self, chosen: list[Entry]) -> None:
        began, log = time.time(), self.journals / f"{chosen[0].test.replace('/', ' ')}.log"
        alone = chosen[0].kind == "bench-guard"  # nothing may slow it down
        with tempfile.TemporaryDirectory() as place, log.open("w") as file:
            traced = {} if alone else {"COVERAGE_PROCESS_START": str(write_settings(Path(place)))}
            environment = {**os.environ, **traced}
            end = self.wait(start(command_of(*chosen), stdout=file, stderr=subprocess.STDOUT, env=environment))
            executed = self.code.list_package() if alone else read_children(Path(place))
        seconds, text = round((time.time() - began) / len(chosen), 1), log.read_text(errors="replace")
        wrong = re.search("^not right: (.*)", text, re.MULTILINE)  # of several, these failed
        for entry in chosen:
            failed = end and (not wrong or entry.test.split()[1] in wrong[1].split())
            outcome = "never run" if end is None else "failed" if failed else "passed"
            made = {"test": entry.test, "outcome": outcome, "seconds": seconds, "date": now(), "code": pack(executed)}
            self.record({**made, "why": text[-4000:]})
        self.save()

    def wait(self, process: subprocess.Popen[str]) -> int | None:
        """Wait for a process; after the last minute kill it, and return None."""
        self.running.add(process)
        try:
            return process.wait(max(0, self.until - time.time()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            kill(process)
            self.running.discard(process)

    def absorb(self, journal: Path, end: str = "") -> None:
        """Keep the results of a journal. A test that ended its process failed; a killed one needs more time."""
        started = None
        for text in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
            line = json.loads(text)
            started = line if line["outcome"] == "started" else None
            if not started:
                self.record(line)
        if started and end == "killed":
            seconds = time.time() - datetime.fromisoformat(f"{started['date']}+00:00").timestamp()
            self.record({**started, "outcome": "never run", "seconds": round(seconds, 1)})
        elif started and end:
            self.record({**started, "outcome": "failed", "why": end})
        self.save()
        journal.unlink(missing_ok=True)

    def record(self, line: dict[str, Any]) -> None:
        with self.lock:
            why, before = line.pop("why", ""), self.ledger.get(line["test"])
            if before is None:  # of another checkout
                return
            failed = line["outcome"] == "failed"
            at = before.commit if failed and before.kind == "same" and before.commit else self.commit
            made = Entry(**line, kind=before.kind, commit=at, hash=self.code.hash(line.get("code", "")))
            if made.known or not before.known:
                self.ledger[made.test] = made
            elif made.outcome == "never run":
                before.seconds = max(made.seconds, before.seconds)
            self.results.append(made)
            if failed:
                print(f"failed: {made.test}\n{why}", file=sys.stderr, flush=True)


def group(entry: Entry) -> str:
    """Return what may run in one process or command with an entry."""
    tests = {"promise": "pytest", "slow": "pytest", "torture": "pytest", "conformance": "conformance"}
    return tests.get(entry.kind, entry.test)


def kill(process: subprocess.Popen[str]) -> None:
    """End a process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


# The commands.


def run(minutes: float, only: list[str], jobs: int) -> int:
    """Prove for some minutes; exit 1 if anything failed."""
    until = time.time() + 60 * minutes
    with tempfile.TemporaryDirectory() as scratch:
        journals, path = (Path(scratch), Path(scratch) / "proof.json") if os.environ.get("CI") else (JOURNALS, LEDGER)
        journals.mkdir(parents=True, exist_ok=True)
        stored, _ = read_ledger()
        ledger = {one.test: replace(stored.get(one.test, one), kind=one.kind) for one in list_all()}
        proof = Proof(ledger, Code(), until, path, journals, only, jobs)
        for journal in journals.glob("*.jsonl"):  # of a run that was killed
            proof.absorb(journal)
        proof.save()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for done in [pool.submit(proof.work) for _ in range(jobs)]:
                    done.result()
            except KeyboardInterrupt:
                proof.until = 0
                for process in [*proof.running]:
                    kill(process)
    outcomes = Counter(entry.outcome for entry in proof.results)
    print(f"{len(proof.results)} results: {dict(outcomes)}", file=sys.stderr)
    show(count(ledger, proof.code))
    return 1 if outcomes["failed"] else 0


def show(counts: Counts) -> None:
    for name, numbers in [*counts["counts"].items(), ("all", map(sum, zip(*counts["counts"].values(), strict=True)))]:
        print(f"{name:<16}", *(f"{number:>6} {state}" for number, state in zip(numbers, STATES, strict=True)))


def check(ledger: Ledger, code: Code) -> int:
    """Exit 1 if a result is a failure; warn of what is old and of what is unknown."""
    states = {test: entry.find_state(code) for test, entry in ledger.items()}
    before = (datetime.now(UTC) - OLD).isoformat()
    old = sum(state == "stale" and ledger[test].date < before for test, state in states.items())
    unknown = sum(state == "never run" for state in states.values())
    if old or unknown:
        print(f"docs/proof.json: {old} results stale for more than {OLD.days} days, {unknown} never run (make proof)")
    failed = [test for test, state in states.items() if state == "failed"]
    for test in failed:
        entry = ledger[test]
        print(f"docs/proof.json: failed at {entry.commit} ({entry.date}): {test}", file=sys.stderr)
    return 1 if failed else 0


def merge(other: Path, into: Path = LEDGER) -> int:
    """Add the results of another ledger."""
    (ledger, counts), (others, _) = read_ledger(into), read_ledger(other)
    for entry in others.values():
        add(ledger, entry)
    write_ledger(ledger, counts, into)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--minutes", type=float, default=30)
    running.add_argument("--only", nargs="*", default=[], help="parts of the names of tests")
    running.add_argument("--jobs", type=int, default=1)
    commands.add_parser("check")
    commands.add_parser("merge").add_argument("other", type=Path)
    given = parser.parse_args()
    if given.command == "run":
        return run(given.minutes, given.only, given.jobs)
    return check(read_ledger()[0], Code()) if given.command == "check" else merge(given.other)


if __name__ == "__main__":
    sys.exit(main())
