"""Take the same steps with every method in one process, in two with ddp, and in two with fsdp, and compare them.

`cd tests; python -m support.sharding_table` writes the table of docs/scale-methods.md.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmtune.launch.topology import Topology, why_not
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.peft_options import REFUSED_METHODS
from support.adapting import build_family, quiet
from support.method_table import CHATS, METHODS, SMALL
from support.models import build_llama
from support.pairs import LIKED, recipe_of
from support.training import launch_work

PAGE = Path(__file__).parents[2] / "docs/scale-methods.md"
MARKS = ("<!-- table: made by `cd tests; python -m support.sharding_table` -->", "<!-- end of table -->")
LAYOUTS = {"one process": Topology(), "ddp, 2": Topology(2, "ddp"), "fsdp, 2": Topology(2, "fsdp")}
OFFLOADED = Topology(2, "fsdp", offload_params=True)
SAME = 1e-5
"""Relative difference of losses in float32 that counts as equal."""
FULL: dict[str, Any] = {"method": "full", "r": None, "lora_alpha": None}
EXPERTS = {"target_parameters": ["gate_up_proj", "down_proj"]}
MOE = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
OPTIMIZERS = (
    *("adamw_torch_fused", "adamw_8bit", "adafactor", "muon", "lion_32bit", "lion_8bit", "ademamix", "ademamix_8bit"),
    *("adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "sgd"),
)
NOISE = "each process draws its own noise"
PAGED = "paged optimisers need a GPU"
NO_SHARDS = "refused: ddp has no shards to offload"
MUON = "Muon's Newton-Schulz steps are in bfloat16, which enlarges differences in the last digits"
ENLARGED = "the first update enlarges differences in the last digits: sums have another order"
UNEQUAL = {"NEFTune": NOISE, "`optim: muon`": MUON, "`optim: muon`, lora": MUON}
"""Why cases differ; others differ by ENLARGED."""


def method(name: str, **options: Any) -> dict[str, Any]:
    """Return the sections of a PEFT method with the small sizes of the other table."""
    small = SMALL.get(name, {})
    return {"adapter": {"method": name, "r": None, "lora_alpha": None, **small, **options}}


def optimizer(name: str, **train: Any) -> dict[str, Any]:
    return {"adapter": FULL, "train": {"optim": name, **train}}


CASES: dict[str, dict[str, Any]] = {
    "full": {"adapter": FULL},
    "lora": method("lora"),
    "qlora": method("qlora"),
    "qlora, `bnb_4bit_use_double_quant: false`": method("qlora", bnb_4bit_use_double_quant=False),
    "qlora, `use_dora`": method("qlora", use_dora=True),
    "lora on experts": {"moe": True, **method("lora", **EXPERTS)},
    "qlora on experts": {"moe": True, **method("qlora", **EXPERTS)},
    "lora, `use_dora`": method("lora", use_dora=True),
    "lora, `use_rslora`": method("lora", use_rslora=True),
    "lora, `modules_to_save`": method("lora", modules_to_save=["norm"]),
    **{
        f"lora, `{start}`": method("lora", init_lora_weights=start)
        for start in ("pissa", "olora", "eva", "corda", "lora_ga")
    },
    **{name: method(name) for name in METHODS if name not in ("lora", "qlora", *REFUSED_METHODS)},
    "lora, dpo": {"preference": {"loss": "dpo"}, **method("lora")},
    "full, dpo": {"preference": {"loss": "dpo"}, "adapter": FULL},
    "`loraplus_lr_ratio`": {"train": {"loraplus_lr_ratio": 16.0}, **method("lora")},
    "`gradient_checkpointing`": {"train": {"gradient_checkpointing": True}, "adapter": FULL},
    "`gradient_checkpointing`, qlora": {"train": {"gradient_checkpointing": True}, **method("qlora")},
    "`torch_compile`": {"train": {"torch_compile": True}, **method("lora")},
    "`torch_compile`, qlora": {"train": {"torch_compile": True}, **method("qlora")},
    "NEFTune": {"train": {"neftune_noise_alpha": 5.0}, **method("lora")},
    **{f"`optim: {name}`": optimizer(name) for name in OPTIMIZERS},
    "`optim: muon`, lora": {"train": {"optim": "muon"}, **method("lora")},
    **{
        f"`optim: {name}`": optimizer(name, lr_scheduler_type="constant")
        for name in ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd")
    },
    **{
        f"{name}, `--fsdp-offload-params`": {"offloads": True, **sections}
        for name, sections in {
            "full": {"adapter": FULL},
            "lora": method("lora"),
            "qlora": method("qlora"),
            "`optim: adafactor`": optimizer("adafactor"),
        }.items()
    },
    **{f"`optim: {name}`": optimizer(name) for name in ("paged_adamw_8bit", "galore_adamw", "apollo_adamw")},
}


Cells = dict[str, dict[str, str]]


def slug(name: str) -> str:
    """Return the name of a case's folder."""
    return re.sub(r"\W+", "-", name).strip("-")


