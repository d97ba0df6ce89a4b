import io
import json
import os
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from rich.console import Console

from llmtune.cli.doctor import Check, check_threads, print_checks
from llmtune.model.builtin_models import PACKAGED

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


def test_a_complete_machine_is_ready_and_described_in_the_table() -> None:
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
def test_a_broken_import_or_folder_is_named_with_its_fix(absent: str, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    found, table = examine(absent, LLMTUNE_CACHE=str(tmp_path / "file" / "cache"))
    assert not found["ready"]
    assert {state(found, name) for name in (absent, "cache")} == {"missing"}
    assert f"pip install --force-reinstall {absent}" in table
    assert "export LLMTUNE_CACHE=FOLDER" in table
    assert "Traceback" not in table


def test_a_library_outside_the_tested_versions_is_noted_with_the_command(tmp_path) -> None:
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


def test_more_threads_than_cores_are_noted_with_the_command() -> None:
    noted = check_threads(threads=8, cores=2)
    assert noted.state == "note"
    assert noted.fix == "llmtune run RECIPE --threads 2"
    assert check_threads(threads=2, cores=2).state == "good"


def test_a_suggested_command_is_not_wrapped_on_a_narrow_terminal() -> None:
    command = "pip install --no-deps 'a-package==1.0' && python /home/ada/" + "a-long-folder/" * 9 + "script.py"
    console = Console(file=io.StringIO(), width=60)
    print_checks([Check("builtin:a-model", "note", "not installed; recipes that name it need it", command)], console)
    assert f"-> {command}\n" in console.file.getvalue()


def write_hub_model(cache: Path, name: str, files: dict[str, bytes | None]) -> None:
    """Write a model as the hub's library stores it; None is a file whose download was interrupted."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / "c0ffee"
    for part in (snapshot, folder / "blobs", folder / "refs"):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    for number, (file, content) in enumerate(files.items()):
        blob = folder / "blobs" / str(number)
        (snapshot / file).symlink_to(blob)
        if content is None:
            blob.with_suffix(".incomplete").write_bytes(b"part")
        else:
            blob.write_bytes(content)


def test_cached_models_are_listed_with_size_and_whether_they_are_complete(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    index = json.dumps({"weight_map": {"a": "1-of-2.safetensors", "b": "2-of-2.safetensors"}}).encode()
    shards = {"1-of-2.safetensors": bytes(2_000_000), "2-of-2.safetensors": None}
    write_hub_model(hub, "owner/whole", {"config.json": b"{}", "model.safetensors": bytes(3_000_000)})
    write_hub_model(hub, "owner/torn", {"config.json": b"{}", "model.safetensors.index.json": index, **shards})
    write_hub_model(hub, "owner/tokenizer-only", {"config.json": b"{}", "tokenizer.json": b"{}"})
    write_hub_model(hub, "owner/no-model", {"README.md": b"text"})
    (name, entry), *_ = PACKAGED.items()
    converted = tmp_path / "cache" / "models" / f"{name}-{entry.sha256[:16]}-{entry.conversion}"
    converted.mkdir(parents=True)
    (converted / "model.safetensors").write_bytes(bytes(1_000_000))
    found, table = examine(HF_HUB_CACHE=str(hub), LLMTUNE_CACHE=str(tmp_path / "cache"))
    cached = {one["name"]: one for one in found["checks"] if one["name"].startswith("cached")}
    assert [*cached] == [
        f"cached builtin:{name}",
        "cached owner/tokenizer-only",
        "cached owner/torn",
        "cached owner/whole",
    ]
    assert cached[f"cached builtin:{name}"]["found"] == f"1 MB in {converted}"
    assert (cached["cached owner/whole"]["state"], cached["cached owner/whole"]["found"][:5]) == ("good", "3 MB ")
    assert cached["cached owner/torn"]["found"].startswith("incomplete, 2-of-2.safetensors missing; 2 MB")
    assert cached["cached owner/torn"]["fix"] == "hf download owner/torn"
    assert cached["cached owner/tokenizer-only"]["found"].startswith("incomplete, weights missing")
    assert found["ready"]
    assert "-> hf download owner/torn" in table


def test_a_machine_without_models_says_so(tmp_path: Path) -> None:
    found, _ = examine(HF_HUB_CACHE=str(tmp_path / "none"), LLMTUNE_CACHE=str(tmp_path / "cache"))
    assert state(found, "cached models") == "good"
