"""The Hugging Face hub: names and licences of base models, and a folder uploaded."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from llmtune.errors import EnvironmentProblem, LlmtuneError
from llmtune.store.process_environment import offline_switches

NO_ANSWER = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""The error of the HTTP library that the hub's library stands on."""
UNKNOWN = "unknown"
"""The hub's word for a licence that nobody stated."""


@dataclass(frozen=True)
class PackagedModel:
    """Where a model of a Python package comes from."""

    name: str
    license: str
    difference: str


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", "weights rounded to Q4_1"
    ),
    "minilm-l6-v2": PackagedModel("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0", "the same weights"),
    "whisper-tiny.en": PackagedModel("openai/whisper-tiny.en", "mit", "weights in float16"),
}
"""By name without `builtin:`."""
LICENSES = frozenset(files("llmtune.deploy").joinpath("hub_licenses.txt").read_text("utf-8").split())
"""The hub's short names: https://huggingface.co/docs/hub/repositories-licenses."""


def find_license(name: str, folder: Path, base: str | None, *, network: bool) -> str | None:
    """Find the licence of the base model `name`: that of a packaged one, or by its card in `folder` or on the hub."""
    packaged = PACKAGED_MODELS.get(name.removeprefix("builtin:"))
    if packaged is not None:
        return packaged.license
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


def check_upload(offline: bool) -> None:
    """Refuse what cannot work, before anything is done.

    Raises EnvironmentProblem: the network is forbidden, or there is no token.
    """
    forbidden = "--offline" if offline else next(iter(offline_switches()), None)
    if forbidden:
        fix = f"{'Omit' if offline else 'Unset'} it, or make a folder with --to FOLDER."
        raise EnvironmentProblem.of(f"an upload needs the network, which {forbidden} forbids", "--repo", fix)
    if get_token() is None:
        fix = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
        raise EnvironmentProblem.of("there is no token for the hub", "--repo", fix)


def upload(folder: Path, repo: str, *, private: bool, card: ModelCard, name: str) -> None:
    """Let the hub check the card, create the repository if there is none, and upload all files in one commit.

    Raises EnvironmentProblem where the hub refuses or cannot be reached.
    """
    api = HfApi()
    try:
        card.validate()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{name}, by llmtune")
    except (OfflineModeIsEnabled, NO_ANSWER) as error:
        raise _explain(error, repo) from error
    except ValueError as error:
        raise EnvironmentProblem.of(f"the hub refuses the card: {error}", "README.md") from error


def _explain(error: Exception, repo: str) -> LlmtuneError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        fix = "Make a token that may write there (https://huggingface.co/settings/tokens), then: hf auth login"
        return EnvironmentProblem.of(f"the token may not write to {repo} (status {status})", "--repo", fix)
    if status is not None:
        return EnvironmentProblem.of(f"the hub answered with status {status}", repo, "Try again later.")
    fix = "HTTPS_PROXY names a proxy, HF_ENDPOINT another hub; or make a folder with --to FOLDER."
    return EnvironmentProblem.of("the hub cannot be reached", repo, fix)
