"""Functions that launched processes run in tests: `python -m support.workers RESULT FUNCTION ARGUMENT...`.

Errors end them as they end a command; the result of rank 0 is written to the file RESULT.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import typer

from llmtune.cli.app import _report_bug
from llmtune.cli.output_streams import handled_by_all
from llmtune.errors import DataError, GateFailed, LostProcess, Problem
from llmtune.store.processes import _here, join, leave, once, rank, start, world_size


def main() -> None:
    """Run the function named in the arguments."""
    start()
    sys.excepthook = _report_bug
    result, name, *words = sys.argv[1:]

    def work() -> None:
        value = globals()[name](*words)
        if rank() == 0:
            Path(result).write_text(json.dumps(value))

    code = 1
    try:
        handled_by_all(work)()
        code = 0
    except typer.Exit as end:
        code = end.exit_code
        sys.exit(code)
    finally:
        leave(code)


def train_tiny(folder: str, run: str, strategy: str = "ddp") -> dict[str, float]:
    """Train as `support.training` does, from a recipe and examples that the test left in `folder`."""
    from rich.console import Console

    from llmtune.recipe.loader import load_recipe
    from support.training import read_examples, run_training

    recipe = load_recipe(str(Path(folder) / "recipe.yaml")).recipe
    console = Console(file=sys.stderr, width=200)
    examples = read_examples(Path(folder) / "examples")
    trained = run_training(
        Path(run), recipe, examples, console=console, sharded=strategy == "fsdp" and world_size() > 1
    )
    return {"steps": trained.steps, "train_loss": trained.train_loss}


def share_tiny(folder: str) -> dict[str, bool]:
    """Make the model of the recipe in `folder` in the first process only, shard it, and gather it again."""
    import torch
    from accelerate.utils import gather_object
    from torch.distributed.tensor import DTensor

    from llmtune.recipe.loader import load_recipe
    from llmtune.train.distributed import join_processes
    from llmtune.train.sharding import shard_model, share_model, whole_state
    from support.training import adapt

    join_processes("cpu")
    first = os.environ["RANK"] == "0"
    recipe = load_recipe(str(Path(folder) / "recipe.yaml")).recipe

    def make() -> object:
        assert first, "the others read nothing"
        return adapt(recipe)

    model = share_model(make).model
    without = all(parameter.is_meta for parameter in model.parameters())
    shard_model(model, torch.device("cpu"))
    right = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    alone = adapt(recipe).model
    buffers = dict(model.named_buffers())
    tied = (alone.get_input_embeddings().weight is alone.get_output_embeddings().weight) == (
        model.get_input_embeddings().weight is model.get_output_embeddings().weight
    )
    same = all(torch.equal(buffers[name], buffer) for name, buffer in alone.named_buffers())
    found = gather_object([{"without": without != first, "tied": tied, "buffers": same, "cut": right}])
    whole = whole_state(model, trained_only=False)
    numbers = not first or all(torch.equal(whole[name], value) for name, value in alone.state_dict().items())
    return {"numbers": numbers, **{name: all(one[name] for one in found) for name in found[0]}}


def shard_packed(folder: str) -> dict[str, object]:
    """Shard the 4-bit model of the recipe in `folder`; return its unsharded weights, and whether first losses agree."""
    import torch
    from accelerate.utils import gather_object
    from torch.distributed.tensor import DTensor

    from llmtune.model.sharded_quantization import ShardableLinear4bit
    from llmtune.recipe.loader import load_recipe
    from llmtune.train.distributed import join_processes
    from llmtune.train.sharding import shard_model, share_model
    from support.training import adapt

    join_processes("cpu")
    recipe = load_recipe(str(Path(folder) / "recipe.yaml")).recipe
    alone, model = adapt(recipe).model, share_model(lambda: adapt(recipe)).model
    ids = torch.arange(5, 45)[None]
    before = float(alone(input_ids=ids, labels=ids, use_cache=False).loss)
    shard_model(model, torch.device("cpu"))
    packed = [module.weight for module in model.modules() if isinstance(module, ShardableLinear4bit)]
    packed += [one for name, one in model.named_parameters() if name.endswith(("_packed", "_absmax"))]
    uncut = [name for name, one in model.named_parameters() if not isinstance(one, DTensor) and one.stride(0)]
    own = sum(one.to_local().numel() for one in packed)
    shares = gather_object([own / sum(one.numel() for one in packed)])
    after = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    return {
        "storage": sorted({str(one.dtype).removeprefix("torch.") for one in packed} - {"uint8"}),
        "uncut": uncut,
        "loss": abs(after - before) < 1e-5 * before,
        "share": abs(sum(shares) - 1) < 1e-9 and max(shares) < 1.1 / len(shares),
    }


def gather_layers(folder: str) -> dict[str, object]:
    """Take the gradient of a sharded model of 16-bit products; return its dtypes, and the loss there and alone."""
    import torch

    from llmtune.adapter.reference_model import own_part
    from llmtune.recipe.loader import load_recipe
    from llmtune.train.distributed import join_processes
    from llmtune.train.sharding import shard_model, share_model
    from support.training import adapt

    join_processes("cpu")
    recipe = load_recipe(str(Path(folder) / "recipe.yaml")).recipe
    alone, model = adapt(recipe).model, share_model(lambda: adapt(recipe)).model
    shard_model(model, torch.device("cpu"), training=True, param_dtype=torch.bfloat16)
    layer, found = model.model.layers[0].mlp.up_proj, {}
    found["shards"] = own_part(layer.weight).dtype
    layer.register_forward_pre_hook(lambda module, inputs: found.update(computes=module.weight.dtype))
    ids = torch.arange(5, 45)[None]
    with torch.autocast("cpu", torch.bfloat16):
        losses = [one(input_ids=ids, labels=ids, use_cache=False).loss for one in (alone, model)]
    losses[1].backward()
    found["gradients"] = own_part(layer.weight.grad).dtype
    names = {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}
    return names | {"alone": float(losses[0]), "loss": float(losses[1])}


def measure_training(folder: str, run: str, strategy: str) -> list[int]:
    """Train as `train_tiny` does; return the highest resident memory of each process, without that of libraries."""
    import psutil
    from accelerate.utils import gather_object

    import support.training  # noqa: F401
    from llmtune.store.machine import Meter
    from llmtune.train.distributed import join_processes

    join_processes("cpu")
    libraries, meter = psutil.Process().memory_info().rss, Meter()
    train_tiny(folder, run, strategy)
    return list(gather_object([meter.peak_bytes - libraries]))


def learn_all(folder: str, strategy: str) -> dict[str, list[list[float]]]:
    """Take the first steps of every recipe that the test left in `folder`; return their losses and gradient norms."""
    from support.pairs import learn_a_little

    found = {}
    for path in sorted(Path(folder).glob("*/recipe.yaml")):
        found[path.parent.name] = learn_a_little(path, strategy == "fsdp")
    return found


def evaluate_all(folder: str) -> dict[str, str]:
    """Score every trained run that the test left in `folder` again; return how its models were divided, by name."""
    from torch.distributed.fsdp import FSDPModule

    from llmtune import run_models
    from llmtune.model.tensor_parallel import is_split
    from llmtune.pipeline import run_pipeline
    from llmtune.recipe.loader import load_recipe
    from llmtune.store.run_request import RunRequest
    from support.adapting import quiet

    divide, ways, found = run_models.Models._shard, set[str](), {}

    def note(self: Any, make: Any) -> Any:
        made = divide(self, make)
        ways.add("split" if is_split(made.model) else "sharded" if isinstance(made.model, FSDPModule) else "complete")
        return made

    run_models.Models._shard = note  # type: ignore[assignment, method-assign]
    for path in sorted(Path(folder).glob("*/recipe.yaml")):
        ways.clear()
        run_pipeline(load_recipe(str(path)), RunRequest(out=path.parent / "run", until="evaluate"), quiet())
        found[path.parent.name] = " and ".join(sorted(ways))
    return found


def run_own_passes(folder: str) -> dict[str, object]:
    """Run different passes of one sharded model in each process; compare their results with the unsharded model's."""
    import torch
    from accelerate.utils import gather_object
    from transformers import AutoModelForCausalLM

    from llmtune.model.layer_requests import own_passes
    from llmtune.train.distributed import join_processes
    from llmtune.train.sharding import shard_model

    count = join_processes("cpu")
    alone, model = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    shard_model(model, torch.device("cpu"))
    layers, rank = model.get_submodule("model.layers"), int(os.environ["RANK"])
    ids = [torch.arange(4, 9 + i)[None] for i in range(4)]

    def equal(find: Callable[[Any], torch.Tensor], mode: Any = torch.no_grad) -> bool:
        with mode():
            return torch.allclose(find(model), find(alone), atol=1e-6)

    def fail(*_: object) -> None:
        raise ValueError("refused")

    found = {
        "sharded": layers[0].mlp.up_proj.weight.to_local().numel() * count
        == alone.model.layers[0].mlp.up_proj.weight.numel()
    }
    with own_passes(model):
        found["modes"] = all(
            equal(lambda one: one(ids[0]).logits, mode) for mode in (torch.inference_mode, torch.no_grad)
        )
    with own_passes(model):  # the first process runs none
        found["unequal numbers"] = all(equal(lambda one, i=i: one(ids[i]).logits) for i in range(2 * rank))
    with own_passes(model):
        if rank == 0:
            found["parts"] = equal(lambda one: one.model(ids[0]).last_hidden_state)
            found["generated"] = equal(lambda one: one.generate(ids[1], max_new_tokens=5, do_sample=False).float())
        else:
            found["parts"] = equal(lambda one: one.lm_head(one.model.embed_tokens(ids[2])))
            found["generated"] = equal(lambda one: one.generate(ids[2], max_new_tokens=3, num_beams=2).float())
    with own_passes(model):
        if rank == 1:  # a pass that ends in the middle, as one that runs out of memory
            hook = layers[1].register_forward_pre_hook(fail)
            with suppress(ValueError):
                model(ids[0])
            hook.remove()
        found["after a refusal"] = equal(lambda one: one(ids[rank]).logits)
    try:
        with own_passes(model):
            if rank == 1:
                raise ValueError("mine")
            model(ids[0])
    except (ValueError, LostProcess) as error:
        found["ended"] = ("mine" if rank == 1 else "process 1 stopped") in str(error)
    found["same passes"] = equal(lambda one: one(ids[0]).logits)
    found["resharded"] = all(type(one).__name__ == "DTensor" for one in model.parameters())
    with own_passes(model):
        if rank == 1:
            model(ids[0])
    for one in (model, alone):
        one(ids[1], labels=ids[1]).loss.backward()
    whole, own = alone.model.layers[0].mlp.up_proj.weight.grad, layers[0].mlp.up_proj.weight.grad
    found["trained between"] = torch.allclose(own.full_tensor(), whole, atol=1e-6)
    everywhere = gather_object([found])
    return {name: all(one[name] for one in everywhere) for name in found}


