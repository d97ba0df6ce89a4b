"""Configurations of other tools, from their documentation: what people start from, and what they then change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Keys = dict[str, Any]

AXOLOTL: Keys = {
    "base_model": "NousResearch/Llama-3.2-1B",
    "datasets": [{"path": "teknium/GPT4-LLM-Cleaned", "type": "alpaca"}],
    "dataset_prepared_path": "last_run_prepared",
    "val_set_size": 0.1,
    "output_dir": "./outputs/out",
    "adapter": "lora",
    "sequence_len": 2048,
    "sample_packing": True,
    "eval_sample_packing": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"],
    "gradient_accumulation_steps": 2,
    "micro_batch_size": 2,
    "num_epochs": 1,
    "optimizer": "adamw_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": 0.0002,
    "bf16": "auto",
    "tf32": False,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "flash_attention": True,
    "warmup_ratio": 0.1,
    "evals_per_epoch": 4,
    "saves_per_epoch": 1,
    "weight_decay": 0.0,
    "special_tokens": {"pad_token": "<|end_of_text|>"},
}
PAIRS = {"path": "argilla/ultrafeedback", "split": "train", "type": "chat_template.argilla"}
AXOLOTL_CHANGES: dict[str, Keys] = {
    "lora": {},
    "qlora": {"adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True, "lora_target_modules": None},
    "full": {"adapter": None, "optimizer": "paged_adamw_8bit", "learning_rate": 2e-5, "deepspeed": "zero2.json"},
    "chat": {
        "datasets": [
            {
                "path": "fozziethebeat/alpaca",
                "type": "chat_template",
                "split": "train",
                "roles_to_train": ["assistant"],
                "field_messages": "messages",
                "message_property_mappings": {"role": "role", "content": "content"},
            }
        ],
        "chat_template": "chatml",
        "eot_tokens": ["<|im_end|>"],
        "train_on_inputs": False,
    },
    "completion": {"datasets": [{"path": "json", "data_files": "book.jsonl", "type": "completion", "field": "body"}]},
    "pretraining": {
        "pretraining_dataset": [{"path": "allenai/c4", "name": "en", "type": "pretrain"}],
        "datasets": None,
        "max_steps": 100,
        "streaming": True,
    },
    "dpo": {"rl": "dpo", "rl_beta": 0.1, "datasets": [PAIRS], "sample_packing": False, "val_set_size": 0.0},
    "kto": {
        "rl": "kto",
        "kto_desirable_weight": 0.2,
        "kto_undesirable_weight": 1.0,
        "remove_unused_columns": False,
        "datasets": [{"path": "argilla/kto-mix", "split": "train", "type": "llama3.argilla"}],
    },
    "orpo": {"rl": "orpo", "orpo_alpha": 0.1, "datasets": [PAIRS]},
    "reward": {"reward_model": True, "datasets": [PAIRS], "center_rewards_coefficient": 0.01},
    "schedule": {"lr_scheduler": "rex", "cosine_min_lr_ratio": 0.1, "optimizer": "muon", "max_grad_norm": 1.0},
    "tracked": {
        "wandb_project": "p",
        "wandb_entity": "me",
        "use_wandb": True,
        "hub_model_id": "me/out",
        "fsdp_config": {"fsdp_version": 2, "offload_params": False},
        "plugins": ["axolotl.integrations.liger.LigerPlugin"],
        "liger_rope": True,
        "early_stopping_patience": 3,
        "dora": True,
        "peft_use_dora": True,
    },
    "grpo": {"rl": "grpo", "trl": {"beta": 0.001, "num_generations": 4, "use_vllm": True}, "vllm": {"dtype": "auto"}},
}
LLAMAFACTORY: Keys = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "identity,alpaca_en_demo",
    "template": "llama3",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "preprocessing_num_workers": 16,
    "dataloader_num_workers": 4,
    "output_dir": "saves/llama3-8b/lora/sft",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "save_only_model": False,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
}
LLAMAFACTORY_CHANGES: dict[str, Keys] = {
    "lora": {},
    "qlora": {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True},
    "eight_bits": {"quantization_bit": 8},
    "full": {"finetuning_type": "full", "deepspeed": "examples/deepspeed/ds_z3_config.json", "lora_rank": None},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 2},
    "pretrain": {"stage": "pt", "dataset": "c4_demo", "packing": True},
    "dpo": {"stage": "dpo", "dataset": "dpo_en_demo", "pref_beta": 0.1, "pref_loss": "sigmoid"},
    "simpo": {"stage": "dpo", "dataset": "dpo_en_demo", "pref_loss": "simpo", "simpo_gamma": 0.5},
    "kto": {"stage": "kto", "dataset": "kto_en_demo", "pref_beta": 0.1, "kto_chosen_weight": 1.0},
    "reward": {"stage": "rm", "dataset": "dpo_en_demo", "per_device_train_batch_size": 2},
    "eval": {
        "val_size": 0.1,
        "per_device_eval_batch_size": 1,
        "eval_strategy": "steps",
        "eval_steps": 500,
        "load_best_model_at_end": True,
    },
    "galore": {"use_galore": True, "galore_rank": 128, "pure_bf16": True, "flash_attn": "fa2", "neat_packing": True},
    "pissa": {
        "pissa_init": True,
        "pissa_iter": 16,
        "loraplus_lr_ratio": 16.0,
        "use_rslora": True,
        "neftune_noise_alpha": 5,
    },
}
TRL: Keys = {
    "model_name_or_path": "Qwen/Qwen2-0.5B",
    "dataset_name": "trl-lib/Capybara",
    "learning_rate": 2.0e-4,
    "num_train_epochs": 1,
    "packing": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "eos_token": "<|im_end|>",
    "eval_strategy": "steps",
    "eval_steps": 100,
    "use_peft": True,
    "lora_r": 32,
    "lora_alpha": 16,
    "output_dir": "Qwen2-0.5B-SFT",
    "report_to": "none",
}
TRL_CHANGES: dict[str, Keys] = {
    "lora": {},
    "full": {
        "use_peft": False,
        "gradient_checkpointing": True,
        "bf16": True,
        "attn_implementation": "flash_attention_2",
    },
    "qlora": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True, "dtype": "bfloat16"},
    "answers": {"assistant_only_loss": True, "max_length": 4096, "truncation_mode": "keep_end", "padding_free": True},
    "dpo": {
        "dataset_name": "trl-lib/ultrafeedback_binarized",
        "beta": 0.1,
        "loss_type": ["sigmoid"],
        "max_prompt_length": 512,
        "precompute_ref_log_probs": True,
        "packing": None,
    },
    "ipo": {"beta": 0.1, "loss_type": "ipo", "label_smoothing": 0.0, "packing": None},
    "kto": {
        "dataset_name": "trl-lib/kto-mix-14k",
        "desirable_weight": 1.0,
        "undesirable_weight": 1.33,
        "packing": None,
    },
    "reward": {"center_rewards_coefficient": 0.01, "lora_task_type": "SEQ_CLS", "packing": None},
    "splits": {
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "dataset_config": "default",
        "dataset_streaming": False,
    },
    "mixture": {
        "dataset_name": None,
        "datasets": [{"path": "trl-lib/Capybara", "split": "train"}, {"path": "trl-lib/tldr"}],
        "test_split_size": 0.1,
    },
    "where": {
        "fsdp": "full_shard",
        "fsdp_config": {"fsdp_offload_params": False},
        "deepspeed": None,
        "torch_compile": True,
        "seed": 7,
        "push_to_hub": True,
        "hub_token": "hf_secret",
        "run_name": "first run",
    },
    "steps": {
        "max_steps": 500,
        "warmup_steps": 20,
        "save_steps": 100,
        "save_total_limit": 1,
        "logging_steps": 5,
        "optim": "adamw_bnb_8bit",
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.01,
        "neftune_noise_alpha": 5,
    },
}
COMMANDS = {
    "trl-sft": r"""accelerate launch --config_file zero3.yaml -m trl sft \
        --model_name_or_path Qwen/Qwen2-0.5B --dataset_name trl-lib/Capybara --learning_rate 2.0e-5 --packing \
        --eos_token '<|im_end|>' --lora_target_modules q_proj v_proj --use_peft --gradient_checkpointing""",
    "trl-dpo": r"""trl dpo --model_name_or_path=Qwen/Qwen2-0.5B-Instruct --beta=0.2 --no_remove_unused_columns \
        --dataset_name=trl-lib/ultrafeedback_binarized""",
    "trl-script": r"""python examples/scripts/kto.py --dataset_name trl-lib/kto-mix-14k \
        --model_name_or_path Qwen/Qwen2-0.5B --per_device_train_batch_size 16""",
    "llamafactory": r"""CUDA_VISIBLE_DEVICES=0 llamafactory-cli train --stage sft --model_name_or_path me/model \
        --dataset alpaca_en_demo --template llama3 --finetuning_type lora""",
}
YAML: dict[str, tuple[Keys, dict[str, Keys]]] = {
    "axolotl": (AXOLOTL, AXOLOTL_CHANGES),
    "llamafactory": (LLAMAFACTORY, LLAMAFACTORY_CHANGES),
    "trl": (TRL, TRL_CHANGES),
}


def write_configs(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write every configuration; yields its tool and file."""
    for tool, (keys, changes) in YAML.items():
        for name, change in changes.items():
            file = folder / f"{tool}-{name}.yaml"
            file.write_text(json.dumps({**keys, **change}), "utf-8")
            yield tool, file
    for name, command in COMMANDS.items():
        file = folder / f"{name}.sh"
        file.write_text(f"#!/bin/bash\n# how we train\n{command}\n", "utf-8")
        yield name.split("-")[0], file
