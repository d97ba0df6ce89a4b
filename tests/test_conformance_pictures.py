"""The conformance suite's cases on models that read pictures: their reference, and the mistakes that they name."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

TURNS = [("user", "<image>Which colour?"), ("assistant", "Blue.")]


@pytest.fixture(scope="module")
def load(load_benchmark: Callable[[str], Any]) -> Callable[[str], Any]:
    """Import a module of the suite by its name."""
    return lambda name: load_benchmark(f"conformance.{name}")


@pytest.fixture(scope="module")
def reference(load: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = load("models").build_model("gemma3", tmp_path_factory.mktemp("models") / "gemma3")
    return load("reference").Reference(folder)


def result(load: Any, **changes: Any) -> Any:
    given = {"status": "done", "message": "", "log": "", "model": None, "configuration": {}}
    return load("case").Result(**{**given, "job": {"learning_rate": 1.0, "column": "default"}, **changes})


def judge(load: Any, reference: Any, case: str, **changes: Any) -> Any:
    case = importlib.import_module(f"conformance.cases.{case}").CASE
    return case.judge(case, reference, {"run": result(load, **changes)})


def test_the_text_and_the_picture_are_those_of_the_checkpoints_processor(load: Any, reference: Any) -> None:
    from transformers import AutoProcessor

    pictures = load("pictures")
    processor = AutoProcessor.from_pretrained(reference.folder)
    parts = load("formats").as_parts(pictures.row(*TURNS, images=[]))["messages"]
    text = processor.apply_chat_template(parts, tokenize=False)
    inputs = processor(text=text, images=pictures.open_picture("sky.png"), return_tensors="pt")
    ids, labels = reference.encode(
        pictures.gemma(*TURNS, learn=load("conversations").RIGHT["the answers and their ends"])
    )
    assert inputs["input_ids"][0].tolist() == ids
    assert reference.tokenizer.decode([label for label in labels if label != -100]) == "Blue.<end_of_turn>"
    torch.testing.assert_close(inputs["pixel_values"][0], pictures.read("sky.png"), atol=1e-6, rtol=0)
    seen = pictures.see(reference, ids, [pictures.read("sky.png")])
    assert torch.equal(inputs["token_type_ids"], seen["token_type_ids"])


def test_a_photo_is_upside_down_without_its_exif_data(load: Any, tmp_path: Path) -> None:
    read = load("pictures").read
    assert torch.equal(read("turned.jpg"), read("turned.jpg", upright=False).flip(1, 2))
    assert torch.equal(read("sky.png"), read("sky.png", upright=False))
    assert Path(load("pictures").draw("sky.png", tmp_path)).read_bytes() == load("pictures").encode("sky.png")


def test_a_picture_that_no_model_sees_gives_another_gradient(load: Any, reference: Any) -> None:
    case = importlib.import_module("conformance.cases.picture_reaches_the_model").CASE
    way = next(iter(case.right))
    right = reference.of(case.right[way])
    mistakes = [name for name in case.wrong if name.endswith(f": {way}")]
    assert len(mistakes) == 6
    apart = {name: load("reference").distance(reference.of(case.wrong[name]), right) for name in mistakes}
    assert min(apart.values()) > 0.05, apart
    assert all(name.startswith("language_model.") for name in right)


def test_a_content_with_a_mark_becomes_parts_in_its_order(load: Any) -> None:
    row = {"messages": [{"role": "user", "content": "Look: <image>Which?"}, {"role": "assistant", "content": "A."}]}
    texts = [{"type": "text", "text": text} for text in ("Look: ", "Which?", "A.")]
    parts = [turn["content"] for turn in load("formats").as_parts(row)["messages"]]
    assert parts == [[texts[0], {"type": "image"}, texts[1]], [texts[2]]]


def test_an_adapter_in_the_tower_is_found_under_each_of_its_names(load: Any, reference: Any, tmp_path: Path) -> None:
    language = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    towers = [
        "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.multi_modal_projector.linear.lora_A.weight",
    ]
    for case in ("adapter_in_the_tower", "adapter_where_it_sees"):
        for number, names in enumerate([[language], *([language, tower] for tower in towers), []]):
            folder = tmp_path / f"{case}-{number}"
            folder.mkdir()
            save_file({name: torch.ones(2, 2) for name in names}, folder / "adapter_model.safetensors")
            finding = judge(load, reference, case, model=folder)
            assert finding.verdict == ("right" if number == 0 else "silently wrong"), names
    assert finding.learned == "an adapter in the tower: 0 of 0 matrices"


def test_a_tower_that_lost_or_changed_a_tensor_is_not_the_bases(load: Any, reference: Any, tmp_path: Path) -> None:
    weights = load_file(reference.folder / "model.safetensors")
    name = next(name for name in weights if "vision_tower" in name and name.endswith("q_proj.weight"))
    newer = {key.replace("vision_tower.vision_model.", "model.vision_tower."): w for key, w in weights.items()}
    changed = weights[name].clone()
    changed[0, 0] += 1e-6
    bent = {**weights, name: changed}
    lost = {key: weight for key, weight in weights.items() if key != name}
    findings = []
    for number, merged in enumerate((weights, newer, bent, lost)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(merged, folder / "model.safetensors")
        findings.append(judge(load, reference, "tower_after_merge", found={"merged": folder}))
    assert [finding.verdict for finding in findings] == ["right", "right", "silently wrong", "silently wrong"]
    assert [finding.learned.partition(": ")[2] for finding in findings[2:]] == [
        "0 lost, 1 changed",
        "1 lost, 0 changed",
    ]


def test_a_folder_that_lost_a_file_of_the_processor_reads_no_picture_as_the_base_does(
    load: Any, reference: Any, tmp_path: Path
) -> None:
    findings = {}
    for lost in ("generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        folder = shutil.copytree(reference.folder, tmp_path / lost)
        (folder / lost).unlink()
        for case in ("processor_after_merge", "processor_after_merge_of_pictures"):
            findings[case, lost] = judge(load, reference, case, found={"merged": folder}).verdict
    assert {lost for (_, lost), verdict in findings.items() if verdict == "right"} == {"generation_config.json"}


def test_a_tool_that_reads_pictures_in_one_direction_has_one_case_for_it(
    load: Any, reference: Any, tmp_path: Path
) -> None:
    case = importlib.import_module("conformance.cases.picture_reaches_the_model").CASE
    other = importlib.import_module("conformance.cases.turned_picture").CASE
    way = next(iter(case.right))
    with reference.allowing({"one_way": True}):
        habit = reference.of(case.right[way])
        turned = reference.of(other.right[way])
    mistake = f"the picture read in one direction: {way}"
    assert load("reference").distance(habit, reference.of(case.wrong[mistake])) < 1e-6
    verdicts = {}
    for name, (judged, gradient) in {"own": (case, habit), "other": (other, turned)}.items():
        (folder := tmp_path / name).mkdir()
        step = {key: (weight - gradient[key]).contiguous() for key, weight in reference.start.items()}
        save_file(step, folder / "model.safetensors")
        trained = result(load, model=folder, found={"one_way": True})
        verdicts[name] = judged.decide(reference, {"run": trained}, load("statements").Statements())
    assert (verdicts["own"].verdict, verdicts["own"].learned.partition(";")[0]) == ("unexplained", mistake)
    assert verdicts["other"].verdict == "right"
