"""`gradient_checkpointing: auto` is decided once, printed, stored in run.json, and kept on resuming."""

import io
import json

import pytest
from rich.console import Console
from support.rows import chat, write_jsonl
from support.runs import write_recipe

from llmtune.adapter.injection import inject
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest

SAID = "train.gradient_checkpointing: auto recomputes activations"
WIDE, NARROW = 1 << 40, 1000


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_llama):
    place = tmp_path_factory.mktemp("settled")
    rows = write_jsonl(place / "rows.jsonl", [chat(f"What comes after {i}?", str(i + 1)) for i in range(40)])
    train = {"num_train_epochs": None, "max_steps": 2}
    return write_recipe(place / "tiny.yaml", tiny_llama, rows, train=train, model={"check_memory": False})


def run(recipe, folder, limit, until="train", sets=()):
    """Run on a device of `limit` bytes; return the output, and whether activations were recomputed."""
    console, enabled = Console(file=io.StringIO(), width=200), []
    enable = inject.__globals__["enable_checkpointing"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmtune.model.memory_plan.device_memory", lambda device: limit)
        patch.setitem(inject.__globals__, "enable_checkpointing", lambda model: enabled.append(1) or enable(model))
        run_pipeline(load_recipe(recipe, sets), RunRequest(out=folder, until=until), console)
    return console.file.getvalue(), bool(enabled)


def test_auto_is_on_only_if_memory_requires_it_and_is_kept(recipe, tmp_path):
    folder = tmp_path / "run"
    said, enabled = run(recipe, tmp_path / "wide", WIDE)
    assert (SAID in said, enabled) == (False, False)
    said, enabled = run(recipe, folder, NARROW, until="select")
    assert SAID in said
    said, enabled = run(recipe, folder, WIDE)  # with more memory the run resumes with its first decision
    assert (SAID in said, enabled) == (True, True)
    kept = json.loads((folder / "run.json").read_text())
    assert kept["findings"]["gradient_checkpointing"]["on"] is True
    assert kept["steps"]["select"]["facts"]["gradient_checkpointing"] is True
    facts = kept["steps"]["train"]["facts"]
    assert facts["seconds_to_first_step"] > facts["wall_seconds"] / facts["steps"] / 10
    assert facts["rehearsal_seconds"] > 0
    said, enabled = run(recipe, folder, WIDE)
    assert not enabled  # nothing is trained again
    assert "train unchanged, skipped" in said


def test_recomputation_changes_no_byte_and_a_stated_value_wins_over_memory(recipe, tmp_path):
    made = {}
    for stated, limit in {"false": NARROW, "true": WIDE}.items():
        # The same micro-batches for both: their size also depends on memory.
        sets = ["train.batch_size=1", f"train.gradient_checkpointing={stated}"]
        said, enabled = run(recipe, tmp_path / stated, limit, sets=sets)
        assert enabled is (stated == "true")
        assert SAID not in said
        made[stated] = (tmp_path / stated / "adapter" / "adapter_model.safetensors").read_bytes()
    assert made["true"] == made["false"]
