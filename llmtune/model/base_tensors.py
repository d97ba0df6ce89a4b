"""The tensors of a checkpoint outside its language model, such as a vision tower: copied and compared."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, groupby
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from llmtune.errors import EnvironmentProblem
from llmtune.model.config import in_heads
from llmtune.model.towers import find_towers
from llmtune.store.atomic_files import write_json

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    name: str

    def read(self) -> torch.Tensor:
        """Return the tensor, mapped from its file."""
        with safe_open(str(self.file), "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(self.name)
        return tensor

    def digest(self) -> str:
        """Return the hash of the number format, the shape and the bytes."""
        tensor = self.read()
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return sha256(f"{tensor.dtype} {[*tensor.shape]} {sha256(content.data).hexdigest()}".encode()).hexdigest()


def build_complete(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model of this class and configuration with its towers, on the meta device."""
    with torch.device("meta"):
        return cast(PreTrainedModel, type(model)._from_config(copy.deepcopy(model.config)))


def list_other_tensors(
    folder: Path, complete: PreTrainedModel, trained: Collection[str] = ()
) -> dict[str, StoredTensor]:
    """Return the tensors in a folder's safetensors that are outside the language model, by their names in the model.

    `complete` is a model with its towers, without memory. If it is of the class that the folder of the base names,
    tensors that this class does not load are listed too, such as layers that predict further tokens. Tensors of
    `trained` modules are left out.
    """
    towers, parameters = find_towers(complete), complete.state_dict()
    transforms = get_model_conversion_mapping(complete)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    leaves = {name for name, module in complete.named_modules() if not [*module.children()]}
    keeps_unread = type(complete).__name__ in (complete.config.architectures or ())
    others = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            stored = [*opened.keys()]
        for name in stored:
            prefix = complete.base_model_prefix
            target, converted = rename_source_key(name, renamings, converters, prefix, parameters)
            unread = target not in parameters and leaves.isdisjoint(accumulate(target.split("."), "{}.{}".format))
            if in_heads(target, trained):
                continue
            if in_heads(target, towers) or (keeps_unread and unread):
                others[target if converted is None else name] = StoredTensor(file, name)
    return others


def copy_other_tensors(base: Path, complete: PreTrainedModel, folder: Path, trained: Collection[str] = ()) -> None:
    """Add the base's other tensors, byte for byte, to the files of a saved model, and index them all.

    Raises EnvironmentProblem if the base has none in safetensors.
    """
    others = list_other_tensors(base, complete, trained)
    if not others:
        what = f"its safetensors have no weights of {', '.join(find_towers(complete))}"
        raise EnvironmentProblem.of(what, str(base), "Download the model again, or merge the text alone: --text-only.")
    saved = sorted(folder.glob("model*.safetensors"))
    (folder / INDEX).unlink(missing_ok=True)
    parts = [[*part] for _, part in groupby(others.values(), key=lambda one: one.file)]
    count = len(saved) + len(parts)
    files = [folder / f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    for old, new in zip(saved[::-1], files[: len(saved)][::-1], strict=True):
        old.rename(new)
    for part, new in zip(parts, files[len(saved) :], strict=True):
        save_file({one.name: one.read() for one in part}, new, metadata={"format": "pt"})
    weight_map, size = dict[str, str](), 0
    for file in files:
        with safe_open(str(file), "pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), file.name)
        with file.open("rb") as content:
            size += file.stat().st_size - 8 - int.from_bytes(content.read(8), "little")  # without the header
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def compare_other_tensors(
    base: Path, folder: Path, complete: PreTrainedModel, trained: Collection[str] = ()
) -> tuple[dict[str, object], list[str]]:
    """Return the certificate's fields on the tensors outside the language model, and what differs from the base's."""
    expected, actual = (list_other_tensors(one, complete, trained) for one in (base, folder))
    digests = {name: one.digest() for name, one in sorted(expected.items())}
    different = [name for name, digest in digests.items() if name not in actual or actual[name].digest() != digest]
    fields: dict[str, object] = {
        "tensors": len(digests),
        "equal": len(digests) - len(different),
        "sha256": sha256(json.dumps(digests).encode()).hexdigest(),
    }
    added = sorted(actual.keys() - expected.keys())
    unknown = [f"{len(added)} tensors are not in the base, such as {added[0]}"] if added else []
    return fields, [*_describe_differences(digests, different, find_towers(complete)), *unknown]


def _describe_differences(digests: Mapping[str, str], different: list[str], towers: list[str]) -> Iterator[str]:
    def tower_of(name: str) -> str:
        return next((tower for tower in towers if in_heads(name, [tower])), "other parts")

    for tower, group in groupby(sorted(different, key=tower_of), key=tower_of):
        names = [*group]
        total = sum(tower_of(name) == tower for name in digests)
        yield f"{len(names)} of {total} tensors of {tower} are not the base's bytes, such as {names[0]}"
