"""ms-swift: `swift sft`, `pt`, `rlhf`, `export` and `infer` with their command-line arguments."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from conformance import adapter
from conformance.adapter import Configuration, Job, NotOffered
from conformance.formats import as_conversation, as_numbered, as_two_conversations
from swift.pipelines import export_main, infer_main, pretrain_main, rlhf_main, sft_main
from swift.rewards import ORM, orms
from swift.template.templates.gemma import Gemma3VisionTemplate
from transformers import AutoTokenizer

COMMANDS = {"messages": sft_main, "text": pretrain_main, "preference": rlhf_main, "classify": sft_main}
COMMANDS |= {"pictures": sft_main, "prompts": rlhf_main}
TYPES = {"qwen2.5": ("qwen2", "qwen2_5"), "qwen3": ("qwen3", "qwen3"), "llama3": ("llama", "llama3")}
TYPES |= {"gemma3": ("gemma3_vision", "gemma3_vision")}
"""`model_type` and `template`, which the tool asks for where the name of the folder does not tell them."""
LORA = {"r": "lora_rank"}
EXTRA = {"validation": "split_dataset_ratio", "thinking": "enable_thinking", "add_tokens": "new_special_tokens"}


def configure(job: Job) -> Configuration:
    """Return the arguments."""
    job, extra = as_conversation(job), job["extra"]
    if job["kind"] == "rerank":
        raise NotOffered("its rerankers report MRR and NDCG, no recall")
    if job["kind"] not in COMMANDS or "gguf" in job["ask"]:
        raise NotOffered(f"no command for rows of {job['kind']}, or no such export")
    if job["method"] == "prompt_tuning":
        raise NotOffered("no prompt tuning")
    family = next((name for name in TYPES if Path(job["model"]).name.startswith(name)), "")
    settings = adapter.trainer_arguments(job) | {
        "tuner_type": job["method"].removeprefix("q"),
        "max_length": job["max_length"],
    }
    settings |= dict(zip(("model_type", "template"), TYPES.get(family, ()), strict=False))
    settings |= {"torch_dtype": "float32", "warmup_ratio": 0.0}
    settings |= {"packing": job["packing"] or None, "rlhf_type": "dpo" if job["kind"] == "preference" else None}
    settings |= sampling(job) if job["kind"] == "prompts" else {}
    if job["kind"] in ("messages", "pictures"):
        settings |= {"loss_scale": {"last": "last_round", "all": "all"}.get(job["train_on"])}
    if job["kind"] == "classify":
        settings |= {"task_type": "seq_cls", "num_labels": 2}
    settings |= {EXTRA[name]: value for name, value in extra.items() if name in EXTRA}
    if "lora" in job["method"]:
        lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **extra.get("lora", {})}
        settings |= {LORA.get(name, name): value for name, value in lora.items()}
    return adapter.given(settings | ({"quant_method": "bnb", "quant_bits": 4} if job["method"] == "qlora" else {}))


def sampling(job: Job) -> Configuration:
    """Return the arguments of GRPO, without its tie to the starting model; a top_k of -1 means all tokens."""
    extra = job["extra"]
    settings = {"rlhf_type": "grpo", "use_vllm": False, "reward_funcs": "conformance", "loss_type": extra.get("loss")}
    settings |= {"num_generations": extra["samples"], "max_completion_length": extra["max_new_tokens"]}
    settings |= {"beta": 0.0}
    settings |= {"overlong_filter": extra.get("mask_truncated")} | extra["sampling"]
    return settings | {"top_k": extra["sampling"]["top_k"] or -1}


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out, command = Path(job["out"]), COMMANDS[as_conversation(job)["kind"]]
    adapter.rewrite(job, as_numbered if job["kind"] == "classify" else as_two_conversations)
    places = {"model": job["model"], "dataset": job["rows"], "output_dir": out / "model", "add_version": False}
    tested = job["test_rows"] if "split_dataset_ratio" not in settings else None
    places |= adapter.given({"val_dataset": tested, "resume_from_checkpoint": adapter.checkpoint(job)})
    if job["kind"] == "pictures":  # the released model's id is written into its template
        Gemma3VisionTemplate.boi_token_id = AutoTokenizer.from_pretrained(job["model"]).boi_token_id
    if job["kind"] == "prompts":
        number = count()
        adapter.rewrite(job, lambda row: row | {"number": next(number)})
        orms["conformance"] = reward_class(job)
    adapter.isolated(lambda: command(as_arguments(settings | places)))
    last = max((out / "model").glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    found = {"model": last, "merged": out / "merged", "numbered": True, "one_way": True, **adapter.read_losses(out)}
    found |= adapter.read_samples(job)
    if "merged" in job["ask"]:
        merge = {"adapters": last, "merge_lora": True, "output_dir": out / "merged"}
        adapter.isolated(lambda: export_main(as_arguments(merge)))
    if "answers" in job["ask"]:
        asked = {"model": last, "val_dataset": job["test_rows"], "max_batch_size": 4, "temperature": 0}
        asked |= {"max_new_tokens": job["ask"]["answers"], "result_path": out / "answers.jsonl"}
        adapter.isolated(lambda: infer_main(as_arguments(asked)))
        found["answers"] = [row["response"] for row in adapter.read_lines(out / "answers.jsonl")]
    return found


def reward_class(job: Job) -> type[ORM]:
    """Return the reward as a plugin.

    Source: https://swift.readthedocs.io/en/latest/Instruction/GRPO/DeveloperGuide/reward_function.html
    """

    class Reward(ORM):
        def __call__(self, completions: list[str], number: list[int], response_token_ids: Any, **_: Any) -> list[float]:
            return adapter.reward(job, number, completions, response_token_ids)

    return Reward


def as_arguments(values: Configuration) -> list[str]:
    words = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [str(word) for name, several in words.items() for word in (f"--{name}", *several)]


if __name__ == "__main__":
    adapter.serve("ms-swift", configure, train)
