"""A run made into a folder as the hub has it: model, card, certificate, lock and recipe; kept, or uploaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from rich.console import Console
from rich.markup import escape

from llmtune.deploy.base_models import LICENSES, UPSTREAM, License, find_license
from llmtune.deploy.hub_upload import check_upload, upload
from llmtune.deploy.loading_snippet import Loading, find_auto_class, write_snippet
from llmtune.deploy.model_card import UNKNOWN, Subject, write_card
from llmtune.deploy.path_redaction import hide_places, is_place, recipe_to_share, refuse_places
from llmtune.errors import EnvironmentProblem, GateFailed, Problem, RecipeError
from llmtune.report.redaction import redact
from llmtune.store.atomic_files import explained, hash_file, hash_folder, read_json, staged, write_json, write_text
from llmtune.store.run_folder import RunFolder, read_run, recipe_of_run
from llmtune.store.run_lock import LOCK, read_lock

CARD, CERTIFICATE, GGUF_CERTIFICATE = "README.md", "certificate.json", "gguf-certificate.json"
MODELFILE = "Modelfile"
REMADE = {CARD, CERTIFICATE, "adapter_config.json"}
"""Files of a model's folder that are written anew."""


@dataclass(frozen=True)
class Wishes:
    """What a person asks for and states; nothing of it can be found in a run."""

    to: Path | None = None
    repo: str | None = None
    private: bool = False
    merged: bool = False
    gguf: Path | None = None
    dry_run: bool = False
    despite_gates: bool = False
    offline: bool = False
    base_model: str | None = None
    license: str | None = None
    data_license: str | None = None
    languages: tuple[str, ...] = ()


def publish_run(run: Path, wishes: Wishes, console: Console) -> dict[str, Any]:
    """Publish a finished run; returns where to, the files with their sizes, and the card's metadata.

    Raises:
        RecipeError: options that do not go together, a run without an evaluation, a folder that holds something else.
        GateFailed: a gate of the run failed, or what would be published is not what was evaluated.
        EnvironmentProblem: --offline, no token, or the hub refuses.
    """
    _check_wishes(wishes)
    folder = read_run(run)
    folder.require_trained()
    report = _read_report(run)
    _check_gates(report, wishes.despite_gates)
    product = find_product(folder, report, wishes)
    subject, private = _describe(folder, report, product, wishes, console)
    with _place(wishes) as target:
        _fill(target, folder, product, subject, wishes)
        refuse_places(target, private)
        card = check_card(target / CARD)
        files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
        if wishes.repo and not wishes.dry_run:
            upload(target, wishes.repo, private=wishes.private, card=card, name=subject.name)
    where = f"https://huggingface.co/{wishes.repo}" if wishes.repo else str(wishes.to)
    _show(where, files, wishes, console)
    metadata: dict[str, Any] = cast(Any, card.data).to_dict()
    return {"to": where, "dry_run": wishes.dry_run, "files": files, "card": metadata}


def _check_wishes(wishes: Wishes) -> None:
    problems = []
    if (wishes.to is None) == (wishes.repo is None):
        problems.append(Problem("give one of --to FOLDER and --repo OWNER/NAME", "--to"))
    if wishes.private and wishes.repo is None:
        problems.append(Problem("a folder has no --private", "--private", "Leave it out, or give --repo."))
    for option, name in (("--repo", wishes.repo), ("--base-model", wishes.base_model)):
        if name is not None:
            problems += _check_name(option, name)
    if wishes.license is not None and wishes.license not in LICENSES:
        what = f"{wishes.license!r} is none of the hub's licences"
        problems.append(Problem(what, "--license", "Use the hub's short name, such as apache-2.0, mit or other."))
    if wishes.to is not None and wishes.to.exists() and not _is_ours(wishes.to):
        problems.append(Problem("the folder holds something else", str(wishes.to), "Choose another folder with --to."))
    if wishes.gguf is not None and not wishes.gguf.is_file():
        problems.append(Problem("there is no such file", str(wishes.gguf), "Make one with: llmtune deploy gguf RUN"))
    RecipeError.collect(problems)
    if wishes.repo and not wishes.dry_run:
        check_upload(wishes.offline)


