"""Kill, stop, starve and damage commands at random moments, and then run the same command again.

After each round the same command resumes undisturbed, and its result is compared byte by byte with that of two
undisturbed runs. `make torture` plays 240 rounds and writes docs/torture.md.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from support.models import build_llama
from support.runs import write_colours, write_recipe
from support.warm import Command, Conditions, Ended, Warm

STEPS = ("prepare", "encode", "select", "adapt", "train", "evaluate", "deploy")
CURE = re.compile(r"->|same command|run .* again", re.IGNORECASE)
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.move")
DEFAULT_ROUNDS = 60
TIMED = ("report.html", "report.md", "report.json", "junit.xml", "run.json")
"""Files that contain times; only their scores are compared."""
TICK = os.sysconf("SC_CLK_TCK")

SCENARIOS: dict[str, list[str]] = {
    "run": ["run", "recipe.yaml", "--out", "round/run"],
    "run full weights": ["run", "full.yaml", "--out", "round/run"],
    "run with a second seed": ["run", "seeds.yaml", "--out", "round/run"],
    "prepare": ["prepare", "recipe.yaml", "--out", "round/run"],
    "train": ["train", "recipe.yaml", "--out", "round/run"],
    "evaluate": ["evaluate", "round/run", "--set", "generation.max_new_tokens=5"],
    "deploy merge": ["deploy", "merge", "round/run"],
    "deploy gguf": ["deploy", "gguf", "round/run"],
    "reproduce": ["reproduce", "round/run"],
}
"""Commands by name; those that take a run folder start from a finished run."""


@dataclass
class Reference:
    """The result of an undisturbed command."""

    cpu_seconds: float
    fresh_seconds: float
    events: int
    """Number of changes to the file system."""
    bytes_written: int
    files: dict[str, str]
    """The hash of each file that is the same in two undisturbed runs."""
    scores: object


@dataclass
class Outcome:
    """The result of one round."""

    fault: str
    scenario: str
    phase: str
    code: int
    fresh: bool
    different: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Tracebacks, unknown exit codes and messages without a fix."""

    @property
    def good(self) -> bool:
        """Whether nothing was lost, different or wrong."""
        return not (self.different or self.lost or self.wrong)


