import io
import json
import os
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from rich.console import Console
from support.runs import invoke

from llmtune.cli.doctor import Check, _show, check_threads, count_cores

SCRIPT = """
import json, sys, time
for name in sys.argv[1:]:
    sys.modules[name] = None
from rich.console import Console
from llmtune.cli.doctor import examine
start = time.process_time()  # another process on this machine is no fault of ours
found = examine(Console(stderr=True, width=150))
print(json.dumps(found | {"seconds": time.process_time() - start, "heavy": "torch" in sys.modules}))
"""


def examine(*absent: str, **environment: str) -> tuple[dict, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *absent],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return json.loads(done.stdout), done.stderr


def state(found: dict, name: str) -> str:
    return next(check["state"] for check in found["checks"] if check["name"] == name)


def test_a_whole_machine_is_ready_and_the_table_says_what_it_is() -> None:
    found, table = examine()
    assert found["ready"]
    assert table.rstrip().endswith("ready")
    for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "device", "memory", "disk"):
        assert state(found, name) in {"good", "note"}
        assert name in table
    assert found["packages"]["torch"] in table
    assert not found["heavy"]
    assert found["seconds"] < 3
    assert found["memory_limit_bytes"] <= found["memory_bytes"]


@pytest.mark.parametrize("absent", ["torch", "bitsandbytes"])
def test_what_cannot_be_imported_or_made_is_named_with_its_cure(absent: str, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    found, table = examine(absent, LLMTUNE_CACHE=str(tmp_path / "file" / "cache"))
    assert not found["ready"]
    assert {state(found, name) for name in (absent, "cache")} == {"missing"}
    assert f"pip install --force-reinstall {absent}" in table
    assert "export LLMTUNE_CACHE=FOLDER" in table
    assert "Traceback" not in table


def test_a_library_outside_the_tested_versions_is_noted_with_what_to_type(tmp_path) -> None:
    for name, version in (("peft", "0.19.1"), ("rich", "13.0.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    found, table = examine(PYTHONPATH=path)
    noted = {
        check["name"]: check for check in found["checks"] if check["state"] == "note" and check["name"] in "peft rich"
    }
    assert noted.keys() == {"peft", "rich"}
    assert noted["peft"]["found"].startswith("0.19.1; llmtune is tested with ")
    (bound,) = (one for one in requires("llmtune-cli") if one.startswith("rich"))
    assert noted["rich"]["fix"] == f"pip install '{bound}'"
    assert noted["rich"]["fix"] in table
    assert found["ready"]
    assert found["seconds"] < 3


def test_more_threads_than_a_quota_allows_are_noted_with_what_to_type(tmp_path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000\n")
    assert count_cores(quota) == 1
    quota.write_text("max 100000\n")
    assert count_cores(quota) == count_cores(tmp_path / "absent") >= 1
    noted = check_threads(threads=8, cores=2)
    assert noted.state == "note"
    assert noted.fix == "llmtune run RECIPE --threads 2"
    assert check_threads(threads=2, cores=2).state == "good"


def test_a_command_that_cures_is_never_cut_on_a_narrow_terminal() -> None:
    command = "pip install --no-deps 'a-package==1.0' && python /home/ada/" + "a-long-folder/" * 9 + "script.py"
    console = Console(file=io.StringIO(), width=60)
    _show([Check("builtin:a-model", "note", "not installed; recipes that name it need it", command)], console)
    assert f"-> {command}\n" in console.file.getvalue()


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
