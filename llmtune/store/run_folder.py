"""The run folder and its manifest: opens it, refuses runs of other recipes, skips steps with unchanged inputs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, cast

from typing_extensions import TypedDict

from llmtune import __version__
from llmtune.errors import Problem, RecipeError
from llmtune.recipe.loader import LoadedRecipe, reload_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import StepTiming
from llmtune.store.atomic_files import (
    exclusive,
    explained,
    hash_listing,
    hash_path,
    list_folder,
    read_json,
    refuse_links_out,
    remove_unfinished,
    write_json,
    write_text,
)
from llmtune.store.json_shapes import STEP_FACTS, Findings, Moment, check_shape, read_record
from llmtune.store.machine import Meter
from llmtune.store.processes import rank
from llmtune.store.release_store import is_stored

MANIFEST = "run.json"
BUDGET = ".micro_batch_tokens"
"""File in which ranks other than 0 leave a reduced budget after running out of memory."""
EXPORT_FOLDERS = ("merged", "gguf", "onnx", "quantized")
OWN_FOLDERS = (
    *("data", "model", "adapter", "weights", "checkpoints", "trackers"),
    *("evaluation", *EXPORT_FOLDERS, "certified", "explain", "seeds", "controls"),
)
REPORTS = ("report.html", "report.md", "report.json", "junit.xml")
OWN_FILES = (
    *("recipe.yaml", "llmtune.lock", "metrics.jsonl", "row_losses.npz", "judge.jsonl", "reproduction.json"),
    *REPORTS,
    *("merged.failed.json", "endpoint.certificate.json"),
)
THUMBNAILS = "data/examples/thumbnails.json"
"""Pictures of training rows for the report page, as data URLs."""
CERTIFICATE = "certificate.json"
"""In the folder of each export."""
AFTER_TRAINING = ("evaluate", "generation", "deploy")
"""Recipe sections that may change after training."""
STEPS = ("prepare", "mine", "answer", "encode", "select", "survey", "teach", "adapt", "train", "evaluate", "deploy")

StepFacts = dict[str, Any]
"""Facts that a step recorded; the keys depend on the step."""


class StepRecord(TypedDict):
    """The manifest's record of one step."""

    state: Literal["running", "done", "failed"]
    inputs: str
    started: Moment
    outputs: dict[str, str]
    """Hash of each output, a file or folder of the run."""
    facts: StepFacts
    seconds: NotRequired[float]
    peak_bytes: NotRequired[int]
    files: NotRequired[dict[str, dict[str, str]]]
    """By output, the hash of each file in it."""


class Manifest(TypedDict):
    """The content of run.json."""

    fingerprint: str
    steps: dict[str, StepRecord]
    findings: StepFacts
    """Values for the next start, such as the micro-batch budget."""
    llmtune: NotRequired[str]
    """The llmtune version that wrote it last."""
    lock: NotRequired[str]
    """Hash of llmtune.lock, once trained."""
    reports: NotRequired[dict[str, str]]
    """Hash of each report file."""
    finished: NotRequired[str]
    """Hash of the inputs of the command that finished it, to recognise a command with nothing left to do."""


@dataclass(frozen=True)
class StepRun:
    """A running step: whether it is skipped, and its facts."""

    skipped: bool
    facts: StepFacts = field(default_factory=dict)