class Torture:
    """A folder with model, rows and recipes, a warm process, and the results of undisturbed commands."""

    def __init__(self, work: Path, seed: int = 0) -> None:
        self.work, self.seed, self.warm = work, seed, Warm()
        self.round = work / "round"
        work.chmod(0o755)
        build_llama(work / "model")
        write_colours(work / "rows.jsonl")
        train = {"save_steps": 2, "num_train_epochs": 2, "save_total_limit": 3}
        deploy = ["merged", "gguf"]
        write_recipe(work / "recipe.yaml", work / "model", work / "rows.jsonl", train=train, deploy=deploy)
        full = {"method": "full", "r": None, "lora_alpha": None}
        best = {**train, "load_best_model_at_end": True, "eval_steps": 2}
        write_recipe(work / "full.yaml", work / "model", work / "rows.jsonl", adapter=full, train=best)
        seeds = {**train, "seeds": [8]}
        write_recipe(work / "seeds.yaml", work / "model", work / "rows.jsonl", train=seeds)
        self.environment = {"HOME": str(work / "home"), "TMPDIR": str(work / "temporary")}
        for name in ("home", "temporary"):
            (work / name).mkdir()
            (work / name).chmod(0o777)
        self._start("run")
        assert self.go(SCENARIOS["run"]).code == 0
        shutil.copytree(self.round / "run", work / "finished")
        self.references: dict[str, Reference] = {}

    def reference(self, scenario: str) -> Reference:
        """Run a command twice without disturbance."""
        if scenario not in self.references:
            files, scores, first = [], [], None
            for fresh in (False, True):
                self._start(scenario)
                before = size(self.round)
                given = self.conditions(fresh=fresh, before=None if fresh else "torture.rounds:count_events")
                ended = self.go(SCENARIOS[scenario], given)
                assert ended.code == 0, ended.said
                first = first or ended
                files.append(hash_files(self.round))
                scores.append(read_scores(self.round / "run"))
            assert scores[0] == scores[1]
            same = {name: digest for name, digest in files[0].items() if files[1].get(name) == digest}
            events = int((self.work / "temporary" / "events").read_text())
            written = max(size(self.round) - before, 10_000)
            self.references[scenario] = Reference(
                first.cpu_seconds, ended.cpu_seconds, events, written, same, scores[0]
            )
        return self.references[scenario]

    def conditions(self, **values: object) -> Conditions:
        """Return the conditions of a command, with its own home folder."""
        environment = {**self.environment, **dict(values.pop("environment", {}))}  # type: ignore[call-overload]
        return Conditions(environment=environment, **values)  # type: ignore[arg-type]

    def start(self, arguments: Sequence[str], given: Conditions | None = None, outputs: str = "said") -> Command:
        """Start a command in the work folder."""
        return self.warm.start(arguments, self.work, self.work / outputs, given or self.conditions())

    def go(self, arguments: Sequence[str], given: Conditions | None = None) -> Ended:
        """Run a command to its end."""
        return self.start(arguments, given).wait()

    def _start(self, scenario: str) -> None:
        """Restore the folder of the round to the command's initial state."""
        shutil.rmtree(self.round, ignore_errors=True)
        self.round.mkdir()
        if SCENARIOS[scenario][-1] == "round/run" and "--out" in SCENARIOS[scenario]:
            return
        shutil.copytree(self.work / "finished", self.round / "run")
        if scenario.startswith("deploy"):
            for name in ("merged", "gguf"):
                shutil.rmtree(self.round / "run" / name)

    def play(self, number: int, fault: str | None = None, scenario: str | None = None, fresh: bool = False) -> Outcome:
        """Play one round; its number and the seed determine everything except the exact moment."""
        chance = random.Random(f"{self.seed} {number}")
        fault = fault or chance.choices(list(FAULTS), [one.share for one in FAULTS.values()])[0]
        chosen = FAULTS[fault]
        fits = [name for name in SCENARIOS if not chosen.scenarios or name in chosen.scenarios]
        scenario = scenario or chance.choice(fits)
        reference = self.reference(scenario)
        with chosen.place(self, scenario, chance, reference):
            ended = chosen.disturb(self, scenario, chance, reference, fresh)
            outcome = Outcome(fault, scenario, find_phase(ended.said, scenario), ended.code, fresh)
            spoiled = chosen.restore(self, chance)
            self._judge(outcome, ended, chosen)
            done, newest = done_steps(self.round / "run"), newest_checkpoint(self.round / "run")
            again = self.go(SCENARIOS[scenario])
            if again.code != 0:
                outcome.wrong.append(f"the same command does not go on: exit {again.code}\n{again.said}")
                return outcome
            if not chosen.damages:
                outcome.lost += find_lost(again.said, done - chosen.redone, newest, scenario)
            self._compare(outcome, reference, spoiled)
            return outcome

    def _judge(self, outcome: Outcome, ended: Ended, fault: Fault) -> None:
        if ended.late:
            outcome.wrong.append(f"it did not end:\n{ended.said}")
        if ended.crashed:
            outcome.wrong.append(f"a traceback, exit {ended.code}:\n{ended.said}")
        elif ended.code not in {0, *fault.codes}:
            outcome.wrong.append(f"exit {ended.code}:\n{ended.said}")
        elif ended.code > 0 and not CURE.search(ended.said):
            outcome.wrong.append(f"the message names no cure:\n{ended.said}")

    def _compare(self, outcome: Outcome, reference: Reference, spoiled: Path | None) -> None:
        """Compare all files; a spoiled checkpoint that is no longer needed may stay spoiled."""
        now = hash_files(self.round)
        unneeded = str(spoiled.relative_to(self.round)) if spoiled and "checkpoints" in spoiled.parts else ""
        different = [name for name, digest in reference.files.items() if now.get(name) != digest]
        outcome.different += [name for name in different if name != unneeded]
        if read_scores(self.round / "run") != reference.scores:
            outcome.different.append("scores and losses")

    def close(self) -> None:
        """End the warm process."""
        self.warm.close()


