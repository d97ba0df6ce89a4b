"""Publish a run as a hub folder with model, card, certificate, lock and recipe: keep it locally or upload it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from rich.console import Console
from rich.markup import escape

from llmtune.deploy.model_card import Document, Publication, PublishOptions, write_card
from llmtune.deploy.ollama_modelfile import MODELFILE
from llmtune.deploy.parity import Certificate, read_certificate
from llmtune.deploy.products import EXPORT_FORMATS
from llmtune.errors import EnvironmentProblem, GateFailed, LlmtuneError, Problem, RecipeError
from llmtune.evaluate.decision import copy_rules
from llmtune.evaluate.evaluation_file import load_with_exports
from llmtune.evaluate.gates import to_problem
from llmtune.model.resolve import LICENSES, NO_ANSWER
from llmtune.recipe.secrets import hide_paths, is_local_path, recipe_to_share, redact, refuse_paths
from llmtune.store.atomic_files import explained, hash_folder, hash_path, staged, write_json, write_text
from llmtune.store.process_environment import offline_switches
from llmtune.store.report_record import read_report
from llmtune.store.run_folder import CERTIFICATE, RunFolder, read_run, recipe_of_run
from llmtune.store.run_lock import LOCK, read_lock, read_resolved
from llmtune.store.score_records import Evaluation, GateResult


def check_upload(offline: bool) -> None:
    """Check that an upload can work before doing anything.

    Raises EnvironmentProblem: the network is forbidden, or no token is set.
    """
    forbidden = "--offline" if offline else next(iter(offline_switches()), None)
    if forbidden:
        fix = f"{'Omit' if offline else 'Unset'} it, or make a folder with --to FOLDER."
        raise EnvironmentProblem.of(f"an upload needs the network, which {forbidden} forbids", "--repo", fix)
    if get_token() is None:
        fix = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
        raise EnvironmentProblem.of("no token for the hub found", "--repo", fix)


def upload(folder: Path, repo: str, *, private: bool, card: ModelCard, name: str) -> None:
    """Let the hub check the card, create the repository if needed, and upload all files in one commit.

    Raises EnvironmentProblem if the hub refuses or cannot be reached.
    """
    api = HfApi()
    try:
        card.validate()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{name}, by llmtune")
    except (OfflineModeIsEnabled, NO_ANSWER) as error:
        raise _explain_hub_error(error, repo) from error
    except ValueError as error:
        raise EnvironmentProblem.of(f"the hub refuses the card: {error}", "README.md") from error


def _explain_hub_error(error: Exception, repo: str) -> LlmtuneError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        fix = "Create a token with write access (https://huggingface.co/settings/tokens), then run: hf auth login"
        return EnvironmentProblem.of(f"the token may not write to {repo} (status {status})", "--repo", fix)
    if status is not None:
        return EnvironmentProblem.of(f"the hub answered with status {status}", repo, "Try again later.")
    fix = "Set HTTPS_PROXY for a proxy or HF_ENDPOINT for another hub, or make a folder with --to FOLDER."
    return EnvironmentProblem.of("the hub cannot be reached", repo, fix)


CARD, GGUF_CERTIFICATE = "README.md", "gguf-certificate.json"
REWRITTEN = {CARD, CERTIFICATE, "adapter_config.json"}
"""Files of a model's folder that are not copied but rewritten."""


def publish_run(run: Path, options: PublishOptions, console: Console) -> dict[str, object]:
    """Publish a finished run; return the target, the files with their sizes, and the card's metadata.

    Raises:
        RecipeError: conflicting options, a run without an evaluation, a folder with other contents.
        GateFailed: a gate of the run failed, or the files are not the evaluated ones.
        EnvironmentProblem: --offline is set, no token is found, or the hub refuses.
    """
    _check_options(options)
    folder = read_run(run)
    folder.require_trained()
    report, evaluation = _read_scores(folder)
    if not options.despite_gates:
        _check_gates(report)
    lock, recipe = read_lock(folder.path / LOCK), recipe_of_run(folder).recipe
    model = find_published_model(folder, report, options)
    published = Publication(*model, report, evaluation, lock, recipe, options)
    written = write_card(published, console)
    with _target_folder(options) as target:
        _fill_folder(target, folder.path, published)
        write_text(target / CARD, redact(str(written)))
        refuse_paths(target, _private_paths(folder.path, published.lock))
        card = _read_card(target / CARD)
        sizes = {str(name): (target / name).stat().st_size for name in _files_below(target)}
        if options.repo and not options.dry_run:
            upload(target, options.repo, private=options.private, card=card, name=options.repo.rpartition("/")[2])
    where = f"https://huggingface.co/{options.repo}" if options.repo else str(options.to)
    _print_publication(where, sizes, options, console)
    metadata: dict[str, object] = card.data.to_dict()  # type: ignore[no-untyped-call]
    return {"to": where, "dry_run": options.dry_run, "files": sizes, "card": metadata}