def split_models(folder: str) -> dict[str, object]:
    """Split each model and adapter in `folder`; return whether all processes answer as one, and their largest share."""
    import torch
    from accelerate.utils import gather_object
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llmtune.adapter.fused_lora import fuse_products
    from llmtune.adapter.reference_model import own_part
    from llmtune.evaluate.greedy_decoding import decode_greedily
    from llmtune.model.causal_lm_loss import unwrap
    from llmtune.model.tensor_parallel import is_split, split_model, why_unsplit
    from llmtune.train.distributed import join_processes
    from llmtune.train.sharding import shard_model, share_model

    join_processes("cpu")
    ids, prompts = torch.arange(4, 24).view(2, -1), [[4, 5, 6, *range(7, 8 + i)] for i in range(5)]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ways: list[dict[str, object]] = [{}, {"num_beams": 3}, {"do_sample": True}]

    def make(path: Path, tuned: bool) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        if tuned:
            model = PeftModel.from_pretrained(model, path / "adapter").eval()
            fuse_products(model)
        return SimpleNamespace(model=model)

    def answers(model: Any) -> list[Any]:
        found = [decode_greedily(model, prompts, 8, {9}, "cpu")]
        for way in ways:
            torch.manual_seed(7)
            options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **way}
            found.append(model.generate(input_ids=ids, **options).tolist())
        return found

    def held(model: torch.nn.Module) -> int:
        return sum(own_part(one).numel() for one in model.parameters())

    found: dict[str, list[object]] = {}
    for path in sorted(Path(folder).iterdir()):
        for tuned in (False, True):
            alone, model = make(path, tuned).model, share_model(partial(make, path, tuned)).model
            assert why_unsplit(model) is None
            with torch.inference_mode():
                is_same = split_model(model, torch.device("cpu")) and is_split(model)
                is_same &= torch.allclose(model(ids).logits, alone(ids).logits, atol=1e-5)
                is_same &= answers(model) == answers(alone)
                if tuned:
                    with model.disable_adapter(), alone.disable_adapter():
                        is_same &= torch.allclose(model(ids).logits, alone(ids).logits, atol=1e-5)
            found[f"{path.name}, {'adapter' if tuned else 'base'}"] = [is_same, held(model) / held(alone)]
    alone, model = make(path, True).model, share_model(partial(make, path, True)).model
    unwrap(model).tp_plan = {**unwrap(model).tp_plan, "model.layers.*.mlp": "all_reduce"}
    is_split_now = split_model(model, torch.device("cpu"))
    shard_model(model, torch.device("cpu"))
    with torch.no_grad():
        is_same = torch.allclose(model(ids).logits, alone(ids).logits, atol=1e-5)
    found["wrong plan"] = [is_same and not is_split_now, 0.0]
    everywhere = gather_object([found])
    return {name: [all(one[name][0] for one in everywhere), max(one[name][1] for one in everywhere)] for name in found}


