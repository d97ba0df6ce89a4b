"""Compare data preparation: from chat rows in a file to encoded, masked, packed examples on disk, with cold caches.

    python benchmarks/preparation.py --rows 100000 --pairs 5 --threads 1 [--deduplicate none|exact|near]

Each tool runs in its own process, in turns (A B A B), with an empty cache: llmtune (rows, then examples, then packs),
and TRL's SFTTrainer (rows read by `datasets`, answers masked by `{% generation %}` marks, best-fit packs) with one
process and with two. The clock starts once libraries and tokenizer are loaded; the seconds of the entire process are
reported too. Afterwards llmtune's process only tokenizes the rendered texts, as an upper bound of the speed. Rows per
CPU second include children. One JSON document goes to stdout.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe_machine
from workload import write_rows

MODEL = "builtin:smollm2-135m-instruct"
PACK = 1024
LONGEST = 8192
"""No row of the workload is longer, so neither tool skips one."""
BATCH = 1000
"""Texts that the tokenizer alone is given at a time."""
TOOLS = ("llmtune", "trl", "trl-2")
ANSWER = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED_ANSWER = (
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)
"""A message in SmolLM2's template, and the same with TRL's marks around the supervised text."""


def main() -> int:
    asked = read_arguments()
    if asked.tool:
        print(json.dumps(RUNNERS[asked.tool](asked.file, asked)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = write_rows(Path(folder) / "rows.jsonl", asked.rows, asked.seed)
        runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
        for pair in range(asked.pairs):
            for tool in TOOLS:
                runs[tool].append(run_apart(tool, file, asked))
                print(f"pair {pair + 1}: {tool} {runs[tool][-1]}", file=sys.stderr)
    found = {"rows": asked.rows, "threads": asked.threads, **summarise(runs), "machine": describe_machine()}
    print(json.dumps(found, indent=2))
    return 0


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deduplicate", choices=("none", "exact", "near"), default="none", help="TRL does none")
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(tool: str, file: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Run one tool in a new process with an empty folder as its place for caches and results."""
    settings = ["--threads", str(asked.threads), "--seed", str(asked.seed), "--deduplicate", asked.deduplicate]
    command = [sys.executable, __file__, "--tool", tool, "--file", str(file.resolve()), *settings]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    surroundings = {**os.environ, **dict.fromkeys(names, str(asked.threads)), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        surroundings["HF_DATASETS_CACHE"] = folder
        began = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=surroundings, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - began
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "process_seconds": round(seconds - found.pop("aside_seconds", 0.0), 2)}


def measure(work: Callable[[], int]) -> dict[str, Any]:
    """Return rows per processor-second, children counted, and seconds of `work`, which returns its rows."""
    before, began = processor_seconds(), time.monotonic()
    rows = work()
    seconds, spent = time.monotonic() - began, processor_seconds() - before
    return {"rows": rows, "rows_per_cpu_s": round(rows / spent), "cpu_s": round(spent, 2), "seconds": round(seconds, 2)}


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run_llmtune(file: Path, asked: argparse.Namespace) -> dict[str, Any]:
    from llmtune.store.process_environment import gc_paused

    with gc_paused():  # as the command line does
        from rich.console import Console

        from llmtune.data.examples import ExampleReader, encode_rows
        from llmtune.data.preparation import prepare_rows
        from llmtune.data.row_store import iterate_rows
        from llmtune.model.processor import load_processor
        from llmtune.model.resolve import resolve_model
        from llmtune.recipe.schema import Recipe
        from llmtune.tasks.registry import get_task
        from llmtune.train.batch_plan import best_fit

    data = {"train": str(file), "validation": 0, "test": 0, "deduplicate": asked.deduplicate, "max_length": LONGEST}
    stated = {"recipe_version": 1, "name": "preparation", "task": "chat", "data": data, "model": {"name": MODEL}}
    recipe, console = Recipe.model_validate(stated), Console(file=io.StringIO())
    processor = load_processor(resolve_model(MODEL, recipe.model, console, True), recipe.model)
    folder = Path.cwd()
    lengths: list[Any] = []

    def work() -> int:
        rows = prepare_rows(recipe, folder / "rows", console)
        examples = encode_rows(rows, get_task("chat"), processor, recipe, folder / "examples", console)
        lengths.append(ExampleReader(examples, "train").lengths)
        best_fit(lengths[0], PACK)
        return rows.rows_in

    found = measure(work)
    began = time.monotonic()
    rows = [row["messages"] for _, row in iterate_rows(load(folder / "rows"), "train")]
    texts = processor.apply_chat_template(rows, tokenize=False)
    backend: Any = processor.backend_tokenizer

    def read() -> int:
        for first in range(0, len(texts), BATCH):
            backend.encode_batch_fast(texts[first : first + BATCH], add_special_tokens=False)
        return len(texts)

    alone = measure(read)
    found["tokens"] = int(lengths[0].sum())
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokenizer = {f"tokenizer_{name}": alone[name] for name in ("rows_per_cpu_s", "cpu_s", "seconds")}
    return {**found, **tokenizer, "aside_seconds": time.monotonic() - began}


