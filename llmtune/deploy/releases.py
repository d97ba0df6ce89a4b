"""`llmtune release`: write a finished run as a small file for git; list and compare such files."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from llmtune import __version__
from llmtune.errors import EnvironmentProblem, GateFailed, Problem, RecipeError, describe_end
from llmtune.evaluate.champion import hash_weights
from llmtune.evaluate.class_alignment import classes_of, pair_metrics
from llmtune.evaluate.gates import require_gates
from llmtune.evaluate.opened_runs import check_alike, name_runs, open_run_scores
from llmtune.evaluate.per_row_scores import pack_measures
from llmtune.evaluate.release_records import RELEASE_VERSION, Release, is_release, open_release
from llmtune.recipe.secrets import hide_paths
from llmtune.recipe.user_files import read_bytes
from llmtune.records import Difference, Json
from llmtune.store.atomic_files import explained, hash_file, plain, read_json, write_json
from llmtune.store.release_store import RECORD_FILE, is_stored, read_current, release_address
from llmtune.store.report_record import require_report
from llmtune.store.run_lock import LOCK
from llmtune.store.score_records import GateResult

NAMESPACE = "llmtune-release"
SIGSTORE = "sigstore"
ENDINGS = {"ssh": ".sig", SIGSTORE: ".sigstore.json"}
INSTALL = {"ssh-keygen": "Install OpenSSH 8.1 or later.", SIGSTORE: "pip install sigstore"}


@dataclass(frozen=True)
class Signature:
    """A release's signature."""

    kind: str
    file: str
    by: str
    """The signer if checked; otherwise the key's fingerprint, or how to check it."""
    checked: bool
    """Whether it was checked against the allowed signers."""


def sign(path: Path, how: str) -> Path:
    """Sign a release with the SSH key in the file `how`, or with Sigstore; return the signature file.

    Raises:
        RecipeError: the key does not exist.
        EnvironmentProblem: the signing program is not installed or failed.
    """
    remove_signatures(path)
    if how == SIGSTORE:
        _call_program([SIGSTORE, "sign", "--bundle", str(signature_file(path, SIGSTORE)), str(path)])
        return signature_file(path, SIGSTORE)
    if not Path(how).is_file():
        fix = "Give the file of an SSH key, such as ~/.ssh/id_ed25519, or sigstore."
        raise RecipeError.of(f"SSH key {how} not found", "--sign", fix)
    _call_program(["ssh-keygen", "-Y", "sign", "-f", how, "-n", NAMESPACE, str(path)])
    return signature_file(path, "ssh")


def check_signature(path: Path, signers: Path | None) -> Signature | None:
    """Check the signature of a release, if any; `signers` is an ALLOWED SIGNERS file of ssh-keygen.

    Raises:
        GateFailed: the file differs from the signed one, or with `signers`, none of them signed it.
        EnvironmentProblem: ssh-keygen is not installed.
    """
    signatures = {kind: file for kind in ENDINGS if (file := signature_file(path, kind)).exists()}
    files = [file for file in (signers, signatures.get("ssh")) if file is not None]
    RecipeError.collect(problem for file in files if (problem := _unreadable(file)))
    if signers is not None and "ssh" not in signatures:
        raise GateFailed.of("this file has no SSH signature", str(path), "Sign it: llmtune release RUN --sign KEY")
    if "ssh" in signatures:
        words, content = ["-n", NAMESPACE, "-s", str(signatures["ssh"])], path.read_bytes()
        valid = _run_program(["ssh-keygen", "-Y", "check-novalidate", *words], content)
        if valid.returncode:
            fix = "Restore the file and its signature as they were released."
            raise GateFailed.of("the file changed since it was signed", str(path), fix)
        if signers is None:
            key = valid.stdout.decode().strip().rpartition(" ")[2]
            return Signature("ssh", signatures["ssh"].name, key, checked=False)
        names = _run_program(["ssh-keygen", "-Y", "find-principals", "-f", str(signers), "-s", str(signatures["ssh"])])
        for name in names.stdout.decode().split():
            if not _run_program(
                ["ssh-keygen", "-Y", "verify", "-f", str(signers), "-I", name, *words], content
            ).returncode:
                return Signature("ssh", signatures["ssh"].name, name, checked=True)
        raise GateFailed.of(f"signed by a key that is not in {signers}", str(path), "Add the key, or do not trust it.")
    if SIGSTORE in signatures:
        how = f"check with: sigstore verify identity --bundle {signatures[SIGSTORE]} --cert-identity WHO ... {path}"
        return Signature(SIGSTORE, signatures[SIGSTORE].name, how, checked=False)
    return None


def _unreadable(file: Path) -> Problem | None:
    """Return why ssh-keygen must not read a file: a pipe would block it, and a device would never end."""
    try:
        read_bytes(file)
    except OSError as error:
        return Problem(f"cannot be read: {error.strerror}", str(file), "Name a file that ssh-keygen reads.")
    return None


def signature_file(path: Path, kind: str) -> Path:
    """Return the path of a release's signature."""
    return path.with_name(path.name + ENDINGS[kind])


def remove_signatures(path: Path) -> None:
    """Remove signatures of an earlier version."""
    for kind in ENDINGS:
        signature_file(path, kind).unlink(missing_ok=True)