def _check_options(options: PublishOptions) -> None:
    problems = []
    if (options.to is None) == (options.repo is None):
        problems.append(Problem("give one of --to FOLDER and --repo OWNER/NAME", "--to"))
    if options.private and options.repo is None:
        problems.append(Problem("it does not apply to a folder", "--private", "Omit it, or use --repo."))
    for option, name in (("--repo", options.repo), ("--base-model", options.base_model)):
        if name is not None:
            problems += _check_name(option, name)
    if options.license is not None and options.license not in LICENSES:
        what = f"{options.license!r} is not a licence of the hub"
        problems.append(Problem(what, "--license", "Use the hub's short name, such as apache-2.0, mit or other."))
    if options.to is not None and options.to.exists() and not _is_publication(options.to):
        problems.append(Problem("the folder contains something else", str(options.to), "Choose another --to."))
    if options.gguf is not None and not options.gguf.is_file():
        problems.append(Problem("file not found", str(options.gguf), "Make one: llmtune deploy gguf RUN"))
    RecipeError.collect(problems)
    if options.repo and not options.dry_run:
        check_upload(options.offline)


def _check_name(option: str, name: str) -> Iterator[Problem]:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        yield Problem(f"{name!r} is not a valid name on the hub: {error}", option, "Use the form OWNER/NAME.")
        return
    if "/" not in name and option == "--repo":
        yield Problem(f"{name!r} has no owner", option, "Use the form OWNER/NAME.")


def _is_publication(folder: Path) -> bool:
    """Whether a folder is empty or an older publication."""
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or all((folder / name).is_file() for name in (CARD, CERTIFICATE, LOCK))


def _read_scores(folder: RunFolder) -> tuple[Document, Evaluation]:
    """Return a run's report and evaluation; raises RecipeError if it was not evaluated."""
    report = read_report(folder.path)
    evaluation = load_with_exports(folder)
    if not report or not report.get("evaluation") or evaluation is None or not folder.is_done("evaluate"):
        what = "this run was not evaluated, so its card would have no scores"
        raise RecipeError.of(what, str(folder.path), f"Run: llmtune evaluate {folder.path}")
    return report, evaluation


def _check_gates(report: Document) -> None:
    fix = "To publish anyway, add --despite-gates. The card then shows the gates."
    gates = (GateResult(**gate) for gate in report["gates"])
    GateFailed.collect(replace(to_problem(gate), fix=fix) for gate in gates if not gate.passed)


# The model, and the proof that it is the evaluated one


def find_published_model(
    folder: RunFolder, report: Document, options: PublishOptions
) -> tuple[str, Path, Certificate, Certificate | None]:
    """Find and verify the model to publish; return its kind, folder and certificate, and the GGUF file's certificate.

    Raises:
        RecipeError: the merged model is missing.
        GateFailed: its certificate failed or is of another training, or the trained weights were not evaluated.
    """
    kind = "weights" if report["adapter"]["method"] == "full" else "adapter"
    trained = hash_folder(folder.path / kind)
    evaluated = folder.facts("evaluate").get("trained")
    if trained != evaluated:
        what = f"{kind}/ changed since it was evaluated: {str(evaluated)[:12]} then, {trained[:12]} now"
        raise GateFailed.of(what, str(folder.path), f"Evaluate it again: llmtune evaluate {folder.path}")
    gguf = None if options.gguf is None else _read_gguf(options.gguf, report, trained)
    merged = _read_merged(folder.path, trained, required=options.merged)
    if options.merged:
        assert merged is not None, "a missing one is refused"
        return "merged", folder.path / EXPORT_FORMATS["merged"].folder, merged, gguf
    weights = sorted((folder.path / kind).glob("*.safetensors"))
    certificate = {"passed": True, "product": kind, "evaluated_sha256": evaluated, "merged": merged}
    certificate["files_sha256"] = {file.name: hash_path(file) for file in weights}
    return kind, folder.path / kind, certificate, gguf