def hash_files(folder: Path) -> dict[str, str]:
    """Return the hash of each file below a folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hash_content(path) for path in found if path.name not in TIMED}


def hash_content(path: Path) -> str:
    """Hash a file; of an optimiser's file only the values, since equal values can be pickled differently."""
    if path.suffix == ".pt" and path.parent.parent.name == "checkpoints":
        with suppress(Exception):  # a spoiled file
            held = torch.load(path, weights_only=True)
            tensors = [one.numpy().tobytes() for state in held["optimizer"]["state"].values() for one in state.values()]
            return hashlib.sha256(b"".join(tensors) + str(held["schedule"]).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def size(folder: Path) -> int:
    """Return the size of all files below a folder, rounded up to pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def read_scores(run: Path) -> object:
    """Return the scores of all seeds and the losses of each step, from files that also contain times."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("report.json")):
        report = json.loads(path.read_text())
        found[str(path)] = [report.get("evaluation"), report.get("gates")]
    for path in sorted(run.rglob("metrics.jsonl")):
        lines = map(json.loads, path.read_text().splitlines())
        found[str(path)] = [
            [line.get(key) for key in ("step", "loss", "validation_loss", "grad_norm")] for line in lines
        ]
    return found


def find_phase(said: str, scenario: str) -> str:
    """Return the step that was running when the command ended."""
    if scenario.startswith(("deploy", "reproduce")):
        return scenario
    found = re.findall(rf"^({'|'.join(STEPS)})$", said, re.MULTILINE)
    return str(found[-1]) if found else "start"


def done_steps(run: Path) -> set[str]:
    """Return the steps that are done according to the manifest."""
    try:
        steps = json.loads((run / "run.json").read_text())["steps"]
    except (OSError, ValueError):
        return set()
    return {name for name, step in steps.items() if step["state"] == "done"} - {"adapt"}


def newest_checkpoint(run: Path) -> int:
    """Return the step of the newest checkpoint, or 0."""
    return max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")), default=0)


def find_lost(said: str, done: set[str], newest: int, scenario: str) -> list[str]:
    """Return the work that was finished before the disturbance and done again."""
    if scenario.startswith(("deploy", "reproduce", "evaluate")):
        return []
    first = re.split(r"^seed \d+ ─", said, maxsplit=1, flags=re.MULTILINE)[0]
    lost = [step for step in done if re.search(rf"^{step}$", first, re.MULTILINE)]
    resumed = re.search(r"Resuming from step (\d+)", first)
    trains = re.search(r"^train$", first, re.MULTILINE)
    if trains and newest and (resumed is None or int(resumed[1]) < newest):
        lost.append(f"checkpoint of step {newest}")
    return lost


# Faults inside a child, before the command starts.


def count_events(kill_at: int = 0) -> None:
    """Count changes to the file system and write the number to a file; kill the process at change `kill_at`."""
    path = Path(os.environ["TMPDIR"], "events")
    count = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opens or event in WRITES) and arguments[0] != str(path):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if not kill_at:
        import atexit

        atexit.register(lambda: path.write_text(str(count)))


def die_at_event() -> None:
    """Kill the process just before a change to the file system."""
    count_events(int(os.environ["TORTURE_EVENT"]))