def _run_program(words: list[str], given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a program; raises EnvironmentProblem if it is not installed."""
    if shutil.which(words[0]) is None:
        raise EnvironmentProblem.of(f"{words[0]} is not installed", "--sign", INSTALL[words[0]])
    return subprocess.run(words, input=given, capture_output=True, check=False)  # noqa: S603


def _call_program(words: list[str]) -> None:
    """Run a program that may ask the user for input; raises EnvironmentProblem with its last line."""
    done = _run_program(words)
    if done.returncode:
        reason = re.sub(r"\s+", " ", done.stderr.decode(errors="replace")).strip()[-300:]
        fix = f"Try it by hand: {' '.join(words)}"
        reason = reason or f"it {describe_end(done.returncode)}"
        raise EnvironmentProblem.of(f"{words[0]} did not sign: {reason}", "--sign", fix)


def require_passed(run: Path) -> None:
    """Raise GateFailed if a gate of a run failed, GateUnsure if one is inconclusive, RecipeError without a report."""
    gates = TypeAdapter(list[GateResult]).validate_python(require_report(run)["gates"])
    require_gates(gates, {})


def make_release(run: Path, out: str | Path, signing: str | None = None) -> Path:
    """Write the release file of a run, and return its path.

    `out` is a file, or a folder that exists or ends in a slash; the file in a folder gets the name of the run folder.
    `signing` is the argument of `sign`. Raises the errors of `sign`, and:
        RecipeError: the run has no scores or no report, or `out` exists and is not a release.
        EnvironmentProblem: its scores are damaged, or the file cannot be written.
    """
    given = Path(out)
    into_folder = given.is_dir() or str(out).endswith("/")
    target = given / f"{run.absolute().name}.json" if into_folder else given
    if target.exists() and not is_release(read_json(target)):
        fix = "Name another file with --out, or delete this one first."
        raise RecipeError.of("the file exists and is not a release", str(target), fix)
    content = make_record(run)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, content)
        remove_signatures(target)
    if signing:
        sign(target, signing)
    return target


def make_record(run: Path) -> Json:
    """Return the record of a run: scores, gates, hashes and row scores, without texts, paths and secrets.

    Raises RecipeError or EnvironmentProblem as `make_release` does.
    """
    opened = open_run_scores(run, run.name)
    report = require_report(run)
    evaluation, measures = opened.evaluation, replace(opened.measures, base={}, simple={})
    content = Release(
        release_version=RELEASE_VERSION,
        llmtune=__version__,
        name=opened.recipe.name,
        date=report["date"],
        run=run.absolute().name,
        lock=hash_file(run / LOCK),
        trained=hash_weights(run),
        recipe=opened.recipe.with_classes(classes_of(opened)).model_dump(mode="json"),
        verdict=report["verdict"],
        base=evaluation.base,
        tuned=evaluation.tuned,
        difference=evaluation.difference,
        signatures=evaluation.signatures,
        gates=report["gates"],
        certificates=opened.folder.certificates(),
        rows=evaluation.rows,
        simple_baselines=evaluation.simple_baselines,
        controls=evaluation.controls,
        pictured=evaluation.pictured,
        control_run=evaluation.control_run,
        teacher=evaluation.teacher,
        measures="",
    )
    packed = base64.b64encode(pack_measures(measures)).decode()  # contains no path or secret
    return {**_without_paths(content), "measures": packed}


def _without_paths(content: Release) -> Json:
    difference = {metric: asdict(change) for metric, change in content["difference"].items()}
    controls = {name: asdict(control) for name, control in content["controls"].items()}
    simple = {name: asdict(one) for name, one in content["simple_baselines"].items()}
    control_run, teacher = (one and asdict(one) for one in (content["control_run"], content["teacher"]))
    values = {**content, "difference": difference, "simple_baselines": simple, "controls": controls}
    values |= {"control_run": control_run, "teacher": teacher}
    return {key: hide_paths(value) for key, value in values.items()}


def diff_releases(first: Path, second: Path) -> tuple[dict[str, Difference], dict[str, str], dict[str, int]]:
    """Return paired differences by metric (second minus first), reasons for metrics without one, and counts of rows.

    If the test rows grew between the releases, those that both have are compared.

    Raises DataError or RecipeError if the releases have no test row in common or were measured in another way.
    """
    names = name_runs([first, second])
    before, after = (open_release(path, name) for path, name in zip((first, second), names, strict=True))
    one, other = {*before.measures.rows}, {*after.measures.rows}
    counts = {"common": len(one & other), "only_first": len(one - other), "only_second": len(other - one)}
    if counts["common"]:
        left = {name.rpartition("-")[0] for name in one ^ other}
        before, after = (replace(run, measures=run.measures.without_rows(left)) for run in (before, after))
    check_alike([before, after])
    difference, left_out = pair_metrics(before, after)
    for metric in dict.fromkeys([*before.evaluation.tuned, *after.evaluation.tuned]):
        having = [one.name for one in (before, after) if metric in one.evaluation.tuned]
        why = "has no scores by row" if len(having) == 2 else f"measured only in {having[0]}"
        left_out |= {} if metric in {*difference, *left_out} else {metric: why}
    return difference, left_out, counts


def summarize_release(path: Path, release: Release) -> Json:
    """Return a release without its scores by row; with its address, and whether it is current, if it is stored."""
    shown = {key: value for key, value in release.items() if key != "measures"}
    changes = {metric: asdict(change) for metric, change in release["difference"].items()}
    folder = path.parent
    address = release_address(folder) if is_stored(folder) and path.name == RECORD_FILE else None
    current = address is not None and read_current(folder.parent.name) == folder.name
    place = {"file": str(path), "address": address, "current": current}
    summary: Json = plain({**place, **shown, "difference": changes})
    return summary
