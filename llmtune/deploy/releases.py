"""`llmtune release`: a finished run as a small file for git, and such files listed and compared."""

from __future__ import annotations

import base64
from dataclasses import asdict, replace
from pathlib import Path

from llmtune import __version__
from llmtune.deploy.endpoint_parity import ENDPOINT_CERTIFICATE
from llmtune.deploy.parity import CERTIFICATE
from llmtune.deploy.path_redaction import hide_paths
from llmtune.deploy.signatures import remove_signatures, sign
from llmtune.errors import RecipeError
from llmtune.evaluate.looks import hash_weights
from llmtune.evaluate.opened_runs import check_alike, name_runs, open_run_scores, pair_metrics
from llmtune.evaluate.per_row_scores import pack_measures
from llmtune.evaluate.release_file import VERSION, Release, open_release
from llmtune.records import Difference, Json
from llmtune.store.atomic_files import explained, hash_file, plain, read_json, write_json
from llmtune.store.run_lock import LOCK

FOLDER = Path("releases")


def make_release(run: Path, out: Path | None, signing: str | None = None) -> Path:
    """Write the release file of a run, by default `releases/<name of the run folder>.json`, and return its path.

    `signing` is as `sign` takes it. Raises as it does, and:
        RecipeError: the run has no scores or no report.
        EnvironmentProblem: its scores are damaged, or the file cannot be written.
    """
    opened = open_run_scores(run, run.name)
    report: Json | None = read_json(run / "report.json")
    if report is None:
        raise RecipeError.of("this run has no report", str(run), f"Score it again: llmtune evaluate {run}")
    evaluation, measures = opened.evaluation, replace(opened.measures, base={})
    content = Release(
        release_version=VERSION,
        llmtune=__version__,
        name=opened.recipe.name,
        date=report["date"],
        run=run.absolute().name,
        lock=hash_file(run / LOCK),
        trained=hash_weights(run),
        recipe=opened.recipe.model_dump(mode="json"),
        verdict=report["verdict"],
        base=evaluation.base,
        tuned=evaluation.tuned,
        difference=evaluation.difference,
        signatures=evaluation.signatures,
        gates=report["gates"],
        certificates=find_certificates(run),
        rows=evaluation.rows,
        measures="",
    )
    target = out or FOLDER / f"{content['run']}.json"
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        packed = base64.b64encode(pack_measures(measures)).decode()  # nothing in it is a path or a secret
        write_json(target, {**_without_paths(content), "measures": packed})
        remove_signatures(target)
    if signing:
        sign(target, signing)
    return target


def _without_paths(content: Release) -> Json:
    difference = {metric: asdict(change) for metric, change in content["difference"].items()}
    return {key: hide_paths(value) for key, value in {**content, "difference": difference}.items()}


def find_certificates(run: Path) -> dict[str, Json]:
    """Return the certificates of what was made of a run, by where they stand in its folder."""
    files = [*run.glob(f"*/{CERTIFICATE}"), *run.glob(f"*/*/{CERTIFICATE}"), run / ENDPOINT_CERTIFICATE]
    found = {str(file.relative_to(run)): read_json(file) for file in files}
    return {name: content for name, content in found.items() if isinstance(content, dict)}


def diff_releases(first: Path, second: Path) -> tuple[dict[str, Difference], dict[str, str]]:
    """Return paired differences by metric, second minus first, and why others could not be compared.

    Raises DataError or RecipeError where they were not measured on the same rows in the same way.
    """
    names = name_runs([first, second])
    before, after = (open_release(path, name) for path, name in zip((first, second), names, strict=True))
    check_alike([before, after])
    difference, left_out = pair_metrics(before, after)
    for metric in dict.fromkeys([*before.evaluation.tuned, *after.evaluation.tuned]):
        having = [one.name for one in (before, after) if metric in one.evaluation.tuned]
        why = "has no scores by row" if len(having) == 2 else f"measured in {having[0]} alone"
        left_out |= {} if metric in {*difference, *left_out} else {metric: why}
    return difference, left_out


def summarize_release(path: Path, release: Release) -> Json:
    """Return a release without its scores by row."""
    shown = {key: value for key, value in release.items() if key != "measures"}
    changes = {metric: asdict(change) for metric, change in release["difference"].items()}
    summary: Json = plain({"file": str(path), **shown, "difference": changes})
    return summary
