"""The Hugging Face hub: a folder uploaded."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import OfflineModeIsEnabled

from llmtune.errors import EnvironmentProblem, LlmtuneError
from llmtune.model.resolve import NO_ANSWER
from llmtune.store.process_environment import offline_switches


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