def obey_permissions() -> None:
    """Drop root's privilege to ignore file permissions."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)  # version 3 of capset(2), this process
    held = ctypes.create_string_buffer(24)
    libc.capget(header, held)
    words = list(struct.unpack("6I", held.raw))
    for place in (0, 1):
        words[place] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, struct.pack("6I", *words)):
        raise OSError(ctypes.get_errno(), "capset")


def jump_clock() -> None:
    """Make the clock jump by years, forwards or backwards, each time it is read."""
    years = 365 * 86400
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + random.uniform(-20, 20) * years  # type: ignore[assignment]
    time.time_ns = lambda: real_ns() + int(random.uniform(-20, 20) * years) * 10**9  # type: ignore[assignment]


# Faults from outside.


def wait_for(command: Command, cpu_seconds: float) -> None:
    """Wait until a command has used `cpu_seconds`, or has ended."""
    path = Path(f"/proc/{command.pid}/stat")
    while command.running:
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            return
        if (int(fields[11]) + int(fields[12])) / TICK >= cpu_seconds:
            return
        time.sleep(0.002)


def moment(chance: random.Random, reference: Reference, fresh: bool) -> float:
    """Return a random moment of a command, in CPU seconds."""
    return chance.uniform(0, reference.fresh_seconds if fresh else reference.cpu_seconds)


def send(*numbers: int) -> Disturb:
    """Send signals one after the other, at a random moment."""

    def disturb(torture: Torture, scenario: str, chance: random.Random, reference: Reference, fresh: bool) -> Ended:
        command = torture.start(SCENARIOS[scenario], torture.conditions(fresh=fresh))
        wait_for(command, moment(chance, reference, fresh))
        for number in numbers:
            command.send(number)
            time.sleep(chance.uniform(0, 0.4))
        return command.wait()

    return disturb


def under(draw: Callable[[random.Random, Reference], dict[str, object]]) -> Disturb:
    """Run a command under random conditions."""

    def disturb(torture: Torture, scenario: str, chance: random.Random, reference: Reference, fresh: bool) -> Ended:
        return torture.go(SCENARIOS[scenario], torture.conditions(fresh=fresh, **draw(chance, reference)))

    return disturb


def forbid(torture: Torture, scenario: str, chance: random.Random, reference: Reference, fresh: bool) -> Ended:
    """Remove write permission from the folders of a run, at a random moment."""
    command = torture.start(SCENARIOS[scenario], torture.conditions(before="torture.rounds:obey_permissions"))
    wait_for(command, moment(chance, reference, fresh))
    set_modes(torture, 0o555)
    return command.wait()


def allow(torture: Torture, chance: random.Random) -> Path | None:
    """Restore write permission."""
    set_modes(torture, 0o755)
    return None


def set_modes(torture: Torture, mode: int) -> None:
    """Set the permissions of all folders of a round."""
    for path in [torture.round, *torture.round.rglob("*")]:
        with suppress(FileNotFoundError):  # it may just have been renamed
            if path.is_dir():
                path.chmod(mode)


def spoil(folders: Sequence[str]) -> Callable[[Torture, random.Random], Path | None]:
    """Truncate a file or flip one of its bits, in the newest checkpoint or the output of steps."""

    def restore(torture: Torture, chance: random.Random) -> Path | None:
        run = torture.round / "run"
        newest = run / "checkpoints" / f"step-{newest_checkpoint(run)}"
        wanted = [newest if name == "checkpoints" else run / name for name in folders]
        files = sorted(
            path for folder in wanted for path in folder.rglob("*") if path.is_file() and path.stat().st_size
        )
        if not files:
            return None
        path = chance.choice(files)
        content = bytearray(path.read_bytes())
        if chance.random() < 0.5:
            content = content[: chance.randrange(len(content))]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        return path

    return restore


def meet(torture: Torture, scenario: str, chance: random.Random, reference: Reference, fresh: bool) -> Ended:
    """Start the same command again while it is running; the second one must name the first."""
    first = torture.start(SCENARIOS[scenario], torture.conditions(fresh=fresh))
    wait_for(first, moment(chance, reference, fresh))
    second = torture.start(SCENARIOS[scenario], outputs="second").wait()
    ended = first.wait()
    named = f"process {first.pid}" in second.said and "Wait for it" in second.said
    if second.code not in {0, 4} or (second.code == 4 and not named) or second.crashed:
        return Ended(**{**vars(ended), "code": 1, "said": second.said})
    if ended.code == 4 and f"process {second.pid}" in ended.said:
        return second
    return ended


def jump(torture: Torture, scenario: str, chance: random.Random, reference: Reference, fresh: bool) -> Ended:
    """Kill a command whose clock jumps, and give its files random times."""
    command = torture.start(SCENARIOS[scenario], torture.conditions(before="torture.rounds:jump_clock"))
    wait_for(command, moment(chance, reference, fresh))
    command.send(signal.SIGKILL)
    ended = command.wait()
    for path in torture.round.rglob("*"):
        when = chance.uniform(0, 4e9)
        os.utime(path, (when, when))
    return ended


Disturb = Callable[[Torture, str, random.Random, Reference, bool], Ended]


@contextmanager
def plain_place(torture: Torture, scenario: str, chance: random.Random, reference: Reference) -> Iterator[None]:
    """Put the folder of a round on the normal disk."""
    torture._start(scenario)
    yield


@contextmanager
def small_disk(torture: Torture, scenario: str, chance: random.Random, reference: Reference) -> Iterator[None]:
    """Put the folder of a round on a separate disk with room for only part of the command's output."""
    torture._start(scenario)
    kept = torture.round.rename(torture.work / "kept")
    torture.round.mkdir()
    room = size(kept) + int(chance.uniform(0, 1) * reference.bytes_written)
    options = f"size={-(-room // 4096) * 4096},mode=755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "torture", str(torture.round)], check=True)
    try:
        shutil.copytree(kept, torture.round, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(torture.round)], check=True)
        shutil.rmtree(kept)


