import pytest

from llmtune.errors import DataError, GateFailed, LlmtuneError, Problem, Stopped
from llmtune.records import ALONE, Layout
from llmtune.store import processes
from llmtune.store.run_folder import MANIFEST, Manifest, RunFolder, read_run

SECOND = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replace the test's environment with that of a launcher."""
    known: dict[str, str] = {}
    monkeypatch.setattr(processes.os, "environ", known)
    return known


def test_a_command_without_a_launcher_is_one_process(environment):
    assert (processes.rank(), processes.world_size(), processes.layout()) == (0, 1, ALONE)
    assert processes.once(lambda: [1, None]) == [1, None]
    environment |= SECOND
    assert (processes.rank(), processes.world_size(), processes.layout()) == (1, 4, Layout(4, 2))
    environment["LLMTUNE_STRATEGY"] = "fsdp"
    assert processes.layout() == Layout(4, 2, sharded=True)


@pytest.mark.parametrize(
    ("stated", "strategy"),
    [
        ({}, "ddp"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "fsdp"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "fp16"}, "ddp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed"),
    ],
)
def test_accelerate_decides_only_the_strategy(stated, strategy, environment):
    environment |= stated
    processes.start()
    assert processes.strategy() == strategy
    assert not [name for name in environment if name.startswith(("ACCELERATE_", "FSDP_"))]


@pytest.mark.parametrize(
    "error",
    [
        DataError.of("row 7 has no answer", "rows.jsonl:7", "Give it one."),
        Stopped(Problem("stopped"), signal_number=15),
        GateFailed(Problem("gate failed", "loss <= 1"), Problem("another")),
    ],
)
def test_an_error_survives_a_json_round_trip(error: LlmtuneError):
    found = processes.rebuild_error(processes.describe_error(error))
    assert (type(found), found.problems, found.exit_code) == (type(error), error.problems, error.exit_code)


def test_a_budget_found_by_one_process_is_kept_for_the_next_start(tmp_path, environment):
    folder = RunFolder(tmp_path, Manifest(fingerprint="a", steps={}, findings={"micro_batch_tokens": 512}))
    folder.write()
    written = (tmp_path / MANIFEST).read_bytes()
    environment |= SECOND
    RunFolder(tmp_path, {**folder.manifest, "findings": {}}).note_budget(256)
    assert (tmp_path / MANIFEST).read_bytes() == written, "rank 0 alone writes run.json"
    environment.clear()
    again = read_run(tmp_path)
    again.take_budget()
    assert again.findings["micro_batch_tokens"] == 256
    again.note_budget(128)
    again.take_budget()
    assert read_run(tmp_path).findings["micro_batch_tokens"] == 128
