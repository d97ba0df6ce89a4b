"""Under which licence a model comes: a packaged one, one of the catalogue, or by its card."""

from __future__ import annotations

from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from llmtune.model.builtin_models import PACKAGED
from llmtune.model.resolve import NO_ANSWER

UNKNOWN = "unknown"
"""The hub's word for a licence that nobody stated."""
LICENSES = frozenset(files("llmtune.model").joinpath("hub_licenses.txt").read_text("utf-8").split())
"""The hub's short names: https://huggingface.co/docs/hub/repositories-licenses."""


def find_license(name: str, folder: Path, base: str | None, *, network: bool) -> str | None:
    """Find the licence of the model `name`: that of a packaged one, or by its card in `folder` or on the hub."""
    known = PACKAGED.get(name.removeprefix("builtin:"))
    if known is not None:
        return known.license
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