def measure(folder: Path, names: Iterable[str] = tuple(CASES), layouts: Iterable[str] = tuple(LAYOUTS)) -> Cells:
    """Return the cells of the table, by case and layout; the first layout is one process."""
    build_llama(folder / "llama")
    build_family(folder / "moe", "qwen3_moe", **MOE)
    found = {layout: learn(folder, layout, names) for layout in layouts}
    return {name: {layout: _compare(found, name, layout) for layout in found} for name in names}


def learn(folder: Path, layout: str, names: Iterable[str]) -> dict[str, list[list[float]] | str]:
    """Return the losses of the first steps of each case in a layout, or why it is refused or fails."""
    found: dict[str, list[list[float]] | str] = {}
    for offloads in (False, True):
        topology, place = OFFLOADED if offloads else LAYOUTS[layout], folder / slug(layout) / f"offloads-{offloads}"
        own = [name for name in names if (layout == "fsdp, 2" and bool(CASES[name].get("offloads"))) == offloads]
        for name in own:
            if CASES[name].get("offloads") and layout == "ddp, 2":
                found[name] = NO_SHARDS
                continue
            sections = {key: value for key, value in CASES[name].items() if key not in ("moe", "offloads")}
            task, rows = ("preference", LIKED) if "preference" in sections else ("chat", CHATS)
            model = folder / ("moe" if CASES[name].get("moe") else "llama")
            path = recipe_of(place / slug(name), model, rows[:24], task, **sections)
            recipe = load_recipe(str(path)).recipe
            problems = [problem.what for problem in why_not(topology.strategy, recipe)]
            if problems or recipe.train.optim.startswith("paged"):
                found[name] = f"refused: {[*problems, PAGED][0]}"
                path.unlink()
        learned = launch_work("learn_methods", [place, topology.strategy], topology, quiet(), 2) if own else {}
        found |= {name: learned[slug(name)] for name in own if name not in found}
    return found


def _compare(found: Mapping[str, dict[str, list[list[float]] | str]], name: str, layout: str) -> str:
    """Return the largest relative difference of the losses, as `equal` if it is small, or what failed."""
    one, other = found["one process"][name], found[layout][name]
    if isinstance(other, str):
        return other if other.startswith("refused") else f"fails: {other}"
    if isinstance(one, str):
        return f"fails: {one}"
    pairs = zip(one, other, strict=True)
    apart = [abs(there[0] - here[0]) / max(1e-9, abs(here[0])) for here, there in pairs]
    first = "differs by" if apart[0] > SAME else "equal at first, then"
    return "equal" if max(apart) <= SAME else f"{first} {max(apart):.0e}"


def write_page(cells: Cells) -> str:
    """Return the table as Markdown, with the reasons below it."""
    reasons: list[str] = []

    def note(reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return f"[{reasons.index(reason) + 1}]"

    def cell(name: str, text: str) -> str:
        if text == "equal":
            return text
        if not text.startswith("refused"):
            return f"{text} {note(UNEQUAL.get(name, ENLARGED))}" if not text.startswith("fails") else text
        return f"refused {note(text.removeprefix('refused: '))}"

    shown = [layout for layout in LAYOUTS if layout != "one process"]
    lines = [f"| method | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(cell(name, found[layout]) for layout in shown)} |" for name, found in cells.items()
    ]
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def main() -> None:
    """Measure all cells and write the table into the page."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as place:
        found = measure(Path(place), sys.argv[1:] or tuple(CASES))
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{write_page(found)}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main()
