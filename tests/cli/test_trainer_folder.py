"""What a folder of transformers' Trainer tells, with a real one; and one that is none."""

import json
from pathlib import Path

import pytest
from support.runs import invoke

STATE = {
    "global_step": 30,
    "max_steps": 60,
    "epoch": 1.5,
    "train_batch_size": 4,
    "best_model_checkpoint": "out/checkpoint-20",
    "log_history": [
        {"step": 10, "loss": 2.5, "grad_norm": 1.5, "learning_rate": 1e-4},
        {"step": 20, "eval_loss": 2.0},
        {"step": 20, "loss": 1.5, "grad_norm": 9.0, "learning_rate": 5e-5},
        {"step": 30, "eval_loss": 2.25},
        {"step": 30, "loss": float("nan"), "grad_norm": 0.5, "learning_rate": 0.0},
    ],
}


def test_a_trainers_folder_tells_its_losses_and_what_it_cannot_tell(tmp_path: Path):
    folder = tmp_path / "out" / "checkpoint-30"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps(STATE))
    (folder / "training_args.bin").write_bytes(b"never read")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "a/b"})
    )
    found = json.loads(invoke("doctor", tmp_path / "out", "--json").stdout)
    assert found["told"]["steps"] == "30 of 60, 1.50 epochs, and 30 were still to come: it was stopped"
    assert found["told"]["training loss"] == "2.5000 at step 10, nan at the end; NO NUMBER from step 30 on"
    assert "2.0000 at step 20 of 2 measurements, and 2.2500 at the end" in found["told"]["validation loss"]
    assert found["told"]["adapter"] == "peft_type LORA, r 8, on a/b"
    assert "is a pickle" in found["not_told"]["its settings"]
    shown = invoke("doctor", tmp_path / "out").stdout
    assert "told      gradient norm: up to 9, 1.5 in the middle" in shown
    assert "not told  the gain" in shown


@pytest.mark.parametrize(
    ("text", "code", "words"), [(None, 2, "no trainer_state.json"), ("{", 4, "cannot be read"), ("[]", 4, "no mapping")]
)
def test_a_folder_that_is_no_trainers_or_is_damaged_is_refused(tmp_path: Path, text: str | None, code: int, words: str):
    if text is not None:
        (tmp_path / "trainer_state.json").write_text(text)
    done = invoke("doctor", tmp_path)
    assert (done.exit_code, words in done.stderr) == (code, True)


@pytest.mark.parametrize(
    "text",
    [
        '{"global_step": null, "epoch": "x", "num_input_tokens_seen": "7", "log_history": [7, {"loss": "low"}]}',
        "[" * 100_000,
    ],
    ids=["edited", "deep"],
)
def test_a_state_that_was_edited_by_hand_ends_in_no_traceback(tmp_path: Path, text: str):
    (tmp_path / "trainer_state.json").write_text(text)
    assert invoke("doctor", tmp_path).exit_code == (0 if text.startswith("{") else 4)