@dataclass
class RunFolder:
    """One run on disk. `manifest` mirrors run.json; every change is written immediately."""

    path: Path
    manifest: Manifest
    ran: set[str] = field(default_factory=set)
    """Steps that this process ran; the other steps were already valid."""

    @property
    def findings(self) -> StepFacts:
        """Return the values for the next start, such as the micro-batch budget."""
        return self.manifest["findings"]

    def note(self, **findings: object) -> None:
        """Store findings in the manifest."""
        self.findings.update(findings)
        self.write()

    def note_budget(self, tokens: int) -> None:
        """Store a reduced micro-batch budget; ranks other than 0 write it to a file for rank 0."""
        self.note(micro_batch_tokens=tokens)
        if rank():
            write_text(self.path / BUDGET, str(tokens))

    def take_budget(self) -> None:
        """Move the budget that another process left into the findings."""
        with suppress(FileNotFoundError, ValueError):
            self.findings["micro_batch_tokens"] = int((self.path / BUDGET).read_text())
            (self.path / BUDGET).unlink()

    def note_reports(self, names: Iterable[str]) -> None:
        """Store the hashes of report files that llmtune has just written."""
        hashes = {name: hash_path(self.path / name) for name in names if (self.path / name).is_file()}
        self.manifest["reports"] = {**self.manifest.get("reports", {}), **hashes}
        self.write()

    def write(self) -> None:
        """Write run.json atomically; only rank 0 writes."""
        if rank():
            return
        with explained(self.path):
            write_json(self.path / MANIFEST, self.manifest)

    def is_done(self, step: str) -> bool:
        """Return whether `step` is done, with any inputs."""
        return step in self.manifest["steps"] and self.manifest["steps"][step]["state"] == "done"

    def is_valid(self, step: str, inputs: str) -> bool:
        """Return whether `step` is done with exactly these inputs and its outputs are unchanged."""
        if not self.is_done(step) or self.manifest["steps"][step]["inputs"] != inputs:
            return False
        outputs = self.manifest["steps"][step]["outputs"]
        return all(hash_path(self.path / name) == output_hash for name, output_hash in outputs.items())

    def is_whole(self, step: str) -> bool:
        """Return whether `step` is done, with any inputs, and its outputs are unchanged."""
        return self.is_done(step) and self.is_valid(step, self.manifest["steps"][step]["inputs"])

    @contextmanager
    def step(
        self,
        name: str,
        inputs: str,
        outputs: Sequence[str] = (),
        *,
        always: bool = False,
        on_begin: Callable[[bool], None] = lambda skipped: None,
    ) -> Iterator[StepRun]:
        """Run one step if its inputs or outputs changed; record its state, time, memory and output hashes.

        Args:
            name: the step.
            inputs: hash of everything the step depends on.
            outputs: files and folders of the run that the step writes.
            always: run it even if nothing changed.
            on_begin: called first, with whether the step is skipped.

        Yields the step. The block must do nothing if it is skipped, else add facts for the manifest to it.
        """
        step = StepRun(skipped=not always and self.is_valid(name, inputs))
        on_begin(step.skipped)
        if step.skipped:
            yield step
            return
        if name in STEPS[1:4]:  # they write the examples of the trained model
            self.refuse_released()
        self.ran.add(name)
        before = self.manifest["steps"].get(name)
        record = StepRecord(state="running", inputs=inputs, started=time.time(), outputs={}, facts=step.facts)
        self.manifest["steps"][name] = record
        self.write()
        meter = Meter()
        try:
            with explained(self.path):
                yield step
        except BaseException:
            record["state"] = "failed"
            if before is not None and self.findings.get("released"):
                self.manifest["steps"][name] = before  # its outputs are those that were released
            if self.path.is_dir():
                self.write()
            raise
        if rank():
            return
        record |= {"state": "done", "seconds": meter.seconds, "peak_bytes": meter.peak_bytes}
        record["files"] = {output: list_folder(self.path / output) for output in outputs}
        record["outputs"] = {
            output: hash_listing(files) if files else hash_path(self.path / output)
            for output, files in record["files"].items()
        }
        self.write()

    def facts(self, step: str) -> StepFacts:
        """Return the facts of a step from the manifest; empty if it was not run.

        Raises EnvironmentProblem if the facts of a finished step are damaged.
        """
        if step not in self.manifest["steps"]:
            return {}
        facts = self.manifest["steps"][step]["facts"]
        if step in STEP_FACTS and self.is_done(step):
            check_shape(facts, STEP_FACTS[step], self.path / MANIFEST, below=f"steps.{step}.facts.")
        return facts

    def certifies(self, certificate: Mapping[str, Any]) -> bool:
        """Return whether a certificate is of the trained weights, not of an earlier training in this folder."""
        trained_hash = certificate.get("trained_sha256")  # missing in other programs' and in older certificates
        return (
            trained_hash is None
            or not self.is_done("train")
            or trained_hash in self.manifest["steps"]["train"]["outputs"].values()
        )

    def certificates(self) -> dict[str, dict[str, Any]]:
        """Return the certificates of the exports in the folder that are of its trained weights, by relative path."""
        patterns = (f"*/{CERTIFICATE}", f"*/*/{CERTIFICATE}", f"*.{CERTIFICATE}")  # the last one is of an endpoint
        files = [file for pattern in patterns for file in sorted(self.path.glob(pattern))]
        contents = {str(file.relative_to(self.path)): read_json(file) for file in files}
        return {name: one for name, one in contents.items() if isinstance(one, dict) and self.certifies(one)}

    def done_facts(self) -> dict[str, StepFacts]:
        """Return the facts of each finished step; raises as `facts` does."""
        return {step: self.facts(step) for step in self.manifest["steps"] if self.is_done(step)}

    def require_trained(self) -> None:
        """Raise RecipeError unless the run has a trained model."""
        if not self.is_done("train"):
            fix = "Run the same recipe again to finish it."
            raise RecipeError.of("this run has no trained model yet", str(self.path), fix)

    def refuse_released(self) -> None:
        """Raise RecipeError if a release was made from this run: nothing is trained in its folder again."""
        if names := self.findings.get("released"):
            what = f"this run is released as {', '.join(names)}: nothing is trained over it"
            raise RecipeError.of(what, str(self.path), "Choose another folder with --out.")

    def begin_training(self) -> None:
        """Discard what depends on an earlier training; raises as `refuse_released` does."""
        self.refuse_released()
        for step in ("evaluate", "deploy"):
            self.manifest["steps"].pop(step, None)
        self.manifest.pop("lock", None)
        self.findings["gates"] = None
        self.take_budget()

    def timings(self) -> list[StepTiming]:
        """Return time and memory of each finished step, in order."""
        records = {name: self.manifest["steps"][name] for name in STEPS if self.is_done(name)}
        return [
            StepTiming(name, record.get("seconds", 0.0), record.get("peak_bytes", 0), name not in self.ran)
            for name, record in records.items()
        ]