def measure_pipeline(recipe: str, out: str, until: str) -> list[list[int]]:
    """Run a recipe; return the most resident memory of each process, all and without files, beyond its libraries'."""
    import psutil
    import transformers.models.llama.modeling_llama  # noqa: F401
    from accelerate.utils import gather_object

    from llmtune.pipeline import run_pipeline
    from llmtune.recipe.loader import load_recipe
    from llmtune.store.machine import Meter
    from llmtune.store.run_request import RunRequest
    from llmtune.train.distributed import join_processes
    from support.adapting import quiet

    join_processes("cpu")
    process, seen, done = psutil.Process(), list[int](), threading.Event()

    def own() -> int:
        used = process.memory_info()
        return int(used.rss - used.shared)

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(own())

    libraries, before, meter = process.memory_info().rss, own(), Meter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    run_pipeline(load_recipe(recipe), RunRequest(out=Path(out), until=until), quiet())
    done.set()
    watcher.join()
    peaks = [meter.peak_bytes - libraries, max(seen) - before]
    return list(gather_object([peaks])) if world_size() > 1 else [peaks]


def run_and_die(recipe: str, out: str, rank_to_kill: str, event: str, text: str) -> bool:
    """Run a recipe; one process is killed soon after its `event` with this text: a line, or one of Python's audit."""
    from torch import distributed

    from llmtune.pipeline import run_pipeline
    from llmtune.recipe.loader import load_recipe
    from llmtune.store.run_request import RunRequest
    from support.adapting import quiet
    from support.process import Watched, kill_at

    console = quiet()
    if str(rank()) == rank_to_kill and event != "line":
        sys.addaudithook(lambda name, given: kill_at(name, given, event, text))
    elif str(rank()) == rank_to_kill:
        sums, add = [0], distributed.all_reduce

        def count(*args: Any, **kwargs: Any) -> Any:
            sums[0] += 1
            if sums[0] == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return add(*args, **kwargs)

        console.file = Watched(text, lambda: setattr(distributed, "all_reduce", count))
    run_pipeline(load_recipe(recipe), RunRequest(out=Path(out)), console)
    return True


