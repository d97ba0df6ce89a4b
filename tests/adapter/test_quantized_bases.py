"""Bases with quantised files: an adapter trains on them, reloads in plain PEFT and merges; or is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapting import build_family, logits, open_model, quiet, recipe_with
from support.runs import invoke, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from llmtune.adapter.injection import describe_adapter, inject, trained_parameters
from llmtune.adapter.merging import merge_adapter
from llmtune.adapter.saving import save_adapter
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.quantized_base import unpack

GROUP = 32
State = dict[str, torch.Tensor]


def build_quantized(folder: Path, plain: Path, kind: str) -> Path:
    """Copy the model `plain` into `folder` with its linear layers quantised; skip if a package is missing."""
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
    """Round to 4 bits by groups of inputs: numbers 0 to 15, scales and zero points, inputs first."""
    groups = weight_OI.reshape(len(weight_OI), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-8).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    numbers = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)
    return numbers.reshape(weight_OI.shape).T.long(), scale.T.contiguous(), zero.T.long()


def _pack(numbers: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack eight numbers of a row into one of 32 bits."""
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


KEPT = {"bitsandbytes-4": 4, "bitsandbytes-8": 8, "torchao": 8, "gptq": 4, "awq": 4}
"""Bits of those that stay quantised in memory."""
QUICK = ("bitsandbytes-4", "fp8")
KINDS = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in BUILDERS]
SLOPPY = {"bitsandbytes-8": 0.05, "awq": 0.02}
"""Tolerance of logits against unpacked weights: LLM.int8 rounds a layer's input too, AWQ sums in 16 bits."""
pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt:UserWarning",
    "ignore:Implicitly cleaning up:ResourceWarning",  # gptqmodel's folder
    "ignore:Exception ignored in. <finalize:pytest.PytestUnraisableExceptionWarning",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_llama):
    made = {}

    def build(kind):
        if kind not in made:
            made[kind] = build_quantized(tmp_path_factory.mktemp("bases") / kind, tiny_llama, kind)
        return made[kind]

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_on_a_quantised_base_and_reloads(base, kind, tmp_path):
    recipe = recipe_with(base(kind), adapter={"r": 4})
    selected = open_model(recipe)
    adapted = inject(selected, recipe, quiet())
    facts = describe_adapter(adapted)
    assert selected.quantized == (kind in KEPT)
    assert facts.get("quantized_bits") == KEPT.get(kind)
    assert facts["share_under_adapter"] == pytest.approx(0.728, abs=0.001)
    assert facts.get("share_quantized", 0.728) == pytest.approx(0.728, abs=0.001)
    optimizer = torch.optim.Adam(trained_parameters(adapted.model), lr=5e-3)
    adapted.model.train()
    losses = []
    for _ in range(6):
        ids = torch.arange(5, 45)[None]
        loss = adapted.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    adapted.model.eval()
    tuned = logits(adapted.model)
    save_adapter(adapted, tmp_path / "adapter")
    config = AutoConfig.from_pretrained(base(kind))
    if kind.startswith("compressed"):  # PEFT sees no weights in packed ones
        config.quantization_config["dequantize"] = True
    alone = AutoModelForCausalLM.from_pretrained(base(kind), config=config, dtype=torch.float32)
    plain = PeftModel.from_pretrained(alone, tmp_path / "adapter")
    torch.testing.assert_close(logits(plain.eval()), tuned, atol=0.05, rtol=0)  # kernels for inference round more
    close = {"atol": SLOPPY.get(kind, 1e-3), "rtol": 0}
    merged = merge_adapter(adapted, "dequantized")
    assert not getattr(merged, "is_quantized", False)
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), tuned, **close)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KEPT)
def test_gradients_equal_those_on_the_unpacked_weights(base, kind):
    found = []
    for unpacked in (False, True):
        recipe = recipe_with(base(kind), adapter={"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"]})
        selected = open_model(recipe)
        if unpacked:
            unpack(selected.model)
        adapted = inject(selected, recipe, quiet())
        ids = torch.arange(5, 45)[None]
        with torch.no_grad():
            for parameter in trained_parameters(adapted.model):
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
        adapted.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad for _, p in sorted(adapted.model.named_parameters()) if p.requires_grad])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KEPT)
