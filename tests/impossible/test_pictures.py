"""Pictures: what could go wrong between a file and the model without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.image_text import build_image_text
from support.pictures import draw, write_animated
from support.runs import invoke, write_recipe
from transformers import AutoModelForImageTextToText, AutoProcessor

QUIET = {"evaluate": None, "generation": None, "adapter": {"method": "full", "r": None, "lora_alpha": None}}


@pytest.fixture
def pictured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write rows about twelve pictures, one of them named by the test, and run a command on them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "4000")
    build_image_text(tmp_path / "model", "gemma3")
    for number in range(12):
        draw(number).save(tmp_path / f"{number}.png")

    def command(word: str, first: str = "0.png", code: int = 0, out: str = "run", **data: Any) -> str:
        names = [first, *(f"{number}.png" for number in range(1, 12))]
        rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "image": name} for n, name in enumerate(names)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        split = {"validation": 0, "test": 0, "deduplicate": "none", "max_dropped": 0, **data}
        write_recipe(tmp_path / "recipe.yaml", "./model", "rows.jsonl", data=split, **QUIET)
        result = invoke(word, "recipe.yaml", "--out", out)
        assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
        return " ".join(result.stderr.split())

    return command


@pytest.mark.guarantee(
    24,
    cannot="a picture with another number of tokens than the model makes features of it",
    kept="Before step 1, the tokens of the pictures of every row are counted, and compared with the features of the "
    "model's own tower.",
    shows="error rows.jsonl:1: the row has 5 image tokens for 1 pictures (0.png: 5 tokens), of which the model makes 4 "
    "features",
    also=["tasks/test_image_chat.py"],
    cases=["picture_reaches_the_model", "picture_cut_off"],
)
def test_the_tokens_of_every_picture_are_counted_before_training(
    pictured: Callable[..., str], shows: Callable[[object], None], tmp_path: Path
) -> None:
    path = tmp_path / "model/processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_seq_length": 5}))
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    inputs = processor(text=processor.boi_token, images=draw(0), return_tensors="pt")
    with pytest.raises(ValueError, match="do not match"):  # in the step that meets the row, and without its name
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model")(**inputs)
    shows(pictured("train", code=3))
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.guarantee(
    25,
    cannot="a label on a token of a picture",
    kept="The spans to learn are found in the text without its pictures. Their tokens have no label, also with "
    "`data.train_on: all`.",
    shows=">>>text<<< is learned...<<<<start_of_image><image_soft_token> [... 3 more ...] <end_of_image>>>>",
    also=["tasks/test_image_chat.py"],
    cases=["labels_on_image_tokens", "mask_with_a_picture"],
)
def test_no_token_of_a_picture_is_learned(
    pictured: Callable[..., str], shows: Callable[[object], None], without: Any
) -> None:
    picture = "<start_of_image><image_soft_token> [... 3 more ...] <end_of_image>"
    with without("llmtune.tasks.image_chat._unlabel", lambda example, images: _keep_labels(example)):
        learned = pictured("prepare", train_on="all")
    assert picture in learned
    assert f"<<<{picture}>>>" not in learned
    shows(pictured("prepare", out="guarded", train_on="all"))


def _keep_labels(example: Any) -> Any:
    from llmtune.data.example import ImageExample

    return ImageExample.of(example)


@pytest.mark.guarantee(
    26,
    cannot="a picture that a decoder reads differently from a person, or not at all",
    kept="Every picture is decoded before a model is loaded. Damaged, animated and huge files, and paths out of the "
    "folder of the rows, are refused by row.",
    shows="rows.jsonl:1: picture animated: message 1: ...moving.gif has several frames; save one of them",
    also=["data/test_pictures.py", "data/test_picture_files.py"],
)
def test_a_hostile_picture_is_refused_by_row(
    pictured: Callable[..., str], shows: Callable[[object], None], tmp_path: Path
) -> None:
    write_animated(tmp_path / "moving.gif")
    with Image.open(tmp_path / "moving.gif") as image:
        assert image.convert("RGB").size  # Pillow alone takes the first frame, without a word
    shows(pictured("prepare", "moving.gif", code=3))


@pytest.mark.guarantee(
    27,
    cannot="a photo that the model sees upside down",
    kept="The orientation in a photo's EXIF data is applied once, when a picture is read, and the data report counts "
    "it.",
    shows="Converted: 1 turned upright by EXIF.",
    also=["data/test_pictures.py::test_the_orientation_of_a_photo_is_applied_once"],
    cases=["turned_picture"],
)
def test_a_turned_photo_is_upright(
    pictured: Callable[..., str], shows: Callable[[object], None], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = draw(0).rotate(180)
    turned.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(turned))  # Pillow alone ignores it
    shows(pictured("prepare", "photo.png"))
