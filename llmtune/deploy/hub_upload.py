"""A folder onto the hub: what must be there first, and the hub's errors in words."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from llmtune.errors import EnvironmentProblem, LlmtuneError
from llmtune.store.process_environment import offline_switches

_NO_ANSWER = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""The error of the HTTP library that the hub library stands on."""


def check_upload(offline: bool) -> None:
    """Refuse what cannot work, before anything is done.

    Raises EnvironmentProblem: the network is forbidden, or there is no token.
    """
    if offline:
        fix = "Leave --offline away, or make a folder with --to FOLDER."
        raise EnvironmentProblem.of("an upload needs the network, which --offline forbids", "--repo", fix)
    if switches := offline_switches():
        fix = "Unset it, or make a folder with --to FOLDER."
        raise EnvironmentProblem.of(f"an upload needs the network, which {switches[0]} forbids", "--repo", fix)
    if get_token() is None:
        fix = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
        raise EnvironmentProblem.of("there is no token for the hub", "--repo", fix)


def upload(folder: Path, repo: str, *, private: bool, card: ModelCard, name: str) -> None:
    """Let the hub check the card, make the repository where there is none, and upload all files in one commit.

    Raises EnvironmentProblem where the hub refuses or cannot be reached.
    """
    api = HfApi()
    try:
        card.validate()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{name}, by llmtune")
    except ValueError as error:
        if isinstance(error, _NO_ANSWER):
            raise _explain(error, repo) from error
        raise EnvironmentProblem.of(f"the hub refuses the card: {error}", "README.md") from error
    except (OfflineModeIsEnabled, _NO_ANSWER) as error:
        raise _explain(error, repo) from error


def _explain(error: Exception, repo: str) -> LlmtuneError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403):
        fix = "Make a token that may write there (https://huggingface.co/settings/tokens), then: hf auth login"
        return EnvironmentProblem.of(f"the token may not write to {repo} (status {status})", "--repo", fix)
    if status is not None:
        return EnvironmentProblem.of(f"the hub answered with status {status}", repo, "Try again later.")
    fix = "HTTPS_PROXY names a proxy, HF_ENDPOINT another hub; or make a folder with --to FOLDER."
    return EnvironmentProblem.of("the hub cannot be reached", repo, fix)