def _check_name(option: str, name: str) -> Iterator[Problem]:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        yield Problem(f"{name!r} is no name on the hub: {error}", option, "Give it as OWNER/NAME.")
        return
    if "/" not in name and option == "--repo":
        yield Problem(f"{name!r} does not say whose it is", option, "Give it as OWNER/NAME.")


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or all((folder / name).is_file() for name in (CARD, CERTIFICATE, LOCK))


def _read_report(run: Path) -> dict[str, Any]:
    report = read_json(run / "report.json")
    if not report or not report.get("evaluation") or read_run(run).manifest["steps"]["evaluate"]["state"] != "done":
        what = "this run was not evaluated: a card without numbers helps nobody"
        raise RecipeError.of(what, str(run), f"Run: llmtune evaluate {run}")
    return dict(report)


def _check_gates(report: Mapping[str, Any], despite: bool) -> None:
    failed = [gate for gate in report["gates"] if not gate["passed"]]
    if not despite:
        fix = "Publish it all the same with --despite-gates: the card then shows them."
        GateFailed.collect(
            Problem(f"gate failed: wanted {gate['wanted']}, got {gate['got']}", gate["name"], fix) for gate in failed
        )


# What is published


@dataclass(frozen=True)
class Product:
    """A model's folder, and the proof that it is what was evaluated."""

    kind: str
    """adapter, weights or merged."""
    folder: Path
    config: dict[str, Any]
    certificate: dict[str, Any]
    gguf: dict[str, Any] | None


def find_product(folder: RunFolder, report: Mapping[str, Any], wishes: Wishes) -> Product:
    """Find what is asked for, and prove it.

    Raises:
        RecipeError: there is no merged model.
        GateFailed: its certificate failed or is of another training; the trained weights are not those evaluated.
    """
    kind = "weights" if report["adapter"]["method"] == "full" else "adapter"
    trained = hash_folder(folder.path / kind)
    evaluated = folder.facts("evaluate").get("trained")
    if trained != evaluated:
        what = f"{kind}/ is not what was evaluated: {str(evaluated)[:12]} then, {trained[:12]} now"
        raise GateFailed.of(what, str(folder.path), f"Evaluate it again: llmtune evaluate {folder.path}")
    merged = _read_merged(folder.path, trained, wishes.merged)
    if wishes.merged:
        assert merged is not None, "a missing one is refused"
        place, certificate, kind = folder.path / "merged", merged, "merged"
    else:
        place = folder.path / kind
        certificate = {"passed": True, "product": kind, "evaluated_sha256": evaluated, "merged": merged}
        certificate["files_sha256"] = {file.name: hash_file(file) for file in sorted(place.glob("*.safetensors"))}
    config = read_json(place / ("adapter_config.json" if kind == "adapter" else "config.json"))
    return Product(kind, place, config, certificate, _read_gguf(wishes.gguf, report, trained))


def _read_merged(run: Path, trained: str, needed: bool) -> dict[str, Any] | None:
    """Return the certificate of the merged model where it is of these weights."""
    again = f"Merge again: llmtune deploy merge {run}"
    certificate = read_json(run / "merged" / CERTIFICATE)
    if certificate is None:
        failed = read_json(run / "merged.failed.json")
        if needed and failed is not None:
            GateFailed.collect(Problem(f"the merge failed: {breach}", "merged", again) for breach in failed["breaches"])
        if needed:
            raise RecipeError.of("there is no merged model", str(run / "merged"), f"Run: llmtune deploy merge {run}")
        return None
    problems = []
    if not certificate.get("passed"):
        problems.append(Problem("its certificate did not pass", str(run / "merged"), again))
    if certificate.get("trained_sha256") != trained:
        problems.append(Problem("it was made of other weights than the run has now", str(run / "merged"), again))
    if needed:
        for name, wanted in (certificate.get("files_sha256") or {}).items():
            if not (run / "merged" / name).is_file() or hash_file(run / "merged" / name) != wanted:
                problems.append(Problem("it changed since it was certified", str(run / "merged" / name), again))
        GateFailed.collect(problems)
    return None if problems else dict(certificate)


