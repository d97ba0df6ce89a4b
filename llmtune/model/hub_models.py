"""A model from the hub: the commit is pinned, pickled weights and code are left there unless asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
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
from llmtune.model.model_files import pickled_weights

if TYPE_CHECKING:
    from llmtune.recipe import ModelSection

_NO_ANSWER = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""The error of the HTTP library that this version of the hub library stands on (httpx, or httpx2)."""
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_PICKLED = ("pytorch_model", "model.ckpt")


def download_model(
    name: str, model: ModelSection, console: Console, offline: bool, suggestion: str
) -> tuple[Path, str]:
    """Return the local snapshot of hub model `name` at `model.revision`, and its commit; downloads what is missing.

    With HF_HUB_OFFLINE set it is as with `offline`: what the hub's local cache holds is taken.

    Raises EnvironmentProblem: not found, gated, no network; RecipeError: no such revision, pickled weights alone.
    """
    offline = offline or is_offline_mode()
    try:
        if not offline:
            _refuse_pickles(name, model)
        folder = snapshot_download(
            name,
            revision=model.revision,
            allow_patterns=_choose_patterns(model),
            ignore_patterns=["*/*", "consolidated*"],  # copies of the weights in other formats
            local_files_only=offline,
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, LocalEntryNotFoundError, _NO_ANSWER) as error:
        raise _explain(error, name, model.revision, offline, suggestion) from error
    path = Path(folder)
    console.print(f"Model {name} at commit {path.name}", highlight=False)
    return path, path.name


def _refuse_pickles(name: str, model: ModelSection) -> None:
    """Look at the list of files before any is fetched; without network the hub's local cache is what there is."""
    try:
        info = HfApi().model_info(name, revision=model.revision)
    except HfHubHTTPError:
        raise
    except _NO_ANSWER:
        return
    files = [entry.rfilename for entry in info.siblings or [] if "/" not in entry.rfilename]
    pickled = [file for file in files if file.startswith(_PICKLED) and not file.endswith(".json")]
    if model.use_safetensors and pickled and not any(file.endswith(".safetensors") for file in files):
        raise pickled_weights(pickled, f"hub model {name}")


def _choose_patterns(model: ModelSection) -> list[str]:
    patterns = list(_PATTERNS)
    if model.trust_remote_code:
        patterns.append("*.py")
    if not model.use_safetensors:
        patterns.append("pytorch_model*.bin")
    return patterns


def _explain(error: Exception, name: str, revision: str, offline: bool, suggestion: str) -> LlmtuneError:
    """Turn the hub library's error into ours; the order matters, as its errors inherit from one another."""
    where = "model.name"
    if isinstance(error, HFValidationError):
        return EnvironmentProblem.of(f"'{name}' is neither a folder nor a hub name", where, suggestion)
    if isinstance(error, GatedRepoError):
        fix = f"Ask for access at https://huggingface.co/{name}, then log in with `hf auth login`."
        return EnvironmentProblem.of(f"the hub model '{name}' is gated, and this machine has no access", where, fix)
    if isinstance(error, RevisionNotFoundError):
        fix = "Name a branch, tag or commit that the model's page lists."
        return RecipeError.of(f"the hub model '{name}' has no revision '{revision}'", "model.revision", fix)
    if isinstance(error, RepositoryNotFoundError):
        fix = f"{suggestion} A private model needs `hf auth login`."
        return EnvironmentProblem.of(f"there is no folder and no public hub model '{name}'", where, fix)
    if offline or isinstance(error, OfflineModeIsEnabled):
        switch = "--offline and HF_HUB_OFFLINE"
        fix = f"{suggestion} Without {switch} it is downloaded once; a local folder or builtin:NAME needs no network."
        return EnvironmentProblem.of(f"'{name}' is no local folder and not in the hub's local cache", where, fix)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "no"
        return EnvironmentProblem.of(f"the hub answered for '{name}' with status {status}", where, "Try again later.")
    fix = f"{suggestion} A local folder or builtin:NAME needs no network; HTTPS_PROXY names a proxy."
    return EnvironmentProblem.of(f"'{name}' is no local folder, and the hub cannot be reached", where, fix)
