"""Test that a migrated recipe has the other tool's loss in every step, on the same rows, in float32.

Each step has all rows, so their order does not matter. All weights are trained, so no adapter starts at random.
"""

import json
from pathlib import Path

import pytest
from support.runs import invoke

STEPS, ROWS = 20, 8


def sentences() -> list[tuple[str, str]]:
    return [(f"What is {i} times {i + 3}?", f" It is {i * (i + 3)}, {'and no more ' * (i % 4)}.") for i in range(ROWS)]


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # noqa: E501
"""Ends with the end-of-turn token. ChatML has a line break after it, which TRL learns too."""
FORMS = {
    "messages": lambda ask, say: {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say.strip()}]
    },
    "chat pairs": lambda ask, say: {
        "prompt": [{"role": "user", "content": ask}],
        "completion": [{"role": "assistant", "content": say.strip()}],
    },
    "text": lambda ask, say: {"text": ask + say},
    "prompt and completion": lambda ask, say: {"prompt": ask, "completion": say},
}
"""TRL learns every token of `messages` and `text`, but only the completion of prompt and completion, as documented."""


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_migrated_configuration_has_the_same_losses_as_trl(tiny_llama: Path, schedule: str, form: str):
    from trl.scripts import sft

    Path("rows").mkdir()
    rows = "".join(f"{json.dumps(FORMS[form](ask, say))}\n" for ask, say in sentences())
    Path("rows/train.jsonl").write_text(rows, "utf-8")
    Path("chat.jinja").write_text(TEMPLATE, "utf-8")
    keys = {
        **({"chat_template_path": "chat.jinja"} if form in ("messages", "chat pairs") else {}),
        "model_name_or_path": str(tiny_llama),
        "dataset_name": "rows",
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ROWS // 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "bf16": False,
        "logging_steps": 1,
        "save_steps": STEPS,
        "output_dir": "trl",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": schedule,
    }
    Path("sft.yaml").write_text(json.dumps(keys))
    sft.main(*sft.make_parser().parse_args_and_config(args=["--config", "sft.yaml"])[:4])
    state = json.loads(Path(f"trl/checkpoint-{STEPS}/trainer_state.json").read_text())
    theirs = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert invoke("recipes", "migrate", "sft.yaml", "--out", "recipe.yaml").exit_code == 0
    whole = ("--set", "data.validation=0", "--set", "data.test=0")  # that tool trains on all rows
    done = invoke("train", "recipe.yaml", "--out", "run", *whole)
    assert done.exit_code == 0, done.stderr
    ours = [
        entry["loss"]
        for line in Path("run/metrics.jsonl").read_text().splitlines()
        if "loss" in (entry := json.loads(line))
    ]
    assert len(theirs) == STEPS
    assert theirs[-1] < theirs[0] - 0.3
    assert ours == pytest.approx(theirs, abs=1e-3)