def enlarge(torture: Torture, chance: random.Random) -> Path | None:
    """Enlarge the small disk."""
    subprocess.run(["mount", "-o", "remount,size=1g", str(torture.round)], check=True)
    return None


def leave(torture: Torture, chance: random.Random) -> Path | None:
    """Restore nothing; a spoiled path would be returned."""
    return None


@dataclass(frozen=True)
class Fault:
    """One kind of disturbance."""

    share: int
    """Relative frequency."""
    disturb: Disturb
    codes: tuple[int, ...]
    """Allowed exit codes of a disturbed command, besides 0."""
    restore: Callable[[Torture, random.Random], Path | None] = leave
    place: Callable[..., object] = plain_place
    scenarios: tuple[str, ...] = ()
    damages: bool = False
    """Whether it damages finished work, which must then be done again."""
    redone: frozenset[str] = frozenset()
    """Steps that depend on the disturbance and may be done again without it."""


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
TRAINING = ("run", "run full weights", "train", "run with a second seed")
OUTPUTS = ("data", "adapter", "evaluation", "merged", "gguf")
FAULTS = {
    "SIGKILL at a moment": Fault(24, send(KILL), (-KILL,)),
    "SIGKILL at a write": Fault(
        20,
        under(
            lambda chance, reference: {
                "before": "torture.rounds:die_at_event",
                "environment": {"TORTURE_EVENT": str(chance.randint(1, reference.events))},
            }
        ),
        (-KILL,),
    ),
    "SIGTERM": Fault(8, send(TERM), (143, -TERM)),
    "SIGINT": Fault(7, send(INT), (130, -INT)),
    "SIGINT twice": Fault(7, send(INT, INT), (130, -INT)),
    "SIGSTOP, SIGCONT": Fault(4, send(signal.SIGSTOP, signal.SIGCONT), ()),
    "SIGSTOP, SIGKILL": Fault(2, send(signal.SIGSTOP, KILL), (-KILL,)),
    "disk full": Fault(10, under(lambda chance, reference: {}), (4,), enlarge, small_disk),
    "limit on the size of files": Fault(
        4,
        under(lambda chance, reference: {"limits": {"RLIMIT_FSIZE": int(2 ** chance.uniform(14, 20))}}),
        (4,),
    ),
    "permission taken": Fault(6, forbid, (4,), allow),
    "few file handles": Fault(
        6, under(lambda chance, reference: {"limits": {"RLIMIT_NOFILE": chance.randint(5, 20)}}), (4,)
    ),
    "little memory": Fault(
        6,
        under(lambda chance, reference: {"limits": {"RLIMIT_AS": chance.randint(1, 150) * 2**20}}),
        (4, 5),
        redone=frozenset({"select"}),  # its plan depends on the available memory
    ),
    "checkpoint damaged": Fault(8, send(KILL), (-KILL,), spoil(["checkpoints"]), scenarios=TRAINING, damages=True),
    "output damaged": Fault(5, send(KILL), (-KILL,), spoil(OUTPUTS), scenarios=(*TRAINING, "prepare"), damages=True),
    "two commands": Fault(5, meet, ()),
    "clock jumps": Fault(5, jump, (-KILL,)),
}
ROOT_ONLY = ("disk full", "permission taken")
FRESH = ("SIGKILL at a moment", "SIGTERM", "SIGINT", "SIGINT twice", "few file handles", "limit on the size of files")


