"""LLaMA-Factory: `llamafactory-cli train` and `export` with a configuration file; rows listed in dataset_info.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conformance import adapter
from conformance.adapter import Configuration, Job, NotOffered
from conformance.formats import SHAREGPT, as_conversation, as_sharegpt

adapter.do_without("torchaudio")  # used for recordings only
import llamafactory.train.tuner  # noqa: E402, F401  # imported once, before the processes of the jobs
from llamafactory.cli import main  # noqa: E402

STAGES = {"messages": "sft", "text": "pt", "preference": "dpo", "pictures": "sft"}
TEMPLATES = {"qwen2.5": "qwen", "qwen3": "qwen3", "llama3": "llama3", "gemma3": "gemma3"}
LORA = {"r": "lora_rank", "target_modules": "lora_target", "modules_to_save": "additional_target"}
EXTRA = {"validation": "val_size", "thinking": "enable_thinking", "add_tokens": "add_tokens"}


def configure(job: Job) -> Configuration:
    """Return the configuration file. The documentation names a template for each family of models."""
    job, extra = as_conversation(job), job["extra"]
    if job["kind"] not in STAGES or "gguf" in job["ask"]:
        raise NotOffered(f"no stage for rows of {job['kind']}, or no such export")
    if job["file"] == "parquet":
        raise NotOffered("its rows have calls and tools as JSON text, which a table does not fill with nulls")
    if job["method"] == "prompt_tuning":
        raise NotOffered("no prompt tuning")
    documented, whole = (
        job["column"] == "documented",
        job["train_on"] == "all" and job["kind"] in ("messages", "pictures"),
    )
    family = next((name for name in TEMPLATES if Path(job["model"]).name.startswith(name)), "")
    settings = adapter.trainer_arguments(job) | {
        "stage": STAGES[job["kind"]],
        "do_train": True,
        "overwrite_cache": True,
    }
    settings |= {"cutoff_len": job["max_length"], "finetuning_type": job["method"].removeprefix("q")}
    settings |= {"template": TEMPLATES.get(family) if documented else None, "train_on_prompt": whole or None}
    settings |= {"mask_history": job["train_on"] == "last" or None, "packing": job["packing"]}
    settings |= {"neat_packing": (documented and job["packing"]) or None, "resize_vocab": "add_tokens" in extra or None}
    settings |= {"split_special_tokens": (documented and "split_special_tokens" in extra) or None}
    settings |= {"quantization_bit": 4 if job["method"] == "qlora" else None}
    settings |= {EXTRA[name]: value for name, value in extra.items() if name in EXTRA}
    if "lora" in job["method"]:
        lora = {"r": 4, "lora_alpha": 8, "target_modules": "all", **extra.get("lora", {})}
        settings |= {LORA.get(name, name): value for name, value in lora.items()}
    return {k: ",".join(v) if isinstance(v, list) else v for k, v in adapter.given(settings).items()}


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out, model = Path(job["out"]), f"{job['out']}/model"
    adapter.rewrite(job, as_sharegpt)
    files = adapter.given({"rows": job["rows"], "test": job["test_rows"]})
    entries = {name: SHAREGPT[as_conversation(job)["kind"]] | {"file_name": file} for name, file in files.items()}
    (out / "dataset_info.json").write_text(json.dumps(entries))
    places = {"model_name_or_path": job["model"], "dataset_dir": str(out), "overwrite_output_dir": True}
    settings = places | settings | adapter.given({"resume_from_checkpoint": adapter.checkpoint(job)})
    tested = {"eval_dataset": "test"} if "losses" in job["ask"] and "val_size" not in settings else {}
    run("train", out, settings | tested | {"dataset": "rows", "output_dir": model})
    found = {"model": model, "merged": f"{out}/merged", **adapter.read_losses(Path(model))}
    kept = {name: settings[name] for name in ("model_name_or_path", "template") if name in settings}
    if "merged" in job["ask"]:
        run("export", out, kept | {"adapter_name_or_path": model, "export_dir": f"{out}/merged"})
    if "answers" in job["ask"]:
        kept |= {
            "stage": "sft",
            "do_predict": True,
            "predict_with_generate": True,
            "eval_dataset": "test",
            "use_cpu": True,
        }
        kept |= {"max_new_tokens": job["ask"]["answers"], "do_sample": False, "per_device_eval_batch_size": 4}
        run("train", out, kept | places | {"model_name_or_path": model, "output_dir": f"{out}/answers"})
        found["answers"] = [
            row["predict"] for row in adapter.read_lines(out / "answers" / "generated_predictions.jsonl")
        ]
    return found


def run(command: str, folder: Path, settings: Configuration) -> None:
    (folder / f"{command}.yaml").write_text(json.dumps(settings))  # JSON is YAML
    adapter.call(main, "llamafactory-cli", command, str(folder / f"{command}.yaml"))


if __name__ == "__main__":
    adapter.serve("llamafactory", configure, train)