def _read_gguf(file: Path | None, report: Mapping[str, Any], trained: str) -> dict[str, Any] | None:
    """Return the certificate beside a GGUF file."""
    if file is None:
        return None
    again = "Make it again: llmtune deploy gguf RUN"
    certificate = read_json(file.parent / CERTIFICATE)
    if certificate is None or not certificate.get("passed"):
        raise GateFailed.of("a GGUF file without a certificate that passed is not published", str(file), again)
    if certificate.get("file_sha256") != hash_file(file):
        raise GateFailed.of("the file changed since it was certified", str(file), again)
    if certificate.get("base_sha256") != report["model"]["sha256"]:
        raise GateFailed.of("the file was made from another base model", str(file), again)
    if certificate.get("trained_sha256") != trained:
        raise GateFailed.of("the file was made from another training", str(file), again)
    return dict(certificate)


# What is said of it


def _describe(
    folder: RunFolder, report: Mapping[str, Any], product: Product, wishes: Wishes, console: Console
) -> tuple[Subject, list[Path]]:
    """Return what the card says, and the places on this machine that nothing published may name."""
    lock = read_lock(folder.path / LOCK)
    recipe = recipe_of_run(folder).recipe
    base, base_name, notes = _name_base(lock, wishes, console)
    known = find_license(lock, base, stated=wishes.license, network=bool(wishes.repo) and not wishes.offline)
    _tell_unknown(known, wishes, console)
    name = redact(wishes.repo or recipe.name).rpartition("/")[2]
    loading = Loading(
        auto_class=find_auto_class(product.config),
        tuned=wishes.repo or name,
        base=(base or base_name) if product.kind == "adapter" else None,
        revision=lock["model"]["revision"] if base == lock["model"]["name"] else None,
        adapter=product.config,
        quantization=_quantization(report, product),
        added_tokens=bool(recipe.model.add_tokens),
        chat=(product.folder / "chat_template.jinja").is_file() and recipe.task != "completion",
        template_kwargs=recipe.model.chat_template_kwargs,
    )
    subject = Subject(
        name=name,
        report=hide_places(report),
        lock=hide_places(lock),
        kind=product.kind,
        auto_class=loading.auto_class,
        base=base,
        base_name=base_name,
        license=known.name,
        license_from=known.source,
        data_license=wishes.data_license or UNKNOWN,
        languages=wishes.languages,
        snippet=write_snippet(loading),
        parity=_tell_parity(product),
        gguf=wishes.gguf.name if wishes.gguf else None,
        notes=tuple(notes),
    )
    places = [folder.path.absolute(), folder.path.resolve(), Path.home(), Path.cwd(), Path(lock["model"]["folder"])]
    files = [file["path"] for file in lock["data"]["files"]]
    return subject, [*places, *(Path(file).parent for file in files if file and is_place(file))]


def _name_base(lock: Mapping[str, Any], wishes: Wishes, console: Console) -> tuple[str | None, str, list[str]]:
    """Return the base's name on the hub, if it has one, how it is called otherwise, and what must be said of it."""
    name = str(lock["model"]["name"])
    if wishes.base_model:
        return wishes.base_model, wishes.base_model, []
    if name.startswith("builtin:"):
        found = UPSTREAM.get(name.removeprefix("builtin:"))
        if found is None:
            return None, name, []
        note = f"It was trained on {name}, which is {found.name} as a package has it ({found.form}): numbers were "
        return found.name, name, [note + "measured on that copy."]
    if is_place(name):
        console.print("The base model is a local folder: say which model it is with --base-model OWNER/NAME.")
        note = "Its base model is known by its hash alone: its publisher has not said which model of the hub it is."
        return None, Path(name).name, [note]
    return name, name, []


def _tell_unknown(known: License, wishes: Wishes, console: Console) -> None:
    if known.name == UNKNOWN:
        console.print("The licence of the base model is not known: state it with --license.")
    if wishes.data_license is None:
        console.print("The licence of the data is not stated (--data-license): the card says so.")


def _quantization(report: Mapping[str, Any], product: Product) -> dict[str, Any] | None:
    if report["adapter"]["method"] != "qlora" or product.kind != "adapter":
        return None
    recipe = report["recipe"]
    dtype = recipe["model"]["dtype"]
    found = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": recipe["adapter"]["bnb_4bit_quant_type"],
        "bnb_4bit_use_double_quant": recipe["adapter"]["bnb_4bit_use_double_quant"],
        "bnb_4bit_compute_dtype": "bfloat16" if dtype == "auto" else dtype,
    }
    heads = product.config.get("modules_to_save")
    return found | ({"llm_int8_skip_modules": heads} if heads else {})