def plan(rounds: int, seed: int = 0) -> list[tuple[str, bool]]:
    """Return the faults of `rounds` rounds, each by its share and at least once, a tenth of them in fresh processes."""
    names = [name for name in FAULTS if os.geteuid() == 0 or name not in ROOT_ONLY]
    total = sum(FAULTS[name].share for name in names)
    chosen = [name for name in names for _ in range(max(1, round(FAULTS[name].share * rounds / total)))]
    chance = random.Random(seed)
    chance.shuffle(chosen)
    fresh = [number for number, name in enumerate(chosen) if name in FRESH][: max(1, rounds // 10)]
    return [(name, number in fresh) for number, name in enumerate(chosen)]


PAGE = """# Torture

The result of the last `make torture`; `make test-slow` plays {default} rounds. A round starts a command, disturbs it at
a random moment, and repeats the same command. The test then compares the result, file by file, with two undisturbed
runs: rows, examples, checkpoints, adapter or weights, answers, the merged model, the GGUF file, all scores and losses.
Signals, disks, limits and permissions are real.

- **lost**: a finished step or checkpoint had to be done again
- **wrong**: a traceback, an exit code that llmtune does not define, or a message without a fix

{rounds} rounds, {fresh} of them in a fresh `python -m llmtune`: {different} with different bytes, {lost} with
something lost, {wrong} wrong.

| disturbance | rounds | exit codes | bytes different | lost | wrong |
|---|---:|---|---:|---:|---:|
{faults}

The disturbed step or command:

| step or command | rounds | killed by SIGKILL |
|---|---:|---:|
{phases}

Codes below zero are signals. 0: the command had already finished, or coped.
"""


def describe(outcomes: Sequence[Outcome]) -> str:
    """Return the page with the results of many rounds."""

    def count(chosen: Sequence[Outcome]) -> list[int]:
        return [sum(bool(getattr(one, kind)) for one in chosen) for kind in ("different", "lost", "wrong")]

    faults = []
    for fault in FAULTS:
        chosen = [one for one in outcomes if one.fault == fault]
        codes = Counter(one.code for one in chosen)
        ends = ", ".join(f"{code} ({number})" for code, number in sorted(codes.items()))
        faults.append(f"| {fault} | {len(chosen)} | {ends} | {' | '.join(map(str, count(chosen)))} |")
    phases = Counter(one.phase for one in outcomes)
    killed = Counter(one.phase for one in outcomes if one.code == -KILL)
    different, lost, wrong = count(outcomes)
    return PAGE.format(
        default=DEFAULT_ROUNDS,
        rounds=len(outcomes),
        fresh=sum(one.fresh for one in outcomes),
        different=different,
        lost=lost,
        wrong=wrong,
        faults="\n".join(faults),
        phases="\n".join(f"| {phase} | {phases[phase]} | {killed[phase]} |" for phase in sorted(phases)),
    )


def main() -> None:
    """Play rounds, append their outcomes to a file, and print the page of all outcomes in it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outcomes", type=Path, default=Path("build/torture.jsonl"))
    parser.add_argument("--only", type=int, nargs="*", help="numbers of rounds to play again")
    asked = parser.parse_args()
    asked.outcomes.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, asked.outcomes.open("a") as kept:
        torture = Torture(Path(folder), asked.seed)
        for number, (fault, fresh) in enumerate(plan(asked.rounds, asked.seed)):
            if asked.only and number not in asked.only:
                continue
            outcome = torture.play(number, fault, fresh=fresh)
            kept.write(json.dumps(vars(outcome)) + "\n")
            kept.flush()
            sign = "" if outcome.good else f"\n{outcome}"
            print(f"{number} {fault} | {outcome.scenario} | {outcome.phase} {outcome.code}{sign}", file=sys.stderr)
        torture.close()
    print(describe([Outcome(**json.loads(line)) for line in asked.outcomes.read_text().splitlines()]))


if __name__ == "__main__":
    main()
