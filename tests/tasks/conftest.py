"""Fixtures that several tasks share, made once: tones with transcripts, and a finished run of each variant."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.audio import write_tone
from support.pairs import quiet, recipe_of
from support.task_cases import CELLS, EVALUATED, RATES

from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of tones of several lengths; the pitch is the word."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["file_name,text"]
    words = ("one", "two", "three", "four", "five", "six")
    for i in range(30):
        write_tone(folder / f"{i}.wav", 0.4 + 0.02 * i, pitch_hz=200.0 * (1 + i % 6), seed=i)
        lines.append(f"{i}.wav,It's {words[i % 6]}.")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Callable[..., Path]:
    """Write the recipe of a case into a folder; speech rows are tones, whose pitch is the word."""
    models: dict[str, Path] = {}

    def write(name: str, folder: Path, **changes: Any) -> Path:
        case = (CELLS | EVALUATED)[name]
        if name not in models:
            models[name] = case.build(tmp_path_factory.mktemp("models") / name, **case.config)
        sections = {**case.sections, "adapter": {"method": case.method, "lora_dropout": 0.0, **case.adapter}}
        if case.method == "full":
            sections["adapter"] = {"method": "full"}
        sections["train"] = {"learning_rate": RATES[case.method], "num_train_epochs": 3}
        data = {"max_length": 64 if case.task == "qa" and case.variant == 0 else 128, **changes.pop("data", {})}
        if case.task == "speech":
            data["train"] = str(clips)
        return recipe_of(folder, models[name], case.rows, case.task, **sections, data=data, **changes)

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_file: Callable[..., Path]) -> Callable[[str], Any]:
    """The run folder of a case and its report, made once."""
    runs: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            recipe = load_recipe(str(recipe_file(name, folder)))
            runs[name] = folder / "run", run_pipeline(recipe, RunRequest(out=folder / "run"), quiet())
        return runs[name]

    return run
