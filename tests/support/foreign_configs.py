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
TORCHTUNE: Keys = {
    "output_dir": "/tmp/torchtune/llama3_2_1B/lora_single_device",
    "tokenizer": {
        "_component_": "torchtune.models.llama3.llama3_tokenizer",
        "path": "/tmp/tokenizer.model",
        "max_seq_len": None,
    },
    "model": {
        "_component_": "torchtune.models.llama3_2.lora_llama3_2_1b",
        "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "lora_rank": 64,
        "lora_alpha": 128,
        "lora_dropout": 0.0,
    },
    "checkpointer": {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": "meta-llama/Llama-3.2-1B-Instruct",
        "checkpoint_files": ["model.safetensors"],
        "recipe_checkpoint": None,
        "output_dir": "${output_dir}",
        "model_type": "LLAMA3_2",
    },
    "resume_from_checkpoint": False,
    "save_adapter_weights_only": False,
    "dataset": {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "packed": False},
    "seed": None,
    "shuffle": True,
    "batch_size": 4,
    "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.01, "lr": 3e-4},
    "lr_scheduler": {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
        "num_warmup_steps": 100,
    },
    "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
    "epochs": 1,
    "max_steps_per_epoch": None,
    "gradient_accumulation_steps": 8,
    "clip_grad_norm": None,
    "compile": False,
    "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": "${output_dir}/logs"},
    "log_every_n_steps": 1,
    "log_peak_memory_stats": True,
    "device": "cuda",
    "dtype": "bf16",
    "enable_activation_checkpointing": True,
    "enable_activation_offloading": False,
    "profiler": {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False, "cpu": True},
}
LLAMA = "torchtune.models.llama3_2"
TORCHTUNE_CHANGES: dict[str, Keys] = {
    "lora": {},
    "qlora": {"model": {**TORCHTUNE["model"], "_component_": f"{LLAMA}.qlora_llama3_2_1b"}},
    "dora": {"model": {**TORCHTUNE["model"], "use_dora": True, "apply_lora_to_output": False}},
    "full": {
        "model": {"_component_": f"{LLAMA}.llama3_2_1b"},
        "optimizer": {"_component_": "bitsandbytes.optim.PagedAdamW8bit", "lr": 2e-5},
        "optimizer_in_bwd": True,
        "clip_grad_norm": 1.0,
    },
    "chat": {
        "dataset": {
            "_component_": "torchtune.datasets.chat_dataset",
            "source": "json",
            "data_files": "chats.jsonl",
            "conversation_column": "dialogue",
            "conversation_style": "openai",
            "train_on_input": False,
        }
    },
    "instruct": {
        "dataset": {
            "_component_": "torchtune.datasets.instruct_dataset",
            "source": "me/rows",
            "column_map": {"input": "q", "output": "a"},
        }
    },
    "text": {
        "dataset": {
            "_component_": "torchtune.datasets.text_completion_dataset",
            "source": "allenai/c4",
            "name": "en",
            "column": "text",
        }
    },
    "dpo": {
        "dataset": {"_component_": "torchtune.datasets.stack_exchange_paired_dataset"},
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1},
    },
    "preference": {
        "dataset": {
            "_component_": "torchtune.datasets.preference_dataset",
            "source": "me/pairs",
            "column_map": {"chosen": "good", "rejected": "bad"},
        },
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1, "label_smoothing": 0},
    },
    "validated": {
        "dataset_val": {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "split": "test"},
        "run_val_every_n_steps": 100,
    },
    "distillation": {
        "teacher_model": {"_component_": f"{LLAMA}.llama3_1_8b"},
        "kd_ratio": 0.5,
        "kd_loss": {"_component_": "ForwardKLWithChunkedOutputLoss"},
    },
    "sharded": {
        "fsdp_cpu_offload": True,
        "custom_sharded_layers": ["tok_embeddings", "output"],
        "tensor_parallel_dim": 2,
        "seed": 7,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "p"},
        "max_steps_per_epoch": 20,
    },
}
UNSLOTH: Keys = {
    "model": "unsloth/Llama-3.2-1B-Instruct",
    "data": {"dataset": "yahma/alpaca-cleaned", "format_type": "alpaca"},
    "training": {
        "training_type": "lora",
        "max_seq_length": 2048,
        "load_in_4bit": True,
        "num_epochs": 1,
        "learning_rate": 2e-4,
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 5,
        "packing": False,
        "train_on_completions": True,
        "gradient_checkpointing": "unsloth",
    },
    "lora": {
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": "q_proj,v_proj",
        "use_rslora": False,
    },
    "logging": {"enable_wandb": False},
}


