"""LLaMA-Factory: `llamafactory-cli train` with a configuration file, and rows listed in dataset_info.json."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from conformance.adapter import Configuration, Job, NotOffered, evaluation, isolated, read_losses, rewrite, serve
from conformance.formats import SHAREGPT, as_conversation, as_sharegpt

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):  # it is built for CUDA; LLaMA-Factory uses it for recordings only
    sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))
import llamafactory.train.tuner  # noqa: F401  # imported once, before the processes of the jobs
from llamafactory.cli import main

STAGES = {"messages": "sft", "text": "pt", "preference": "dpo"}
TEMPLATES = {"qwen2.5": "qwen", "qwen3": "qwen3", "llama3": "llama3"}
LORA = {"r": "lora_rank", "target_modules": "lora_target", "modules_to_save": "additional_target"}


def configure(job: Job) -> Configuration:
    """Return the configuration file. The documentation names a template for each family of models."""
    job = as_conversation(job)
    if job["kind"] not in STAGES or job["ask"].keys() & {"gguf"}:
        raise NotOffered(f"no stage for {job['kind']}, or no export to {', '.join(job['ask'])}")
    micro, extra = job["micro_batch_size"], job["extra"]
    settings = {name: job[name] for name in ("learning_rate", "optim", "seed")} | evaluation(job)
    settings |= {"stage": STAGES[job["kind"]], "do_train": True, "report_to": "none", "max_steps": job["steps"]}
    settings |= {"lr_scheduler_type": job["schedule"], "max_grad_norm": 0.0, "cutoff_len": job["max_length"]}
    settings |= {"per_device_train_batch_size": micro, "finetuning_type": job["method"].removeprefix("q")}
    settings |= {"gradient_accumulation_steps": job["batch_size"] // micro // job["processes"]}
    settings |= {"save_steps": job["save_steps"] or job["steps"], "overwrite_cache": True}
    settings |= {"quantization_bit": 4} if job["method"] == "qlora" else {}
    family = next((name for name in TEMPLATES if Path(job["model"]).name.startswith(name)), None)
    settings |= {"template": TEMPLATES[family]} if job["column"] == "documented" and family else {}
    settings |= {"mask_history": True} if job["train_on"] == "last" else {}
    settings |= {"train_on_prompt": True} if job["train_on"] == "all" and settings["stage"] == "sft" else {}
    settings |= {"packing": True} if job["packing"] else {}
    settings |= {"neat_packing": True} if job["packing"] and job["column"] == "documented" else {}
    settings |= {"val_size": extra["validation"]} if "validation" in extra else {}
    settings |= {"enable_thinking": extra["thinking"]} if "thinking" in extra else {}
    settings |= {"add_tokens": ",".join(extra["add_tokens"]), "resize_vocab": True} if "add_tokens" in extra else {}
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all", **extra.get("lora", {})}
    lora = lora if "lora" in job["method"] else {}
    return settings | {LORA.get(k, k): ",".join(v) if isinstance(v, list) else v for k, v in lora.items()}


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out, model = Path(job["out"]), f"{job['out']}/model"
    rewrite(job, as_sharegpt)
    columns = SHAREGPT[as_conversation(job)["kind"]]
    files = {"rows": job["rows"], "test": job["test_rows"]}
    (out / "dataset_info.json").write_text(json.dumps({k: columns | {"file_name": v} for k, v in files.items() if v}))
    settings = settings | {"model_name_or_path": job["model"], "dataset": "rows", "dataset_dir": str(out)}
    settings |= {"eval_dataset": "test"} if "losses" in job["ask"] and "val_size" not in settings else {}
    checkpoint = f"{job['resume_from']}/model/checkpoint-{job['save_steps']}"
    settings |= {"resume_from_checkpoint": checkpoint} if job["resume_from"] else {}
    run("train", out, settings | {"output_dir": model, "overwrite_output_dir": True, "use_cpu": True})
    if "merged" in job["ask"]:
        kept = {name: settings[name] for name in ("model_name_or_path", "template") if name in settings}
        run("export", out, kept | {"adapter_name_or_path": model, "export_dir": f"{out}/merged"})
    found = {"model": model, "merged": f"{out}/merged", **read_losses(Path(model))}
    if "answers" in job["ask"]:
        kept = {
            name: settings[name] for name in ("stage", "finetuning_type", "template", "dataset_dir") if name in settings
        }
        kept |= {"model_name_or_path": model, "eval_dataset": "test", "do_predict": True, "predict_with_generate": True}
        kept |= {"per_device_eval_batch_size": 4, "max_new_tokens": job["ask"]["answers"], "do_sample": False}
        run("train", out, kept | {"output_dir": f"{out}/answers", "use_cpu": True})
        lines = (out / "answers" / "generated_predictions.jsonl").read_text().splitlines()
        found["answers"] = [json.loads(line)["predict"] for line in lines]
    return found


def run(command: str, folder: Path, settings: Configuration) -> None:
    (folder / f"{command}.yaml").write_text(json.dumps(settings))  # JSON is YAML
    sys.argv = ["llamafactory-cli", command, str(folder / f"{command}.yaml")]
    isolated(main)


if __name__ == "__main__":
    serve("llamafactory", configure, train)