def load(folder: Path) -> Any:
    from llmtune.data.row_store import load_rows

    return load_rows(folder)


def run_trl(file: Path, asked: argparse.Namespace, processes: int | None = None) -> dict[str, Any]:
    import torch
    from datasets import disable_progress_bars, load_dataset
    from rich.console import Console
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from llmtune.model.resolve import resolve_model
    from llmtune.recipe.model_section import ModelSection

    torch.set_num_threads(asked.threads)
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(
        resolve_model(MODEL, ModelSection(name=MODEL), Console(stderr=True), True).path
    )
    assert ANSWER in tokenizer.chat_template, "the template is no longer the one that is marked here"
    tokenizer.chat_template = tokenizer.chat_template.replace(ANSWER, MARKED_ANSWER)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    shape = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=1, num_key_value_heads=1, **size)
    model = LlamaForCausalLM(shape)  # of no weight: the trainer prepares rows when it is made, and wants a model
    settings = SFTConfig(
        output_dir="trl",
        packing=True,
        packing_strategy="bfd",
        max_length=PACK,
        assistant_only_loss=True,
        dataset_num_proc=processes,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    tokens: list[int] = []

    def work() -> int:
        rows = load_dataset("json", data_files=str(file), split="train")
        trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
        tokens.append(sum(sum(sizes) for sizes in trainer.train_dataset.with_format(None)["seq_lengths"]))
        return len(rows)

    return {**measure(work), "tokens": tokens[0]}


def run_trl_on_two(file: Path, asked: argparse.Namespace) -> dict[str, Any]:
    return run_trl(file, asked, processes=2)


RUNNERS = {"llmtune": run_llmtune, "trl": run_trl, "trl-2": run_trl_on_two}


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians of each tool, and the medians of llmtune's ratios to the others in the same pair."""
    names = ("rows_per_cpu_s", "seconds", "process_seconds", "tokens", "peak_bytes", "tokenizer_rows_per_cpu_s")
    medians = {
        tool: {name: statistics.median(run[name] for run in found) for name in names if name in found[0]}
        for tool, found in runs.items()
    }
    ratios: dict[str, float] = {}
    for tool in TOOLS[1:]:
        pairs = list(zip(runs["llmtune"], runs[tool], strict=True))
        ratios[f"rows per cpu-s, against {tool}"] = middle(
            [a["rows_per_cpu_s"] / b["rows_per_cpu_s"] for a, b in pairs]
        )
        ratios[f"seconds, {tool} against llmtune"] = middle([b["seconds"] / a["seconds"] for a, b in pairs])
    shares = [run["rows_per_cpu_s"] / run["tokenizer_rows_per_cpu_s"] for run in runs["llmtune"]]
    ratios["rows per cpu-s, against the tokenizer alone"] = middle(shares)
    return {"medians": medians, "ratios": ratios, "runs": runs}


def middle(values: list[float]) -> float:
    return round(statistics.median(values), 2)


if __name__ == "__main__":
    sys.exit(main())