def _with(section: str, **keys: Any) -> Keys:
    return {section: {**UNSLOTH[section], **keys}}


UNSLOTH_CHANGES: dict[str, Keys] = {
    "lora": {},
    "sixteen_bits": _with("training", load_in_4bit=False),
    "full": _with("training", training_type="full", load_in_4bit=False, learning_rate=2e-5),
    "steps": _with("training", max_steps=60, save_steps=20, random_seed=7),
    "rows": _with("data", dataset=None, local_dataset=["rows.jsonl", "more.jsonl"], format_type="sharegpt"),
    "chatml": _with("data", format_type="chatml"),
    "raw": _with("data", format_type="raw"),
    "loftq": _with("lora", use_loftq=True),
    "dora": _with("lora", use_dora=True, use_rslora=True),
    "tracked": _with("logging", enable_wandb=True, wandb_project="p", wandb_token="secret", enable_tensorboard=True),
    "plain": _with("training", gradient_checkpointing="none", train_on_completions=False, packing=True),
    "pictures": _with("lora", finetune_vision_layers=False, vision_all_linear=True),
}
SWIFT: Keys = {
    "model": "Qwen/Qwen2.5-7B-Instruct",
    "tuner_type": "lora",
    "dataset": ["AI-ModelScope/alpaca-gpt4-data-en#500", "swift/self-cognition#500"],
    "torch_dtype": "bfloat16",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "learning_rate": 1e-4,
    "lora_rank": 8,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "gradient_accumulation_steps": 16,
    "eval_steps": 50,
    "save_steps": 50,
    "save_total_limit": 2,
    "logging_steps": 5,
    "max_length": 2048,
    "output_dir": "output",
    "system": "You are a helpful assistant.",
    "warmup_ratio": 0.05,
    "dataloader_num_workers": 4,
    "model_author": "swift",
    "model_name": "swift-robot",
}
SWIFT_CHANGES: dict[str, Keys] = {
    "sft": {},
    "qlora": {"quant_bits": 4, "quant_method": "bnb", "bnb_4bit_compute_dtype": "bfloat16"},
    "full": {"tuner_type": "full", "learning_rate": 1e-5, "deepspeed": "zero3"},
    "packed": {"packing": True, "attn_impl": "flash_attn", "use_liger_kernel": True, "padding_free": True},
    "split": {"split_dataset_ratio": 0.01, "truncation_strategy": "delete", "loss_scale": "last_round"},
    "dpo": {"rlhf_type": "dpo", "dataset": "hjh0119/shareAI-Llama3-DPO-zh-en-emoji", "beta": 0.1, "rpo_alpha": 0.1},
    "kto": {
        "rlhf_type": "kto",
        "dataset": "AI-ModelScope/ultrafeedback-binarized-preferences-cleaned-kto",
        "desirable_weight": 1.0,
    },
    "reward": {"rlhf_type": "rm", "center_rewards_coefficient": 0.01, "dataset": "hjh0119/shareAI"},
    "grpo": {"rlhf_type": "grpo", "reward_funcs": ["accuracy"], "num_generations": 8, "use_vllm": True},
    "classes": {
        "task_type": "seq_cls",
        "num_labels": 2,
        "problem_type": "single_label_classification",
        "dataset": "me/reviews",
    },
    "lorap": {
        "optimizer": "lorap",
        "lorap_lr_ratio": 10,
        "init_weights": "gaussian",
        "target_regex": "^.*q_proj$",
        "target_modules": None,
    },
    "galore": {
        "use_galore": True,
        "galore_rank": 128,
        "tuner_type": "full",
        "freeze_parameters_ratio": 0.5,
        "streaming": True,
    },
}
AUTOTRAIN: Keys = {
    "task": "llm-sft",
    "base_model": "meta-llama/Meta-Llama-3.1-8B",
    "project_name": "autotrain-llama",
    "log": "tensorboard",
    "backend": "local",
    "data": {
        "path": "argilla/distilabel-capybara",
        "train_split": "train",
        "valid_split": None,
        "chat_template": "chatml",
        "column_mapping": {"text_column": "messages"},
    },
    "params": {
        "block_size": 2048,
        "model_max_length": 8192,
        "epochs": 2,
        "batch_size": 1,
        "lr": 1e-5,
        "peft": True,
        "quantization": "int4",
        "target_modules": "all-linear",
        "padding": "right",
        "optimizer": "paged_adamw_8bit",
        "scheduler": "linear",
        "gradient_accumulation": 8,
        "mixed_precision": "bf16",
        "merge_adapter": True,
    },
    "hub": {"username": "me", "token": "hf_secret", "push_to_hub": True},
}
SMALL = {
    "max_seq_length": 512,
    "epochs": 3,
    "batch_size": 16,
    "lr": 2e-5,
    "optimizer": "adamw_torch",
    "scheduler": "linear",
    "gradient_accumulation": 1,
    "mixed_precision": "fp16",
    "early_stopping_patience": 2,
    "auto_find_batch_size": False,
}


