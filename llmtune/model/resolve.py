"""Resolve a model reference (a folder, packaged model or hub name) to a checked, hashed folder; find its licence."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, ModelCard, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from rich.console import Console

from llmtune.errors import EnvironmentProblem, LlmtuneError, RecipeError
from llmtune.model.builtin_models import PACKAGED, resolve_builtin
from llmtune.model.model_files import check_model_folder, pickled_weights
from llmtune.recipe.model_section import ModelSection
from llmtune.records import ModelRef
from llmtune.store.atomic_files import list_model

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_PICKLED = ("pytorch_model", "model.ckpt")
NO_ANSWER = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""The HTTP error class of the installed hub library (httpx, or httpx2)."""
UNKNOWN = "unknown"
"""The hub's value for an unstated licence."""
LICENSES = frozenset(files("llmtune.model").joinpath("hub_licenses.txt").read_text("utf-8").split())
"""The hub's short names: https://huggingface.co/docs/hub/repositories-licenses."""


def resolve_model(name: str, model: ModelSection, console: Console, offline: bool = False) -> ModelRef:
    """Find the model `name` (a folder, `builtin:NAME` or a hub name), download it if needed and check its files.

    Only a hub name uses the network, and not with `offline`.

    Raises:
        EnvironmentProblem: not found, not allowed, or incomplete.
        RecipeError: unknown packaged model; own code or pickled weights that the recipe does not allow.
    """
    revision: str | None = None
    if name.startswith("builtin:"):
        path = resolve_builtin(name.removeprefix("builtin:"), console)
    elif Path(name).expanduser().is_dir():
        path = Path(name).expanduser().resolve()
    elif Path(name).expanduser().is_file():
        raise RecipeError.of(
            f"{name} is a file", "model.name", "Name the folder that contains config.json and the weights."
        )
    elif name.startswith(("/", "./", "../", "~")) or not _HUB_NAME.fullmatch(name):
        raise EnvironmentProblem.of(f"folder {name} not found", "model.name", _nearest_folder(name))
    else:
        path = _download(name, model, offline or is_offline_mode())
        revision = path.name
        console.print(f"Model {name} at commit {revision}", highlight=False)
    check_model_folder(path, model)
    total = hashlib.sha256()
    for file, content_hash in list_model(path).items():
        total.update(f"{file}\0{content_hash}\n".encode())
    return ModelRef(name, path, revision, total.hexdigest())


def _nearest_folder(name: str) -> str:
    """Suggest the most similar folder among the siblings of `name`, if any."""
    path = Path(name).expanduser()
    try:
        folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return f"The folder {path.parent} does not exist either. Check the path."
    close = get_close_matches(path.name, folders, n=1, cutoff=0.5)
    return f"Did you mean {path.parent / close[0]}?" if close else "Check the path."


def _download(name: str, model: ModelSection, offline: bool) -> Path:
    """Return the local snapshot of hub model `name` at `model.revision`, a folder named after its commit.

    Missing files are downloaded: no pickled weights and no code unless the recipe allows them, and no copies of the
    weights in other formats.
    """
    patterns = [
        *_PATTERNS,
        *(["*.py"] if model.trust_remote_code else []),
        *([] if model.use_safetensors else ["pytorch_model*.bin"]),
    ]
    try:
        if not offline and model.use_safetensors:
            _refuse_pickles(name, model.revision)
        folder = snapshot_download(
            name,
            revision=model.revision,
            allow_patterns=patterns,
            ignore_patterns=["[!1]*/*", "consolidated*"],  # 1_Pooling/ of sentence-transformers
            local_files_only=offline,
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, LocalEntryNotFoundError, NO_ANSWER) as error:
        raise _explain_no_download(error, name, model.revision, offline) from error
    return Path(folder)


def _refuse_pickles(name: str, revision: str) -> None:
    """Check the list of files before downloading any; without network the hub's local cache has to suffice."""
    try:
        info = HfApi().model_info(name, revision=revision)
    except HfHubHTTPError:
        raise
    except NO_ANSWER:
        return
    files = [entry.rfilename for entry in info.siblings or [] if "/" not in entry.rfilename]
    pickled = [file for file in files if file.startswith(_PICKLED) and not file.endswith(".json")]
    if pickled and not any(file.endswith(".safetensors") for file in files):
        raise pickled_weights(pickled, f"hub model {name}")


def _explain_no_download(error: Exception, name: str, revision: str, offline: bool) -> LlmtuneError:
    """Turn the hub library's error into ours; the order matters, since its errors inherit from one another."""
    where, nearest = "model.name", _nearest_folder(name)
    if isinstance(error, HFValidationError):
        return EnvironmentProblem.of(f"'{name}' is neither a folder nor a hub name", where, nearest)
    if isinstance(error, GatedRepoError):
        fix = f"Request access at https://huggingface.co/{name}, then log in with `hf auth login`."
        return EnvironmentProblem.of(f"the hub model '{name}' is gated, but this machine has no access", where, fix)
    if isinstance(error, RevisionNotFoundError):
        fix = "Use a branch, tag or commit listed on the model's page."
        return RecipeError.of(f"the hub model '{name}' has no revision '{revision}'", "model.revision", fix)
    if isinstance(error, RepositoryNotFoundError):
        fix = f"{nearest} A private model needs `hf auth login`."
        return EnvironmentProblem.of(f"no folder and no public hub model '{name}' found", where, fix)
    if offline or isinstance(error, OfflineModeIsEnabled):
        fix = (
            f"{nearest} Without --offline and HF_HUB_OFFLINE it is downloaded once; a local folder or builtin:NAME "
            "needs no network."
        )
        return EnvironmentProblem.of(f"'{name}' is neither a local folder nor in the hub's local cache", where, fix)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "no"
        return EnvironmentProblem.of(f"the hub answered for '{name}' with status {status}", where, "Try again later.")
    fix = f"{nearest} A local folder or builtin:NAME needs no network; HTTPS_PROXY names a proxy."
    return EnvironmentProblem.of(f"'{name}' is not a local folder, and the hub cannot be reached", where, fix)


def find_license(name: str, folder: Path, base: str | None, *, network: bool) -> str | None:
    """Find the licence of model `name`: from the packaged models, or from its card in `folder` or on the hub."""
    entry = PACKAGED.get(name.removeprefix("builtin:"))
    if entry is not None:
        return entry.license
    license_name: object = None
    if (folder / "README.md").is_file():
        with suppress(ValueError, TypeError, KeyError):
            license_name = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.get("license")
    if license_name not in LICENSES and network and base is not None:
        try:
            card = HfApi().model_info(base).card_data
        except NO_ANSWER:
            return None
        license_name = card.get("license") if card else None
    return str(license_name) if license_name in LICENSES else None
