"""Simulate the memory of a card under fsdp: two steps of FSDP2 on tensors without values, next to the plan.

python benchmarks/simulated_memory.py "Llama 3.1 8B" qlora 2

torch's FSDPMemTracker counts the bytes of all tensors. Their number and sizes are those of a training on cards.
Kernels, fragmentation and NCCL's buffers are not part of it. The loss takes the logits of 128 tokens, about as many
as llmtune has in memory at once.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState
from peft import LoraConfig, get_peft_model
from scale import GIB, MODELS, TOKENS, place_plan
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from llmtune.adapter.injection import enable_checkpointing
from llmtune.model.sharded_quantization import ShardableLinear4bit
from llmtune.records import Layout
from llmtune.train import sharding


class ValuelessLinear4bit(ShardableLinear4bit):
    """The 4-bit layer without bitsandbytes' parameter class, which tensors without values cannot have."""

    def __init__(self, like: torch.nn.Linear) -> None:
        """Make packed weights and scales for a layer of the same shape."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, size = like.in_features, like.out_features, like.weight.numel()
        self.weight = torch.nn.Parameter(torch.empty(size // 4, 1, dtype=torch.bfloat16), requires_grad=False)
        self.absmax = torch.nn.Parameter(torch.empty(size // 64, dtype=torch.uint8), requires_grad=False)
        second = QuantState(torch.empty(size // 64 // 256), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        about: dict[str, Any] = {"shape": like.weight.shape, "blocksize": 64, "quant_type": "nf4"}
        about |= {"code": torch.empty(16), "dtype": torch.bfloat16, "offset": torch.empty(()), "state2": second}
        self.quant_state = QuantState(self.absmax, **about)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        self.quant_state.absmax = self.absmax
        return matmul_4bit(x.to(torch.bfloat16), self.weight, quant_state=self.quant_state)


def build(name: str, method: str) -> Any:
    """Return the model without memory, with its adapter."""
    config, full = MODELS[name], method == "full"
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if full else torch.bfloat16)
    model.config.use_cache = False
    enable_checkpointing(model)
    if full:
        return model.train()
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model.requires_grad_(False), adapter, low_cpu_mem_usage=True).train()


def fill(model: torch.nn.Module, method: str) -> None:
    """Give the model tensors without values, in place: trained ones in float32, linear ones in 4 bits for qlora."""
    for module in [*model.modules()] if method == "qlora" else []:
        if hasattr(module, "base_layer"):
            module.base_layer = ValuelessLinear4bit(module.base_layer)
    known: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for key, own in module._parameters.items():
            if own is not None and own.is_meta:
                dtype = torch.float32 if own.requires_grad else own.dtype
                new = torch.nn.Parameter(torch.empty(own.shape, dtype=dtype), own.requires_grad)
                module._parameters[key] = known.setdefault(own, new)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def simulate(name: str, method: str, processes: int) -> float:
    """Return the highest bytes of one process in two steps of TOKENS tokens."""
    distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    mesh, model, cpu = sharding.init_device_mesh("cpu", (processes,)), build(name, method), torch.device("cpu")
    sharding.init_device_mesh = lambda *_: mesh  # it needs values
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(model, method)
        sharding.shard_model(model, cpu, training=True, param_dtype=torch.bfloat16 if method == "full" else None)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
        ids = torch.randint(0, 1000, (1, TOKENS))
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs((ids,))
        with tracker:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(input_ids=ids, logits_to_keep=128).logits.float().sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
    return float(tracker.get_tracker_snapshot("peak")[cpu]["Total"])


def main() -> None:
    """Print the simulated and the planned GiB."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("method", choices=("full", "lora", "qlora"))
    parser.add_argument("processes", type=int)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found = simulate(given.model, given.method, given.processes)
    plan = place_plan(given.model, given.method, Layout(given.processes, sharded=True))
    print(f"{given.model}, {given.method} on {given.processes}: {found / GIB:.2f}, planned {plan.total / GIB:.2f}")


if __name__ == "__main__":
    main()
