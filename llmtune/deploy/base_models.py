"""Base models as the hub knows them: names of packaged ones, and licences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Upstream:
    """Where a packaged model comes from."""

    name: str
    license: str
    form: str


UPSTREAM = {
    "smollm2-135m-instruct": Upstream("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", "weights rounded to Q4_1"),
    "minilm-l6-v2": Upstream("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0", "the same weights"),
    "whisper-tiny.en": Upstream("openai/whisper-tiny.en", "mit", "weights in float16"),
}
"""By name without `builtin:`."""
# fmt: off
LICENSES = frozenset(
    (
        "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
        "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
        "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
        "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1",
        "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0",
        "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib",
        "pddl", "lgpl-lr", "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3",
        "llama3.1", "llama3.2", "llama3.3", "llama4", "grok2-community", "gemma", "unknown", "other",
    )
)
# fmt: on
"""The hub's short names: https://huggingface.co/docs/hub/repositories-licenses."""


@dataclass(frozen=True)
class License:
    """A licence by the hub's short name, and who says so."""

    name: str
    source: str


def find_license(lock: Mapping[str, Any], base: str | None, *, stated: str | None, network: bool) -> License:
    """Find the licence: as stated, or that of the base model, by its card in its folder or on the hub."""
    if stated is not None:
        return License(stated, "stated by the publisher")
    packaged = UPSTREAM.get(str(lock["model"]["name"]).removeprefix("builtin:"))
    if packaged is not None:
        return License(packaged.license, "that of the base model")
    found = _read_card(Path(lock["model"]["folder"]) / "README.md")
    if found is None and network and base is not None:
        found = _ask_hub(base)
    if found is None:
        return License(UNKNOWN, "not stated by the publisher, and not found with the base model")
    return License(found, "that of the base model")


def _read_card(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    except (ValueError, TypeError, KeyError):
        return None
    return found if found in LICENSES else None


def _ask_hub(base: str) -> str | None:
    no_answer = cast(type[Exception], HfHubHTTPError.__bases__[0])  # the error of the HTTP library beneath
    try:
        card = HfApi().model_info(base).card_data
    except no_answer:
        return None
    found = card.get("license") if card else None
    return found if found in LICENSES else None