def run_out_of_memory(folder: str, strategy: str) -> list[str]:
    """Take a step in which only rank 1 runs out of memory, in its second pass without a graph; name the errors."""
    import torch
    from accelerate.utils import gather_object

    from llmtune.tasks.embed import Embed
    from llmtune.train.accumulation import MicroBatchTooLarge
    from support.pairs import learn_a_little

    features, passes = Embed.features, []

    def fail(self: object, model: object, batch: object) -> object:
        passes.append(batch)
        if rank() == 1 and len(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return features(self, model, batch)

    Embed.features = fail
    try:
        learn_a_little(Path(folder) / "recipe.yaml", strategy == "fsdp")
        name = "none"
    except MicroBatchTooLarge as error:
        if error.alone:
            raise DataError.of("rank 1 is out of memory alone") from None
        name = type(error).__name__
    return list(gather_object([name]))


def learn_methods(folder: str, strategy: str) -> dict[str, list[list[float]] | str]:
    """Do the same, and return the error of a recipe that fails."""
    from support.pairs import learn_a_little

    found: dict[str, list[list[float]] | str] = {}
    for path in sorted(Path(folder).glob("*/recipe.yaml")):
        began = time.perf_counter()
        try:
            found[path.parent.name] = learn_a_little(path, strategy == "fsdp", mode=True)
        except Exception as error:  # noqa: BLE001 - it is one cell of a table
            found[path.parent.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            traceback.print_exc()
        print(path.parent.name, round(time.perf_counter() - began, 1), file=sys.stderr, flush=True)
    return found


def write_and_wait(folder: str, run: str) -> None:
    """Write a file once both processes run, and keep running for longer than any test."""
    (Path(folder) / os.environ["RANK"]).touch()
    while not all((Path(folder) / rank).exists() for rank in "01"):
        time.sleep(0.01)
    Path(run).mkdir(exist_ok=True)
    (Path(run) / "metrics.jsonl").write_text("{}\n" * 500)
    time.sleep(600)


def succeed(*words: str) -> dict[str, object]:
    """Return the processes and environment as rank 0 sees them."""
    return {"heard": list(words), "world": world_size(), "threads": os.environ["OMP_NUM_THREADS"]}


def name_listeners() -> dict[str, object]:
    """Return the addresses at which rank 0 listens."""
    join()
    connections = psutil.Process().net_connections("inet")
    once(lambda: None)
    return {"listening": [one.laddr for one in connections if one.status == psutil.CONN_LISTEN]}


def post_code(folder: str) -> None:
    """Post a malicious pickle in place of rank 0's next message."""
    join()
    if rank() == 0:
        code = b"cos\nsystem\n(S'touch " + folder.encode() + b"/pwned'\ntR."
        _here.store.set(f"{_here.name}/once/1", code)
    else:
        once(lambda: None)
    time.sleep(60)


def agree_on_a_recipe(recipe: str) -> None:
    """Run a recipe that differs in rank 1."""
    from llmtune.launch.python_api import make_console, run_recipe
    from llmtune.store.run_request import RunRequest

    sets = ["train.max_steps=3"] if rank() else []
    run_recipe(recipe, sets, RunRequest(out=Path(recipe).with_name("run"), until="train"), make_console())


def end_rank_one(how: str) -> None:
    """End one process by a user's mistake, a bug, an abort in C or a signal; the other would run for a long time."""
    if os.environ["RANK"] == "1":
        if how == "mistake":
            raise DataError.of("row 7 has no answer", "rows.jsonl:7", "Give it one.")
        if how == "bug":
            raise ZeroDivisionError("a bug")
        if how == "abort":
            print("the disk is on fire", file=sys.stderr)
            os.abort()
        os.kill(os.getpid(), signal.Signals[how])
    time.sleep(60)


def die_between_passes() -> None:
    """Run passes of a split model; the second process is killed after some."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmtune.model.tensor_parallel import split_model
    from llmtune.train.distributed import join_processes

    join_processes("cpu")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    assert split_model(model, torch.device("cpu"))
    with torch.inference_mode():
        for number in range(1_000_000):
            model(torch.ones(1, 8, dtype=torch.int64))
            if rank() and number == 20:
                os.kill(os.getpid(), signal.SIGKILL)


def read_late(how: str) -> str:
    """Share rank 0's result, or its error, which rank 1 reads two seconds after rank 0 has ended."""

    def work() -> str:
        if how == "error":
            raise DataError.of("row 7 has no answer", "rows.jsonl:7", "Give it one.")
        return "done"

    join()
    time.sleep(2 * rank())
    return once(work)


def fail_a_gate() -> None:
    """Fail a gate in every process; rank 0, which alone has the report, is the last to end."""
    join()
    time.sleep(0 if rank() else 2)
    error = GateFailed(Problem(f"a gate failed in rank {rank()}", "loss < base"))
    error.report = None if rank() else {"verdict": "worse"}
    raise error


def node_of(batch: list[int]) -> str:
    """Return the node that works on the batch; nothing in the process that submits it."""
    import ray

    time.sleep(0.1)
    return ray.get_runtime_context().get_node_id() if ray.get_runtime_context().worker.mode == ray.WORKER_MODE else ""


def die_once(marker: Path, here: int, batch: list[int]) -> int:
    """Return the sum of the batch; the first worker other than the process `here` is killed meanwhile."""
    if os.getpid() != here and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return sum(batch)


if __name__ == "__main__":
    main()
