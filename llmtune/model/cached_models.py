"""List the models that are on this machine: in the hub's cache, and packaged ones in llmtune's. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from llmtune.model.builtin_models import PACKAGED, packaged_folder
from llmtune.store.atomic_files import read_json
from llmtune.store.cleaning import measure_bytes

INDEX, WEIGHTS = "model.safetensors.index.json", ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class CachedModel:
    """A model on this machine."""

    name: str
    """As in `model.name`."""
    folder: Path
    bytes: int
    missing: str | None
    """What an interrupted download did not bring; None if the model is complete."""


def find_local_model(name: str, revision: str = "main") -> Path | None:
    """Return the folder of a model that needs no download: its own, or a snapshot in the hub's cache."""
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    file = try_to_load_from_cache(name, "config.json", revision=revision) if is_hub_name else None
    return Path(file).parent if isinstance(file, str) else None


def list_cached_models() -> list[CachedModel]:
    """Return the packaged models that are converted, then the models of the hub's cache, by name."""
    packaged = {f"builtin:{name}": packaged_folder(name, entry) for name, entry in PACKAGED.items()}
    folders = [(name, folder, folder) for name, folder in packaged.items() if folder.is_dir()]
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*")):
        snapshot = _newest_snapshot(folder)
        if snapshot is not None and (snapshot / "config.json").exists():
            folders.append((folder.name.removeprefix("models--").replace("--", "/"), folder, snapshot))
    return [CachedModel(name, folder, measure_bytes(folder), _find_missing(model)) for name, folder, model in folders]


def _newest_snapshot(folder: Path) -> Path | None:
    main = folder / "refs" / "main"
    snapshots = sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    commit = main.read_text("utf-8", errors="replace").strip() if main.is_file() else ""
    return next((path for path in reversed(snapshots) if path.name == commit), snapshots[-1] if snapshots else None)


def _find_missing(model: Path) -> str | None:
    """Return the first weights file that is missing, or `weights` if there are none; None if all are there."""
    index = read_json(model / INDEX)
    if isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
        files = sorted({str(file) for file in index["weight_map"].values()})
        return next((file for file in files if not (model / file).is_file()), None)
    weights = [path for pattern in WEIGHTS for path in model.glob(pattern) if path.is_file()]
    return None if weights else "weights"
