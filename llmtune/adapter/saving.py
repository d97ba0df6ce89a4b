"""The adapter on disk: a plain PEFT folder with tokenizer and template; equal weights give equal bytes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from llmtune.adapter.injection import wrap, wrap_full
from llmtune.adapter.load import WEIGHTS, attach, find_adapter, read_config
from llmtune.display.number_format import size as format_bytes
from llmtune.errors import EnvironmentProblem, first_line
from llmtune.model.base_tensors import build_complete, copy_other_tensors
from llmtune.model.config import OTHER_CLASSES, OTHER_ORDER
from llmtune.model.device import explain_oom, is_out_of_memory
from llmtune.model.model_files import read_config_file, share_file
from llmtune.model.processor import save_tokenizer
from llmtune.model.towers import dropped_modules, image_text_class
from llmtune.records import AdaptedModel, SelectedModel


def save_adapter(adapted: AdaptedModel, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter into `folder` (made if absent), in a form that PEFT loads.

    PiSSA and OLoRA become plain LoRA on the untouched base: `W_res + s B A = W + s [B, B0] [A; -A0]`, which doubles
    their rank. With `method: full` the model itself is written, in its original dtype. `state` has the model's weights
    by name if the model itself is sharded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if adapted.method == "full":
        _save_model(adapted, folder, state)
    else:
        _save_lora(adapted, folder, state)
    save_tokenizer(adapted.selected.processor, folder)


def load_adapter(selected: SelectedModel, folder: Path) -> AdaptedModel:
    """Put the output of `save_adapter` onto `selected.model` (in place), in eval mode and without gradients.

    Raises EnvironmentProblem if the folder has no adapter, or one for another model, or memory runs out.
    """
    with explain_oom(f"loading the trained weights onto {selected.model_ref.name}", str(selected.model.device)):
        if not (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
            return _load_model(selected, folder)
        source = find_adapter(folder)
        selected.model.requires_grad_(False)
        model = attach(selected, read_config(source), source, trainable=False)
    model.eval()
    kind = model.peft_config["default"].peft_type.value.lower()
    return wrap(selected, model, "qlora" if selected.quantized and not selected.base_quantization else kind)


@contextmanager
def writing_weights(folder: Path) -> Iterator[None]:
    """Turn the error of safetensors for a full disk, which is not an OSError, into one of ours.

    Raises EnvironmentProblem.
    """
    try:
        yield
    except SafetensorError as error:
        free = shutil.disk_usage(folder).free
        raise EnvironmentProblem.of(
            f"the weights cannot be written ({first_line(error)}); {format_bytes(free)} are free",
            str(folder),
            "Free space or choose another folder with --out.",
        ) from error


def _save_lora(adapted: AdaptedModel, folder: Path, whole: dict[str, torch.Tensor] | None) -> None:
    model = cast(PeftModel, adapted.model)
    config = model.peft_config["default"]
    state = get_peft_model_state_dict(model, whole, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if not isinstance(config, LoraConfig):  # layers may share weights, but a file needs one copy per name
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    described = config.to_dict()
    start = getattr(model, "start_weights", None)
    if start is not None:
        tensors = _subtract_start(tensors, start)
        described |= _double_rank(config)
    if isinstance(config, LoraConfig):  # the weights contain the start, which must not be recomputed from rows
        described |= {"eva_config": None, "corda_config": None, "lora_ga_config": None}
        described |= {"init_lora_weights": True} if config.init_lora_weights == "eva" else {}
    base = adapted.selected.model_ref  # as PEFT looks it up: the hub's name and commit, or the folder
    name = str(base.path) if base.revision is None else base.name
    described |= {"inference_mode": True, "base_model_name_or_path": name, "revision": base.revision}
    kind, complete = type(adapted.selected.model), image_text_class(adapted.selected.model.config)
    if complete is not None and issubclass(kind, complete):  # for users and the card: another class may open the base
        described["auto_mapping"] = {"base_model_class": complete.__name__, "parent_library": complete.__module__}
    elif config.task_type is None:  # `AutoPeftModel` then needs the class
        described["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    with writing_weights(folder):
        save_file(dict(sorted(tensors.items())), str(folder / WEIGHTS), metadata={"format": "pt"})
    text = json.dumps(described, indent=2, sort_keys=True, default=_as_json)
    (folder / "adapter_config.json").write_text(text + "\n", "utf-8")
    if adapted.selected.trains_head:
        _save_classes(adapted.selected, folder)
    share_file(folder / WEIGHTS, folder / "adapter_config.json")


def _save_classes(selected: SelectedModel, folder: Path) -> None:
    """Write the model's configuration, which names its head's outputs."""
    content = selected.model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", OTHER_CLASSES, OTHER_ORDER):
        content.pop(key, None)
    text = json.dumps(content, indent=2, sort_keys=True, default=_as_json)
    (folder / "config.json").write_text(text + "\n", "utf-8")


def _as_json(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if hasattr(value, "value") else str(value)


def _subtract_start(tensors: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    converted = {}
    for name, tensor in tensors.items():
        first = start.get(name.replace(".weight", ".default.weight"))
        if first is None:
            converted[name] = tensor
        elif ".lora_A." in name:
            converted[name] = torch.cat([tensor, -first], dim=0)
        else:
            converted[name] = torch.cat([tensor, first], dim=1).contiguous()
    return converted


def _double_rank(config: LoraConfig) -> dict[str, object]:
    """Double ranks and keep each scale: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return {
        "r": 2 * config.r,
        "lora_alpha": factor * config.lora_alpha,
        "rank_pattern": {name: 2 * rank for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in config.alpha_pattern.items()},
        "init_lora_weights": True,
    }