def _read_merged(run: Path, trained: str, required: bool) -> Certificate | None:
    """Return the merged model's certificate if it is of these weights."""
    merged, again = run / EXPORT_FORMATS["merged"].folder, f"Merge again: llmtune deploy merge {run}"
    folder, certificate = str(merged), read_certificate(merged)
    if certificate is None and required:
        breaches = (read_certificate(run, "merged.failed.json") or {}).get("breaches", ())
        GateFailed.collect(Problem(f"the merge failed: {breach}", "merged", again) for breach in breaches)
        raise RecipeError.of("merged model not found", folder, f"Run: llmtune deploy merge {run}")
    if certificate is None:
        return None
    checks = {
        "its certificate did not pass": certificate.get("passed"),
        "it was made from other weights than the run has now": certificate.get("trained_sha256") == trained,
    }
    if required:
        for name, expected in (certificate.get("files_sha256") or {}).items():
            checks[f"{name} changed since it was certified"] = hash_path(merged / name) == expected
    problems = [Problem(what, folder, again) for what, holds in checks.items() if not holds]
    if required:
        GateFailed.collect(problems)
    return None if problems else certificate


def _read_gguf(file: Path, report: Document, trained: str) -> Certificate:
    """Return a GGUF file's certificate from its folder."""
    certificate: Certificate = read_certificate(file.parent) or {}
    checks = {
        "the file has no certificate that passed": certificate.get("passed"),
        "the file changed since it was certified": certificate.get("file_sha256") == hash_path(file),
        "the file was made from another base model": certificate.get("base_sha256") == report["model"]["sha256"],
        "the file was made from another training": certificate.get("trained_sha256") == trained,
    }
    for what in (what for what, holds in checks.items() if not holds):
        raise GateFailed.of(what, str(file), "Make it again: llmtune deploy gguf RUN")
    return certificate


# The folder


@contextmanager
def _target_folder(options: PublishOptions) -> Iterator[Path]:
    """Yield the folder to fill: the requested one, or a temporary one."""
    if options.to is not None and not options.dry_run:
        with explained(options.to), staged(options.to) as folder:
            yield folder
        return
    with TemporaryDirectory(prefix="llmtune-publish-") as name:
        yield Path(name)


def _private_paths(run: Path, lock: Document) -> list[Path]:
    """Return paths of this machine that published files must not contain."""
    files = [file["path"] for file in lock["data"]["files"]]
    data = [Path(file).parent for file in files if file and is_local_path(file)]
    return [run.absolute(), run.resolve(), Path.home(), Path.cwd(), Path(lock["model"]["folder"]), *data]


def _files_below(folder: Path) -> list[Path]:
    """Return the relative paths of all files; sentence-transformers has some in subfolders."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _fill_folder(target: Path, run: Path, published: Publication) -> None:
    """Write all files except the card."""
    for name in _files_below(published.folder):
        if str(name) not in REWRITTEN:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(published.folder / name, target / name)
    if published.kind == "adapter":
        base, base_name, _ = published.base
        revision = published.config.get("revision") if base == published.lock["model"]["name"] else None
        config = {**published.config, "base_model_name_or_path": base or base_name, "revision": revision}
        write_text(target / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    if (gguf := published.options.gguf) is not None:
        towers = ((published.gguf or {}).get("projector") or {}).get("file")
        for name in (gguf.name, *([towers] if towers else [])):
            shutil.copyfile(gguf.with_name(name), target / name)
        if (gguf.parent / MODELFILE).is_file():
            shutil.copyfile(gguf.parent / MODELFILE, target / MODELFILE)
        write_json(target / GGUF_CERTIFICATE, hide_paths(published.gguf))
    copy_rules(read_run(run), target)
    write_json(target / CERTIFICATE, hide_paths(published.certificate))
    write_json(target / LOCK, hide_paths(published.lock))
    write_text(target / "recipe.yaml", recipe_to_share(read_resolved(run / "recipe.yaml")))


def _read_card(path: Path) -> ModelCard:
    """Read a card with the hub's library; raises EnvironmentProblem if it cannot."""
    try:
        card: ModelCard = ModelCard.load(path)
    except (ValueError, TypeError, KeyError) as error:
        raise EnvironmentProblem.of(f"the hub's library cannot read this card: {error}", path.name) from error
    return card


def _print_publication(where: str, sizes: Mapping[str, int], options: PublishOptions, console: Console) -> None:
    done = "would be published to" if options.dry_run else "published to"
    console.print(f"{done} {escape(where)}: {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB", highlight=False)
    if options.dry_run:
        for name, size in sizes.items():
            console.print(f"  {escape(name)} ({size:,} bytes)", highlight=False)