@contextmanager
def open_run(path: Path, fingerprint: str, *, resume: bool = False, fresh: bool = False) -> Iterator[RunFolder]:
    """Open or create a run folder for the recipe with this fingerprint, and lock it against other processes.

    Raises:
        RecipeError: the folder has a run of another recipe or other files, or `resume` finds nothing.
        EnvironmentProblem: it cannot be written, another process is using it, or a link leads out of it.
    """
    with explained(path):
        peek_run(path, fingerprint, resume=resume, fresh=fresh)  # refuse before creating anything
        path.mkdir(parents=True, exist_ok=True)
        refuse_links_out(path)
        with exclusive(path / ".lock", path):
            folder = peek_run(path, fingerprint, resume=resume, fresh=fresh)
            remove_unfinished(path)
            remove_unfinished(path / "data")
            if fresh:
                _remove_run(path)
            folder.manifest["llmtune"] = __version__
            folder.write()
            yield folder


def peek_run(path: Path, fingerprint: str, *, resume: bool = False, fresh: bool = False) -> RunFolder:
    """Read a run folder with the checks of `open_run`, without changing anything."""
    if path.exists() and not path.is_dir():
        raise RecipeError.of("the run folder is a file", str(path), "Choose another folder with --out.")
    if is_stored(path):
        fix = "Train and evaluate in the run folder, then release it: llmtune release RUN."
        raise RecipeError.of("this folder is a release, which never changes", str(path), fix)
    manifest = read_manifest(path)
    _refuse_foreign(path, manifest, fingerprint, resume, fresh)
    if fresh or manifest is None or manifest["fingerprint"] != fingerprint:
        manifest = Manifest(fingerprint=fingerprint, steps={}, findings={})
    return RunFolder(path, manifest)


