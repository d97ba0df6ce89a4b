"""One training by LLaMA-Factory, packed: `PYTHON run_llamafactory.py ASKED.json ANSWER.json`, in its own environment.

`neat_packing` is its packing without attention between documents, and sdpa its fastest attention on a CPU. It pads
packs to `cutoff_len`; padding is not counted. It trains in the format of the saved model, so another format needs a
copy.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

from clock import Clock, answer, read_asked
from transformers import AutoModelForCausalLM
from watch import describe_training, watch


def main() -> None:
    asked, path = read_asked()
    do_without_torchaudio()
    from llamafactory.train.tuner import run_exp

    clock = Clock(sums=False)
    loaded = watch(clock)
    with tempfile.TemporaryDirectory() as folder:
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        described = {"file_name": asked.rows, "formatting": "sharegpt", "columns": {"messages": "messages"}}
        listing = {"rows": {**described, "tags": tags}}
        (Path(folder) / "dataset_info.json").write_text(json.dumps(listing))
        settings = {
            **describe_training(asked, str(Path(folder) / "out"), packed=True),
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": str(save_as(asked.dtype, asked.model, Path(folder) / "model")),
            "template": "smollm2",
            "dataset": "rows",
            "dataset_dir": folder,
            "cutoff_len": asked.pack,
            "packing": True,
            "neat_packing": True,
            "flash_attn": "sdpa",
            "disable_gradient_checkpointing": True,
            "finetuning_type": "lora",
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "lora_target": "all",
        }
        run_exp(settings, callbacks=[loaded])
    answer(path, clock.found())


def save_as(dtype: str, model: str, folder: Path) -> Path:
    """Save a copy of a model, with its tokenizer, in another format."""
    shutil.copytree(model, folder)
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(folder)
    return folder


def do_without_torchaudio() -> None:
    """Replace torchaudio by an empty module if it cannot be loaded, as when built for CUDA next to a CPU torch.

    LLaMA-Factory imports it always and uses it for recordings alone.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))


if __name__ == "__main__":
    main()
