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
LAYOUTS = {
    "one process": Topology(),
    "ddp, 2": Topology(2, "ddp"),
    "fsdp, 2": Topology(2, "fsdp"),
    "fsdp, 2, offloaded": Topology(2, "fsdp", offload_params=True),
}
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
MUON = (
    "Muon's Newton-Schulz steps are in bfloat16, which enlarges differences in the last digits; the first loss is equal"
)
UNEQUAL = {"NEFTune": NOISE, "`optim: muon`": MUON, "`optim: muon`, lora": MUON}
"""Cases that differ by design, each with the reason."""


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
    **{f"`optim: {name}`": optimizer(name) for name in ("paged_adamw_8bit", "galore_adamw", "apollo_adamw")},
}


def slug(name: str) -> str:
    """Return the name of a case's folder."""
    return re.sub(r"\W+", "-", name).strip("-")


def measure(folder: Path, names: Iterable[str] = tuple(CASES)) -> dict[str, dict[str, str]]:
    """Return the cells of the table, by case and layout."""
    llama, moe = build_llama(folder / "llama"), build_family(folder / "moe", "qwen3_moe", **MOE)
    refused: dict[str, dict[str, str]] = {name: {} for name in names}
    numbers: dict[str, dict[str, list[list[float]] | str]] = {}
    for layout, topology in LAYOUTS.items():
        place = folder / slug(layout)
        for name in names:
            sections = dict(CASES[name])
            task, rows = ("preference", LIKED) if "preference" in sections else ("chat", CHATS)
            model = moe if sections.pop("moe", False) else llama
            path = recipe_of(place / slug(name), model, rows[:24], task, **sections)
            recipe = load_recipe(str(path)).recipe
            problems = [problem.what for problem in why_not(topology.strategy, recipe)]
            if problems or recipe.train.optim.startswith("paged"):
                refused[name][layout] = [*problems, PAGED][0]
                path.unlink()
        numbers[layout] = launch_work("learn_methods", [place, topology.strategy], topology, quiet(), 2)
        print(layout, numbers[layout], flush=True)
    alone = numbers["one process"]
    return {
        name: {
            layout: refused[name].get(layout) or _compare(alone[slug(name)], numbers[layout][slug(name)])
            for layout in LAYOUTS
        }
        for name in names
    }


def _compare(one: list[list[float]] | str, other: list[list[float]] | str) -> str:
    """Return the largest relative difference of the losses, as `equal` if it is small, or what failed."""
    if isinstance(one, str) or isinstance(other, str):
        return f"fails: {one if isinstance(one, str) else other}"
    pairs = zip(one, other, strict=True)
    apart = max(abs(there[0] - here[0]) / max(1e-9, abs(here[0])) for here, there in pairs)
    return "equal" if apart <= SAME else f"differs by {apart:.1e}"


def write_page(cells: Mapping[str, Mapping[str, str]]) -> str:
    """Return the table as Markdown, with the reasons below it."""
    reasons: list[str] = []

    def note(reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return f"[{reasons.index(reason) + 1}]"

    def cell(name: str, text: str) -> str:
        if text == "equal":
            return text
        if text.startswith(("differs", "fails")):
            return f"{text} {note(UNEQUAL[name])}" if name in UNEQUAL else text
        return f"refused {note(text)}"

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
