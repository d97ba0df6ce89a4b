"""Each retired command, option, key and metric is refused with its replacement."""

import json
from pathlib import Path

import pytest
from support.runs import invoke, write_recipe

from llmtune.recipe.retired import RETIRED, SBATCH

PAGE = Path(__file__).resolve().parents[2] / "docs" / "retired.md"
CHECK = ("recipes", "check", "tiny.yaml", "--set")
COMMANDS = {
    "--strategy zero2": ["launch", "local", "tiny.yaml", "--processes", 2, "--strategy", "zero2"],
    "--strategy zero3": ["launch", "slurm", "tiny.yaml", "--dry-run", "--strategy", "zero3"],
    "--strategy deepspeed": ["launch", "local", "tiny.yaml", "--strategy", "deepspeed"],
    "--strategy tp": ["launch", "local", "tiny.yaml", "--processes", 2, "--strategy", "tp"],
    "launch sky": ["launch", "sky", "tiny.yaml", "--gpus", "H100:8", "--use-spot", "--dry-run"],
    "launch kubernetes": ["launch", "kubernetes", "tiny.yaml", "--image", "llmtune:1"],
    "sweep": ["sweep", "tiny.yaml", "--space", "space.yaml"],
    "launch slurm --follow": ["launch", "slurm", "tiny.yaml", "--follow"],
    **{f"launch slurm --{name}": ["launch", "slurm", "tiny.yaml", f"--{name}", "1"] for name in SBATCH},
    "doctor FOLDER": ["doctor", "."],
    "deploy serve --max-batch": ["deploy", "serve", "runs/tiny", "--max-batch", 4],
    "deploy serve RUN RUN": ["deploy", "serve", "--adapter", "one=runs/one", "--adapter", "two=runs/two"],
    "evaluate.fairness.pairs": [*CHECK, "evaluate.fairness.pairs=[own]"],
    **{name: [*CHECK, f"evaluate.gates=['{name} > base']"] for name in RETIRED if name.startswith("fairness.")},
}


def test_all_retired_options_of_a_command_are_named_at_once():
    said = " ".join(invoke("launch", "slurm", "x.yaml", "--follow", "--time=3", "--mem", "4").stderr.split())
    said = said.replace("│ │ ", "")
    assert all(RETIRED[f"launch slurm --{name}"] in said for name in ("follow", "time", "mem")), said


@pytest.mark.parametrize("name", COMMANDS)
def test_retired_names_are_refused_with_their_replacement(name, here):
    (here / "rows.csv").write_text("question,answer\nWhere is my parcel?,On its way.\n")
    write_recipe(here / "tiny.yaml", "owner/model", "rows.csv")
    result = invoke(*COMMANDS[name])
    assert result.exit_code == 2, result.stderr
    said = " ".join(result.stderr.replace("│", " ").split())
    assert "was removed" in said
    assert name.split()[-1] in said
    assert RETIRED[name] in said


@pytest.mark.parametrize("words", [["sweep"], ["launch", "sky"], ["serve", "run"]])
def test_a_retired_command_prints_one_document_with_json_and_has_no_help(words: list[str]) -> None:
    assert json.loads(invoke(*words, "--json").stdout)["error"]["exit_code"] == 2
    assert invoke(*words, "--help").exit_code == 2


def test_the_docs_page_has_each_replacement():
    page = PAGE.read_text().replace("`", "")
    assert not [name for name, instead in RETIRED.items() if instead.replace("`", "") not in page]


def test_each_retired_name_is_tested():
    elsewhere = {
        "GET /metrics": "tests/serve/test_api.py",
        "deploy certify FILE.xml": "tests/deploy/test_onnx_export.py",
    }
    assert RETIRED.keys() - COMMANDS.keys() == elsewhere.keys()