def read_run(path: Path) -> RunFolder:
    """Open a finished or stopped run for reading.

    Raises:
        RecipeError: the folder is missing or not a run.
    """
    manifest = read_manifest(path)
    if manifest is None:
        what = "not a run folder: it has no run.json" if path.is_dir() else "run folder not found"
        raise RecipeError.of(what, str(path), "Name the folder that 'llmtune run' printed (runs/<name>-<hash>).")
    return RunFolder(path, manifest)


def read_manifest(path: Path) -> Manifest | None:
    """Read run.json of a folder; None if it is missing or truncated.

    Raises:
        RecipeError: another program wrote it, or it was edited.
        EnvironmentProblem: it cannot be read.
    """
    file, fix = path / MANIFEST, "Choose another folder with --out, or remove this file."
    content = read_record(file, Manifest, fix=fix, kind=RecipeError)
    if content is not None:
        check_shape(content["findings"], Findings, file, below="findings.", fix=fix, kind=RecipeError)
    return cast(Manifest | None, content)


@contextmanager
def updating_reports(path: Path) -> Iterator[None]:
    """Store the new hashes of a run's report files that the block rewrites; files edited before keep the old hash."""
    manifest = read_manifest(path)
    hashes = manifest.get("reports", {}) if manifest else {}
    same = [name for name, sha256 in hashes.items() if hash_path(path / name) == sha256]
    yield
    if same:
        read_run(path).note_reports(same)


def trained_name(recipe: Recipe) -> str:
    """Return the name of the run's subfolder with the trained adapter or weights."""
    return "weights" if recipe.adapter.method == "full" else "adapter"


def _refuse_foreign(path: Path, manifest: Manifest | None, fingerprint: str, resume: bool, fresh: bool) -> None:
    made = manifest is not None and any(step["state"] == "done" for step in manifest["steps"].values())
    if manifest is not None and (fresh or manifest["fingerprint"] != fingerprint):
        RunFolder(path, manifest).refuse_released()
    if manifest is not None and manifest["fingerprint"] != fingerprint and made and not fresh:
        hashes = f"{manifest['fingerprint'][:8]}, not {fingerprint[:8]}"
        what = f"this folder has a run of another recipe ({hashes})"
        fix = "Choose another folder with --out, or use --fresh to delete the old run and start over."
        raise RecipeError.of(what, str(path), fix)
    if manifest is None and path.is_dir():
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
        strange = sorted(names - {*OWN_FOLDERS, *OWN_FILES})
        if strange:
            what = f"this folder is neither empty nor a run: it has {', '.join(strange[:3])}"
            raise RecipeError.of(what, str(path), "Choose an empty or new folder with --out.")
    if resume and not (manifest and manifest["steps"]):
        raise RecipeError.of("nothing to resume", str(path), "Omit --resume to start.")


def _remove_run(path: Path) -> None:
    for name in OWN_FOLDERS:
        shutil.rmtree(path / name, ignore_errors=True)
    for name in (*OWN_FILES, MANIFEST):
        (path / name).unlink(missing_ok=True)


def recipe_of_run(folder: RunFolder, sets: Sequence[str] = ()) -> LoadedRecipe:
    """Load the resolved recipe of a run; `sets` may change its evaluation but not its training.

    Raises:
        RecipeError: a value in `sets` would make it another run.
    """
    fix = "Set only keys of evaluate, generation and deploy, or run the recipe again."
    RecipeError.collect(
        Problem(f"--set {item}: this would be another run", fix=fix)
        for item in sets
        if item.split("=", 1)[0].split(".", 1)[0] not in AFTER_TRAINING
    )
    loaded = reload_recipe(folder.path / "recipe.yaml", sets, AFTER_TRAINING)
    return replace(loaded, fingerprint=folder.manifest["fingerprint"])
