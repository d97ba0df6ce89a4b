from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from support.browser import browse, browser, with_script
from support.classifying import colour_rows, recipe_for
from support.families import build_bert
from support.finished import finish_run
from support.models import build_llama
from typer.testing import CliRunner, Result

from llmtune.cli.app import app
from llmtune.explain.adapter import Map, arrange, explain_adapter, together
from llmtune.explain.adapter_weights import find_carriers, read_carriers
from llmtune.explain.target import open_subject
from llmtune.pipeline import run_pipeline
from llmtune.recipe import load_recipe
from llmtune.session import Options

QUICK = {"train": {"num_train_epochs": 1}, "evaluate": {"metrics": ["loss"]}}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return finish_run(folder, build_llama(folder / "llama", layers=3), **QUICK)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    adapter = {"method": "full", "r": None, "lora_alpha": None}
    return finish_run(folder, build_llama(folder / "llama"), adapter=adapter, **QUICK)


@pytest.fixture(scope="module")
def class_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    sections = {"adapter": {"r": 4, "lora_alpha": 8, "bias": "lora_only"}, "train": {"num_train_epochs": 1}}
    recipe = recipe_for(folder / "classes.yaml", build_bert(folder / "bert"), colour_rows(), **sections)
    run_pipeline(load_recipe(str(recipe)), Options(out=folder / "run"), quiet())
    return folder / "run"


def look(run: Path, out: Path) -> Map:
    return explain_adapter(open_subject(str(run), quiet(), offline=True), out, quiet())[0]


def invoke(*arguments: object, command: str = "adapter") -> Result:
    return CliRunner().invoke(app, ["explain", command, *map(str, arguments)], env={"COLUMNS": "140"})


def expect(result: Result, code: int, *words: str) -> None:
    shown = " ".join(result.stderr.split())
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    for word in words:
        assert word in shown, shown


def test_moves_are_those_of_the_adapter_on_disk(chat_run: Path, tmp_path: Path):
    found = look(chat_run, tmp_path)
    weights = load_file(chat_run / "adapter" / "adapter_model.safetensors")
    base = load_file(chat_run.parent.parent / "llama" / "model.safetensors")
    assert found.rows == ("0", "1", "2")
    assert found.columns == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(found.cells) == 21
    assert found.beside == ()
    for (row, column), move in found.cells.items():
        assert f".{row}." in move.module
        assert move.module.endswith(column)
        low = {side: weights[f"base_model.model.{move.module}.lora_{side}.weight"] for side in "AB"}
        expected = float((2.0 * low["B"].double() @ low["A"].double()).norm())  # lora_alpha / r = 8 / 4
        assert move.change == pytest.approx(expected, rel=1e-4)
        assert move.weight == pytest.approx(float(base[f"{move.module}.weight"].norm()), rel=1e-5)
        assert move.rank == 4