def test_the_plan_counts_quantised_weights_by_their_bits(base, kind):
    selected = open_model(recipe_with(base(kind)))
    whole = sum(tensor.numel() * tensor.element_size() for tensor in selected.model.get_input_embeddings().parameters())
    assert selected.plan.base_quantization == selected.base_quantization == kind.partition("-")[0]
    inner = selected.plan.parts["weights"] - whole
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert inner * 8 / weights == pytest.approx(KEPT[kind], abs=1.2)  # scales; norms in 32 bits


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"method": "full"}, "have no gradient"),
        ({"method": "qlora"}, "already quantised"),
        ({"init_lora_weights": "pissa"}, "but the base is quantised"),
    ],
)
def test_what_quantised_weights_cannot_do_is_refused_before_they_are_loaded(base, tmp_path, adapter, words):
    folder = shutil.copytree(base("bitsandbytes-4"), tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000] + b"\xff" * 1000)
    with pytest.raises(RecipeError, match=words):
        open_model(recipe_with(folder, adapter=adapter))


def test_weights_that_stay_quantised_in_other_formats_than_4_bit_bitsandbytes_are_not_sharded(base, here, chat_rows):
    write_recipe(here / "recipe.yaml", base("bitsandbytes-8"), chat_rows)
    result = invoke("launch", "local", "recipe.yaml", "--processes", 2, "--strategy", "fsdp", "--dry-run")
    assert result.exit_code == 2, result.output
    assert "cannot be sharded" in result.output
    assert "--strategy ddp" in result.output


def test_a_new_head_is_not_put_on_weights_that_stay_quantised(base, tmp_path):
    recipe = recipe_with(base("bitsandbytes-4")).model_copy(update={"task": "classify"})
    with pytest.raises(RecipeError, match="adds a new head"):
        open_model(recipe)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"quant_method": "hqq"}, "transformers 5 does not read it yet"),
        ({"quant_method": "quark"}, "llmtune supports awq"),
        ({"quant_method": "bitsandbytes"}, "does not state the bits"),
        ({"bits": 4}, "must name a quant_method"),
        (4, "must name a quant_method"),
        ({"quant_method": "gptq", "bits": "many"}, "pip install|does not state the bits"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4Weight"}}}, "pip install|less than 8"),
    ],
)
def test_files_that_cannot_be_trained_on_are_refused_by_name_with_a_fix(tiny_llama, tmp_path, stated, words):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    with pytest.raises(EnvironmentProblem, match=words) as caught:
        open_model(recipe_with(folder))
    assert "name the original model" in str(caught.value).lower()


MXFP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def test_experts_in_mxfp4_are_unpacked_and_adapted(tmp_path):
    shape = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
    folder = build_family(tmp_path / "model", "gpt_oss", **shape)
    state, expected = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = state.pop(name).shape
        codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32), generator=generator)
        values = MXFP4[codes % 8] * (1 - 2 * (codes // 8)) / 16
        expected[name] = values.reshape(experts, outputs, inputs).transpose(1, 2)
        state[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        state[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 127 - 4, dtype=torch.uint8)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    recipe = recipe_with(folder, adapter={"r": 4, "target_parameters": ["gate_up_proj", "down_proj"]})
    selected = open_model(recipe)
    assert not selected.quantized
    for name, weights in expected.items():
        torch.testing.assert_close(selected.model.get_parameter(name).detach(), weights)
    assert describe_adapter(inject(selected, recipe, quiet()))["share_under_adapter"] > 0.5


@pytest.mark.slow
def test_a_run_on_a_quantised_base_ends_with_a_certified_merge(base, here, chat_rows):
    recipe = write_recipe(here / "recipe.yaml", base("bitsandbytes-4"), chat_rows, deploy=["merged"])
    result = invoke("run", recipe, "--out", here / "run")
    assert result.exit_code == 0, result.output
    report = json.loads((here / "run" / "report.json").read_text())
    assert report["train"]["train_loss"] < report["train"]["first_loss"]
    assert report["adapter"]["quantized_bits"] == 4
    assert f"{report['adapter']['share_quantized']:.1%} in 4 bits" in result.output
    assert json.loads((here / "run" / "merged" / "certificate.json").read_text())["passed"]
    again = invoke("deploy", "merge", here / "run", "--onto", "original", "--out", here / "other")
    assert again.exit_code == 2
    assert "there are no other weights of it" in again.output