def _save_model(adapted: AdaptedModel, folder: Path, whole: dict[str, torch.Tensor] | None) -> None:
    model = cast(PreTrainedModel, adapted.model)
    dtype = stored_dtype(adapted.selected)
    whole = model.state_dict() if whole is None else whole
    tied = model.all_tied_weights_keys or {}  # one of each pair is written; converted copies would be two
    pairs = [(name, source) for name, source in tied.items() if name in whole]  # those of towers are dropped
    twice = {name for name, source in pairs if whole[name].data_ptr() == whole[source].data_ptr()}
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in whole.items() if name not in twice}
    with writing_weights(folder):
        model.save_pretrained(folder, state_dict=state)
        if dropped_modules(model):
            copy_other_tensors(adapted.selected.model_ref.path, build_complete(model), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config |= {"dtype": str(dtype).removeprefix("torch."), "use_cache": True}  # training uses other values
    for key in (OTHER_CLASSES, OTHER_ORDER):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    for weights in folder.glob("*.safetensors"):
        share_file(weights, path)


def stored_dtype(selected: SelectedModel) -> torch.dtype:
    """Return the dtype of the model's files, from its config.json; float32 by default."""
    config = read_config_file(selected.model_ref.path)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return cast(torch.dtype, getattr(torch, name, torch.float32))


def _load_model(selected: SelectedModel, folder: Path) -> AdaptedModel:
    model = selected.model
    if selected.model_ref.path.resolve() != folder.resolve():  # otherwise the weights are already loaded
        _read_weights(model, folder)
    adapted = wrap_full(selected)
    model.requires_grad_(False)
    model.eval()
    return adapted


def _read_weights(model: PreTrainedModel, folder: Path) -> None:
    left = set(model.state_dict())
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        try:
            result = model.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise EnvironmentProblem.of(f"contains weights of another model: {error}", str(path)) from error
        if result.unexpected_keys:
            raise EnvironmentProblem.of(f"contains unknown weights, such as {result.unexpected_keys[0]}", str(path))
        left -= set(tensors)
    left -= set(model.all_tied_weights_keys or {})
    if left:
        raise EnvironmentProblem.of(f"the weights {min(left)} are missing", str(folder), "The folder is incomplete.")