def test_the_command_writes_page_pictures_and_numbers(chat_run: Path, tmp_path: Path):
    result = invoke(chat_run, "--out", tmp_path)
    expect(result, 0, "adapter.html", "adapter.png", "adapter.svg", "adapter.json")
    for word in ("The 21 modules", "q_proj", "of 4", "layer 0 to 2", "What moved most"):
        assert word in result.stdout, word
    told = json.loads((tmp_path / "adapter.json").read_text())
    assert len(told["moves"]) == 21
    assert told["relative"] == pytest.approx(together(look(chat_run, tmp_path).moves))
    assert set(told["by_layer"]) == {"0", "1", "2"}
    with Image.open(tmp_path / "adapter.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    ElementTree.parse(tmp_path / "adapter.svg")
    page = (tmp_path / "adapter.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"https?://", page)
    assert page.count("data-cell=") == 21


def test_json_alone_is_printed_where_it_is_asked_for(chat_run: Path, tmp_path: Path):
    told = json.loads(invoke(chat_run, "--out", tmp_path, "--json").stdout)
    assert {Path(name).name for name in told["files"]} == {
        "adapter.html",
        "adapter.png",
        "adapter.svg",
        "adapter.json",
    }


def test_without_out_the_pages_lie_in_the_run_and_its_report_links_to_them(chat_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(chat_run, run)
    expect(invoke(run), 0, "linked from:")
    expect(invoke(run, "--no-measure", command="model"), 0, "linked from:")
    report = (run / "report.html").read_text()
    assert 'href="explain/adapter.html"' in report
    assert 'href="explain/model.html"' in report


def test_a_full_training_is_held_against_the_base(full_run: Path, tmp_path: Path):
    found = look(full_run, tmp_path)
    tuned = load_file(full_run / "weights" / "model.safetensors")
    base = load_file(full_run.parent.parent / "llama" / "model.safetensors")
    assert {move.module for move in found.moves} == {name.removesuffix(".weight") for name in base}
    for move in found.moves:
        old, new = base[f"{move.module}.weight"].double(), tuned[f"{move.module}.weight"].double()
        assert move.change == pytest.approx(float((new - old).norm()), rel=1e-5)
        assert move.change > 0
        if old.ndim == 2:
            singular = torch.linalg.svdvals(new - old)
            shares = singular / singular.sum()
            assert move.effective_rank == pytest.approx(
                float(torch.exp(-torch.special.xlogy(shares, shares).sum())), rel=1e-3
            )
    assert [move.module for move in found.beside] == ["model.embed_tokens", "model.norm"]
    assert "input_layernorm" in found.columns


def test_a_head_and_biases_are_told_beside_the_adapter(class_run: Path, tmp_path: Path):
    found = look(class_run, tmp_path)
    kinds = {kind: [move for move in found.moves if move.kind == kind] for kind in ("LoRA", "bias", "whole")}
    assert len(kinds["LoRA"]) == 12
    assert len(kinds["bias"]) == 12
    assert all(move.module.endswith(".bias") for move in kinds["bias"])
    assert "query.bias" in found.columns
    assert [move.module for move in kinds["whole"]][-1] == "classifier"
    assert found.new_head
    assert "from a random start" in (tmp_path / "adapter.html").read_text()


def test_carriers_are_what_the_run_says_it_trained(chat_run: Path, class_run: Path, full_run: Path, tmp_path: Path):
    for run in (chat_run, class_run):
        carriers = find_carriers(open_subject(str(run), quiet(), offline=True))
        report = json.loads((run / "report.json").read_text())
        assert carriers.parameters == report["adapter"]["trainable"]
    lora = read_carriers(chat_run / "adapter")["model.layers.0.mlp.down_proj"]
    assert (lora.kind, lora.rank, lora.parameters) == ("LoRA", 4, 4 * (64 + 128))
    head = read_carriers(class_run / "adapter")["classifier"]
    assert (head.kind, head.parameters) == ("whole", 3 * 64 + 3)
    told = json.loads(invoke(full_run, "--out", tmp_path, "--no-measure", "--json", command="model").stdout)
    assert told["trained"] == {"method": "full", "modules": {}, "parameters": 0}


def test_the_drawing_marks_what_was_trained(class_run: Path, tmp_path: Path):
    result = invoke(class_run, "--out", tmp_path, "--no-measure", command="model")
    expect(result, 0)
    drawing = (tmp_path / "model.svg").read_text()
    assert drawing.count("LoRA r 4") == 6
    assert drawing.count("trained whole") >= 1
    assert "LoRA on 12 modules" in result.stdout


def test_an_adapter_on_some_layers_is_marked_so(tmp_path: Path):
    run = finish_run(
        tmp_path,
        build_llama(tmp_path / "llama", layers=3),
        adapter={"layers_to_transform": [2], "target_modules": ["q_proj"]},
        **QUICK,
    )
    result = invoke(run, "--out", tmp_path / "out", "--no-measure", command="model")
    assert "LoRA r 4 in 1 of 3" in result.stdout
    found = look(run, tmp_path / "out")
    assert (found.rows, found.columns) == (("2",), ("q_proj",))


def test_moves_of_two_halves_have_rows_of_their_own(chat_run: Path):
    subject = open_subject(str(chat_run), quiet(), offline=True)
    from llmtune.explain.weight_delta import Move

    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q", "lm_head"]
    found = arrange(subject, [Move(name, "LoRA", 1.0, 2.0, 9) for name in names])
    assert found.rows == ("encoder 0", "decoder 0")
    assert found.columns == ("q",)
    assert [move.module for move in found.beside] == ["lm_head"]


def test_a_plain_model_has_no_adapter(tiny_llama: Path, tmp_path: Path):
    expect(invoke(tiny_llama), 2, "a model by itself has no adapter", "runs/<name>-<hash>")
    expect(invoke("builtin:minilm-l6-v2"), 2, "a model by itself has no adapter")
    expect(invoke(tmp_path), 2, "it has no run.json")


def test_a_run_whose_model_is_gone_is_an_error_of_the_machine(chat_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(chat_run, run)
    text = (run / "recipe.yaml").read_text()
    gone = text.replace(str(chat_run.parent.parent / "llama"), str(tmp_path / "gone"))
    assert gone != text
    (run / "recipe.yaml").write_text(gone)
    lock = (run / "llmtune.lock").read_text()
    (run / "llmtune.lock").write_text(lock.replace(str(chat_run.parent.parent / "llama"), str(tmp_path / "gone")))
    for command in ("adapter", "model"):
        expect(invoke(run, command=command), 4, "gone")


def test_a_damaged_adapter_is_named(chat_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(chat_run, run)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in ("adapter", "model"):
        expect(invoke(run, command=command), 4, "adapter_model.safetensors", "is cut")
    shutil.rmtree(run / "adapter")
    expect(invoke(run), 4, "there is no adapter here")


def test_tuned_weights_that_are_gone_are_named(full_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    (run / "weights" / "model.safetensors").unlink()
    expect(invoke(run), 4, "weights are gone")


@browser
def test_choosing_a_measure_changes_the_cells(chat_run: Path, tmp_path: Path):
    expect(invoke(chat_run, "--out", tmp_path), 0)
    page = tmp_path / "adapter.html"
    choose = 'document.querySelector("[value=effective_rank]").click();'
    pages = (page, with_script(page, choose))
    cells = [re.findall(r"<td data-cell=[^>]*>([^<]*)</td>", browse(path)) for path in pages]
    assert all(len(found) == 21 for found in cells)
    assert all(cell.endswith("%") for cell in cells[0])
    assert all(1 <= float(cell) <= 4 for cell in cells[1])
