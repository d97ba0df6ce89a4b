"""Tiny Llamas quantised on the spot, as the files of each format have them; GPTQ, AWQ and FP8 packed by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

GROUP = 32
State = dict[str, torch.Tensor]


def build_quantized(folder: Path, plain: Path, kind: str) -> Path:
    """Copy the model `plain` into `folder` with its linear layers quantised; skips where a package is missing."""
    shutil.copytree(plain, folder)
    BUILDERS[kind](folder)
    return folder


def _save(folder: Path, model: torch.nn.Module) -> None:
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def _bitsandbytes(folder: Path, **options: bool) -> None:
    config = BitsAndBytesConfig(**options)
    _save(folder, AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32))


def _torchao(folder: Path) -> None:
    api = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(api.Int8WeightOnlyConfig(version=2))
    _save(folder, AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32))


def _compressed(folder: Path, **weights: object) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**weights))
    groups = {"group_0": scheme}
    config = quantization.QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="compressed")
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            scale = module.weight_scale
            rows = module.weight.data.reshape(*scale.shape, -1)
            found, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), module.quantization_scheme.weights)
            scale.data = found.reshape(scale.shape).to(scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    _save(folder, model)
    compressor.update_config(folder)


def _rewrite(folder: Path, pack: Callable[[State, str, torch.Tensor], None], config: dict[str, object]) -> None:
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("proj.weight")]:
        pack(state, name.removesuffix("weight"), state.pop(name).float())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def _round(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to 4 bits by groups of inputs: numbers 0 to 15, scales and zero points, with inputs first."""
    groups = weight_OI.reshape(len(weight_OI), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-8).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    numbers = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)
    return numbers.reshape(weight_OI.shape).T.long(), scale.T.contiguous(), zero.T.long()


def _pack(numbers: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Put eight numbers of a row into one of 32 bits."""
    parts = numbers.reshape(len(numbers), -1, 8)
    packed = sum(parts[..., place] << (4 * at) for at, place in enumerate(order))
    return packed.where(packed < 2**31, packed - 2**32).to(torch.int32).contiguous()


def _gptq(folder: Path) -> None:
    pytest.importorskip("gptqmodel")

    def pack(state: State, name: str, weight: torch.Tensor) -> None:
        numbers, state[f"{name}scales"], zero = _round(weight)
        state[f"{name}qweight"] = _pack(numbers.T).T.contiguous()
        state[f"{name}qzeros"] = _pack((zero - 1) % 16)
        state[f"{name}g_idx"] = (torch.arange(weight.shape[1]) // GROUP).to(torch.int32)

    config = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "checkpoint_format": "gptq"}
    _rewrite(folder, pack, {"quant_method": "gptq", **config})


def _awq(folder: Path) -> None:
    pytest.importorskip("gptqmodel")

    def pack(state: State, name: str, weight: torch.Tensor) -> None:
        numbers, state[f"{name}scales"], zero = _round(weight)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        state[f"{name}qweight"], state[f"{name}qzeros"] = _pack(numbers, order), _pack(zero, order)

    config = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    _rewrite(folder, pack, {"quant_method": "awq", **config})


def _fp8(folder: Path) -> None:
    def pack(state: State, name: str, weight: torch.Tensor) -> None:
        blocks = weight.reshape(weight.shape[0] // GROUP, GROUP, weight.shape[1] // GROUP, GROUP)
        scale = blocks.abs().amax((1, 3)) / 448
        state[f"{name}weight"] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        state[f"{name}weight_scale_inv"] = scale

    config = {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [GROUP, GROUP]}
    _rewrite(folder, pack, {"quant_method": "fp8", **config})


BUILDERS: dict[str, Callable[[Path], None]] = {
    "bitsandbytes-4": lambda folder: _bitsandbytes(folder, load_in_4bit=True),
    "bitsandbytes-8": lambda folder: _bitsandbytes(folder, load_in_8bit=True),
    "fp8": _fp8,
    "compressed-tensors-int4": lambda folder: _compressed(
        folder, num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=True
    ),
    "compressed-tensors-fp8": lambda folder: _compressed(
        folder, num_bits=8, type="float", strategy="channel", symmetric=True
    ),
    "torchao": _torchao,
    "gptq": _gptq,
    "awq": _awq,
}