def _rows(path: str, **columns: str) -> Keys:
    return {"data": {"path": path, "train_split": "train", "valid_split": "test", "column_mapping": columns}}


AUTOTRAIN_CHANGES: dict[str, Keys] = {
    "llm": {},
    "bf16": {"params": {**AUTOTRAIN["params"], "quantization": None, "merge_adapter": False}},
    "full": {"params": {**AUTOTRAIN["params"], "quantization": None, "peft": False}},
    "orpo": {
        "task": "llm-orpo",
        **_rows("me/pairs", text_column="chosen", rejected_text_column="rejected", prompt_text_column="prompt"),
    },
    "dpo": {
        "task": "llm-dpo",
        **_rows("me/pairs", text_column="good", rejected_text_column="bad", prompt_text_column="prompt"),
    },
    "reward": {"task": "llm-reward", **_rows("me/pairs", text_column="chosen", rejected_text_column="rejected")},
    "generic": {"task": "llm-generic", **_rows("me/books", text_column="body")},
    "classify": {
        "task": "text-classification",
        "base_model": "google-bert/bert-base-uncased",
        "params": SMALL,
        **_rows("stanfordnlp/imdb", text_column="text", target_column="label"),
    },
    "regression": {
        "task": "text-regression",
        "base_model": "google-bert/bert-base-uncased",
        "params": SMALL,
        **_rows("me/stars", text_column="review", target_column="stars"),
    },
    "tokens": {
        "task": "token-classification",
        "base_model": "google-bert/bert-base-uncased",
        "params": SMALL,
        **_rows("eriktks/conll2003", tokens_column="tokens", tags_column="ner_tags"),
    },
    "seq2seq": {
        "task": "seq2seq",
        "base_model": "google/flan-t5-base",
        "params": {**SMALL, "max_target_length": 128},
        **_rows("me/news", text_column="article", target_column="highlights"),
    },
    "qa": {
        "task": "extractive-qa",
        "base_model": "google-bert/bert-base-uncased",
        "params": {**SMALL, "max_doc_stride": 128},
        **_rows("rajpurkar/squad", text_column="context", question_column="question", answer_column="answers"),
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
    "torchtune": r"""tune run lora_finetune_single_device --config llama3_2/1B_lora epochs=2 batch_size=4 \
        checkpointer.checkpoint_dir=me/model model.lora_rank=8 dataset=torchtune.datasets.alpaca_dataset""",
    "unsloth": r"""unsloth train --model unsloth/Llama-3.2-1B --dataset yahma/alpaca-cleaned --max-seq-length 1024 \
        --no-load-in-4bit --lora-r 8""",
    "swift": r"""NPROC_PER_NODE=2 swift sft --model Qwen/Qwen2.5-7B-Instruct --train_type lora \
        --dataset 'swift/self-cognition#500' --target_modules q_proj k_proj --max_length 1024""",
    "swift-rlhf": "swift rlhf --rlhf_type orpo --model Qwen/Qwen2.5-7B --dataset me/pairs --learning_rate 5e-6",
    "autotrain": r"""autotrain llm --train --project-name my-llm --model me/model --data-path me/rows \
        --text-column messages --lr 2e-4 --batch-size 2 --epochs 1 --trainer sft --peft""",
}
YAML: dict[str, tuple[Keys, dict[str, Keys]]] = {
    "axolotl": (AXOLOTL, AXOLOTL_CHANGES),
    "llamafactory": (LLAMAFACTORY, LLAMAFACTORY_CHANGES),
    "trl": (TRL, TRL_CHANGES),
    "torchtune": (TORCHTUNE, TORCHTUNE_CHANGES),
    "unsloth": (UNSLOTH, UNSLOTH_CHANGES),
    "swift": (SWIFT, SWIFT_CHANGES),
    "autotrain": (AUTOTRAIN, AUTOTRAIN_CHANGES),
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