def _tell_parity(product: Product) -> str:
    merged = product.certificate if product.kind == "merged" else product.certificate.get("merged")
    lines = []
    if product.kind != "merged":
        sums = ", ".join(f"`{name}` {found[:16]}…" for name, found in product.certificate["files_sha256"].items())
        lines.append(f"These are, byte for byte, the weights that were evaluated (sha256 {sums}).")
    if merged is not None:
        whose = "This model" if product.kind == "merged" else "Merged into its base"
        onto = f"onto the {merged['onto']} weights, in {merged['dtype']}"
        lines.append(f"{whose} ({onto}) and the adapter on its training base: {tell_numbers(merged['measured'])}.")
    if product.gguf is not None:
        numbers = product.gguf.get("measured")
        said = tell_numbers(numbers) if numbers else "the adapter's products were compared"
        lines.append(f"GGUF ({product.gguf['number_format']}, read by {product.gguf['reader']}): {said}.")
    return "\n\n".join(lines)


def tell_numbers(measured: Mapping[str, Any]) -> str:
    """Say a certificate's numbers in a line."""
    return (
        f"over {measured['positions']} positions mean KL {measured['kl_mean']:.2g} nats, largest logit difference "
        f"{measured['largest_logit_difference']:.2g}, same first choice {measured['top1_agreement']:.1%}, same answers "
        f"{measured['answer_agreement']:.0%}, token ids {'equal' if measured['same_ids'] else 'not equal'}"
    )


# The folder


@contextmanager
def _place(wishes: Wishes) -> Iterator[Path]:
    """Give a folder to fill: the one that is asked for, or one that goes away again."""
    if wishes.to is not None and not wishes.dry_run:
        with explained(wishes.to), staged(wishes.to) as folder:
            yield folder
        return
    with TemporaryDirectory(prefix="llmtune-publish-") as name:
        yield Path(name)


def _fill(target: Path, folder: RunFolder, product: Product, subject: Subject, wishes: Wishes) -> None:
    for path in sorted(product.folder.iterdir()):
        if path.is_file() and path.name not in REMADE:
            shutil.copyfile(path, target / path.name)
    if product.kind == "adapter":
        named: dict[str, Any] = {"base_model_name_or_path": subject.base or subject.base_name}
        named["revision"] = product.config.get("revision") if subject.base == subject.lock["model"]["name"] else None
        text = json.dumps({**product.config, **named}, indent=2, sort_keys=True)
        write_text(target / "adapter_config.json", text + "\n")
    if wishes.gguf is not None:
        shutil.copyfile(wishes.gguf, target / wishes.gguf.name)
        if (wishes.gguf.parent / MODELFILE).is_file():
            shutil.copyfile(wishes.gguf.parent / MODELFILE, target / MODELFILE)
        write_json(target / GGUF_CERTIFICATE, hide_places(product.gguf))
    write_json(target / CERTIFICATE, hide_places(product.certificate))
    write_json(target / LOCK, subject.lock)
    write_text(target / "recipe.yaml", recipe_to_share(folder.path / "recipe.yaml"))
    write_text(target / CARD, redact(str(write_card(subject))))


def check_card(path: Path) -> ModelCard:
    """Read a card as the hub's library does; raises EnvironmentProblem where it cannot."""
    try:
        card: ModelCard = ModelCard.load(path)
    except (ValueError, TypeError, KeyError) as error:
        raise EnvironmentProblem.of(f"the hub's library cannot read this card: {error}", path.name) from error
    assert cast(Any, card.data).to_dict(), "a card has metadata"
    return card


def _show(where: str, files: Mapping[str, int], wishes: Wishes, console: Console) -> None:
    done = "would be published to" if wishes.dry_run else "published to"
    console.print(f"{done} {escape(where)}: {len(files)} files, {sum(files.values()) / 1e6:,.1f} MB", highlight=False)
    if wishes.dry_run:
        for name, size in files.items():
            console.print(f"  {escape(name)} ({size:,} bytes)", highlight=False)
