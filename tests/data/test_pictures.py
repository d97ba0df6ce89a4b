"""Pictures in rows: every form of row gives the same picture, and hostile files are refused by row."""

import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from support.pictures import (
    data_url,
    deep_png,
    draw,
    picture_bytes,
    save,
    write_animated,
    write_bomb,
    write_cut,
    write_link_out,
    write_pipe,
)

from llmtune.data.column_mapping import rename
from llmtune.data.pictures import PLACE, open_picture, picture_name, read_picture
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_formats import detect_format, map_columns, parse_row
from llmtune.data.row_hash import row_json
from llmtune.data.row_kind import hash_row, write_prompt
from llmtune.errors import DataError

QUESTION = "What is it?"
TEXT = {"type": "text", "text": QUESTION}


def read(row, folder, task="chat"):
    row_format = detect_format([row], task, {}, None, "file")
    return parse_row(rename(row, map_columns(row_format, [row], task, {})), row_format, task, folder)


def chat(content, **columns):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A dot."}], **columns}


def with_part(**part):
    return chat([part, TEXT])


def pair(text):
    return {"prompt": text, "completion": "A dot."}


URL = data_url(1)
BASE64 = URL.partition(",")[2]
FORMS = {
    "image_url": with_part(type="image_url", image_url={"url": "1.png", "detail": "low"}),
    "image_url as text": with_part(type="image_url", image_url=URL),
    "input_image": with_part(type="input_image", image_url=URL),
    "path": with_part(type="image", path="1.png"),
    "url of a file": with_part(type="image", url="1.png"),
    "base64": with_part(type="image", base64=BASE64),
    "image": with_part(type="image", image="1.png"),
    "Anthropic's source": with_part(type="image", source={"type": "base64", "data": BASE64}),
    "a part and a column": {**with_part(type="image"), "images": ["1.png"]},
    "a mark and a column": chat("<image>What is it?", images=["1.png"]),
    "a column alone": chat(QUESTION, images=["1.png"]),
    "one image": chat(QUESTION, image="1.png"),
    "paths in objects": chat(QUESTION, images=[{"path": "1.png"}]),
    "bytes": chat(QUESTION, images=[{"bytes": picture_bytes(1), "path": "1.png"}]),
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A dot."}],
        "images": ["1.png"],
    },
    "alpaca": {"instruction": "<image>What is it?", "output": "A dot.", "images": ["1.png"]},
    "prompt and completion": {**pair("<image>What is it?"), "image": "1.png"},
    "a table": {"image": "1.png", "question": QUESTION, "answer": "A dot."},
    "a folder's table": {"file_name": "1.png", "question": QUESTION, "answer": "A dot."},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_row_gives_the_same_conversation(form, tmp_path):
    (tmp_path / "1.png").write_bytes(picture_bytes(1))
    row = read(FORMS[form], tmp_path)
    user, answer = row["messages"]
    assert user["content"] == f"{PLACE}{QUESTION}"
    assert answer == {"role": "assistant", "content": "A dot."}
    assert json.loads(row_json(row)) == row
    assert np.array_equal(np.asarray(open_picture(user["images"][0])), np.asarray(draw(1)))
    assert hash_row(row) == hash_row(read(FORMS["path"], tmp_path))


def test_a_picture_alone_is_the_message_of_a_row_without_a_question(tmp_path):
    save(tmp_path / "1.png")
    assert read({"file_name": "1.png", "text": "A dot."}, tmp_path)["messages"][0]["content"] == PLACE


def test_pictures_take_their_places_in_order_over_all_messages(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path / f"{number}.png", number)
    turns = ["<image>and<image>?", "Yes.", [{"type": "image", "path": "3.png"}, {"type": "text", "text": "now<image>"}]]
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate([*turns, "No."])]
    row = read({"messages": messages, "images": ["1.png", "2.png", "1.png"]}, tmp_path)
    first, _, last, _ = row["messages"]
    assert (first["content"], last["content"]) == (f"{PLACE}and{PLACE}?", f"{PLACE}now{PLACE}")
    assert [picture_name(one) for one in first["images"] + last["images"]] == ["1.png", "2.png", "3.png", "1.png"]
    assert "[image: 1.png]and[image: 2.png]?" in write_prompt(row)


BAD_ROWS = {
    "fewer places": (chat("<image>?", images=["1.png", "1.png"]), "pictures and places differ: 1 places"),
    "more places": (chat("<image><image>?", images=["1.png"]), "pictures and places differ: 2 places"),
    "no picture": (with_part(type="image"), "pictures and places differ: 1 places"),
    "an address": (with_part(type="image", url="https://example.org/1.png"), "llmtune fetches no addresses"),
    "the character": (chat(f"{PLACE}<image>?", images=["1.png"]), "not a character"),
    "no base64": (
        with_part(type="image_url", image_url="data:image/png;base64,*"),
        "message 1: the data URL is not base64",
    ),
    "a plain data URL": (with_part(type="image_url", image_url="data:image/svg+xml,<svg/>"), "without ';base64,'"),
    "a number": (chat("?", images=[7]), "a picture is a number"),
    "an answer": (
        {
            "messages": [
                {"role": "user", "content": "Draw."},
                {"role": "assistant", "content": [TEXT, {"type": "image"}]},
            ]
        },
        "picture in an answer: a message of the assistant",
    ),
    "a mark in an answer": (pair("Draw.") | {"completion": "<image>", "images": ["1.png"]}, "picture in an answer"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_whose_pictures_and_places_do_not_fit_is_refused(name, tmp_path):
    save(tmp_path / "1.png")
    row, reason = BAD_ROWS[name]
    with pytest.raises(RowError, match=reason):
        read(row, tmp_path)


@pytest.mark.parametrize("task", ["completion", "preference"])
def test_other_tasks_refuse_pictures_by_name(task, tmp_path):
    row = {"prompt": "q", "completion": "a", "image": "1.png", "images": ["1.png"]}
    if task == "preference":
        part = [{"type": "image", "path": "1.png"}, TEXT]
        row = {"prompt": [{"role": "user", "content": part}], "chosen": "a", "rejected": "b"}
    with pytest.raises(RowError, match=r"only `task: chat` learns|preferences with pictures"):
        read(row, tmp_path, task)


@pytest.mark.parametrize("column", [{}, {"images": []}, {"image": ""}, {"image": None}, {"image_path": "1.png"}])
def test_a_mark_without_a_picture_is_never_read_as_text(column, tmp_path):
    with pytest.raises(RowError, match=r"picture missing: message 1 has <image>, but no picture in a column"):
        read(chat("<image>What is it?", **column), tmp_path)


def test_an_answer_about_the_mark_is_text(tmp_path):
    row = {"messages": [{"role": "user", "content": "HTML?"}, {"role": "assistant", "content": "Use <image>."}]}
    assert read(row, tmp_path) == row


def write_text(path, text="<svg xmlns='http://www.w3.org/2000/svg'/>"):
    path.write_text(text)
    return path


HOSTILE = {
    "cut.png": (write_cut, "picture unreadable"),
    "cut.jpg": (write_cut, "picture unreadable"),
    "cut.webp": (write_cut, "picture unreadable"),
    "cut.bmp": (write_cut, "picture unreadable"),
    "cut.tif": (write_cut, "picture unreadable"),
    "one.png": (lambda path: save(path, size=(1, 1)), "picture too small"),
    "long.png": (lambda path: save(path, size=(30_000, 2)), "picture too small"),
    "narrow.png": (lambda path: save(path, size=(3_000, 10)), "picture too narrow"),
    "bomb.png": (write_bomb, "picture too large"),
    "less.png": (lambda path: write_bomb(path, 8_000), "picture too large.* 8,000 x 8,000 pixels"),
    "text.png": (write_text, "not a picture"),
    "drawing.svg": (write_text, "not a picture"),
    "page.eps": (lambda path: write_text(path, "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not a picture"),
    "two.gif": (write_animated, "picture animated"),
    "two.webp": (write_animated, "picture animated"),
    "two.png": (write_animated, "picture animated"),
    "two.tif": (write_animated, "picture animated"),
    "nothing.png": (lambda path: path.write_bytes(b""), "picture empty"),
    "folder.png": (lambda path: path.mkdir(), "picture unreadable.* a folder"),
    "pipe.png": (write_pipe, "picture unreadable.* a pipe"),
    "link.png": (write_link_out, "picture outside the folder"),
    "circle.png": (lambda path: path.symlink_to(path), "picture unreadable"),
    "none.png": (lambda path: None, "picture missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(20)
def test_a_hostile_file_is_refused_with_its_reason(name, tmp_path):
    (tmp_path / "rows").mkdir()
    write, reason = HOSTILE[name]
    write(tmp_path / "rows" / name)
    with pytest.raises(RowError, match=reason) as error:
        read_picture(name, tmp_path / "rows")
    assert name in error.value.detail


@pytest.mark.parametrize(
    ("name", "reason"),
    [("a\0.png", "contains NUL"), ("../1.png", "outside the folder"), ("sub/../../1.png", "outside"), ("", "is text")],
)
def test_a_path_out_of_the_folder_is_refused(name, reason, tmp_path):
    save(tmp_path / "1.png")
    (tmp_path / "rows").mkdir()
    with pytest.raises(RowError, match=reason):
        read_picture(name, tmp_path / "rows")
    assert read_picture(str(tmp_path / "1.png"), tmp_path / "rows")["size"] == [48, 40]


def test_hostile_files_need_less_than_a_gigabyte(tmp_path):
    save(tmp_path / "large.png", size=(8_160, 6_120), mode="RGBA")
    write_bomb(tmp_path / "bomb.png")
    program = f"""
from pathlib import Path
from llmtune.data.pictures import read_picture
from llmtune.data.rejected_rows import RowError
folder = Path({str(tmp_path)!r})
try:
    read_picture("bomb.png", folder)
except RowError as error:
    print(error.reason)
print(read_picture("large.png", folder)["size"])
status = Path("/proc/self/status").read_text().splitlines()  # the peak of getrusage includes the parent's
print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    reason, size, peak = result.stdout.split("\n")[:3]
    assert (reason, size) == ("picture too large", "[8160, 6120]")
    assert int(peak) < 2**20  # KiB


def test_the_orientation_of_a_photo_is_applied_once(tmp_path):
    image = draw(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "1.jpg", exif=exif, quality=95)
    picture = read_picture("1.jpg", tmp_path)
    assert (picture["size"], picture["converted"]) == ([40, 48], "turned upright by EXIF")
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270), dtype=int)
    assert abs(np.asarray(open_picture(picture), dtype=int) - upright).mean() < 8


def half_clear(mode):
    image = draw(1).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


def clear_palette():
    image = draw(1).quantize(16)
    image.info["transparency"] = 0
    return image


CONVERTED = {
    "rgba.png": (lambda: half_clear("RGBA"), "transparent parts on white"),
    "la.png": (lambda: half_clear("LA"), "transparent parts on white"),
    "palette.png": (lambda: draw(1).quantize(16), "palette to RGB"),
    "clear.png": (clear_palette, "transparent parts on white"),
    "grey.jpg": (lambda: draw(1, mode="L"), "grey to RGB"),
    "bits.png": (lambda: draw(1, mode="1"), "black and white to RGB"),
    "cmyk.jpg": (lambda: draw(1, mode="CMYK"), "CMYK to RGB"),
    "deep.png": (lambda: Image.fromarray(np.linspace(0, 65_535, 400).reshape(20, 20).astype(np.uint16)), "16 bit to 8"),
    "still.gif": (lambda: draw(1).quantize(16), "palette to RGB"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_every_mode_becomes_rgb_and_the_conversion_is_noted(name, tmp_path):
    make, note = CONVERTED[name]
    image = make()
    image.save(tmp_path / name)
    picture = read_picture(name, tmp_path)
    assert picture["converted"].startswith(note)
    shown = open_picture(picture)
    assert (shown.mode, list(shown.size)) == ("RGB", picture["size"])


def test_transparent_parts_are_white_and_deep_pictures_are_scaled(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(read_picture("clear.png", tmp_path)).getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((8, 8), 32_896, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert open_picture(read_picture("deep.png", tmp_path)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_deep_grey_picture_is_scaled_by_the_bits_in_use(bits, tmp_path):
    values = np.linspace(0, 2**bits - 1, 400).reshape(20, 20).astype(np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(values).save(tmp_path / name)
        picture = read_picture(name, tmp_path)
        assert picture["converted"].startswith("16 bit to 8" if bits == 16 else f"{bits} bit in 16 to 8")
        assert open_picture(picture).getextrema() == ((0, 255),) * 3


@pytest.mark.parametrize(("values", "kind"), [(np.uint8, "L"), (np.uint16, "I;16")])
def test_a_tiff_whose_zero_is_white_is_no_negative(values, kind, tmp_path):
    grey = np.tile(np.linspace(0, np.iinfo(values).max, 64).astype(values), (64, 1))
    Image.fromarray(grey).save(tmp_path / "white.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "white.tif") as stored:
        assert stored.mode == kind
        ends = [255, 0] if kind == "I;16" else np.asarray(stored)[0, [0, -1]].tolist()
    shown = np.asarray(open_picture(read_picture("white.tif", tmp_path)))
    assert shown[0, [0, -1], 0].tolist() == ends


def grey_png(depth: int, key: int) -> bytes:
    """A row of 8 pixels of value `key` between rows of zeros, with `key` as the transparent value."""
    rows = [[0] * 8, [key] * 8] * 8
    packed = [b"\0" + int("".join(f"{pixel:0{depth}b}" for pixel in row), 2).to_bytes(depth, "big") for row in rows]
    header = struct.pack(">IIBBBBB", 8, 16, depth, 0, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": struct.pack(">H", key), b"IDAT": zlib.compress(b"".join(packed)), b"IEND": b""}
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("depth", "key"), [(1, 1), (2, 1), (4, 7), (8, 100)])
def test_a_transparent_grey_value_is_white_at_every_depth(depth, key):
    shown = np.asarray(open_picture(read_picture(grey_png(depth, key), None)))
    assert (shown[0, 0, 0], shown[1, 0, 0]) == (0, 255)


def test_a_transparent_value_of_16_bits_is_refused():
    with pytest.raises(RowError, match="a transparent colour of 16 bits"):
        read_picture(grey_png(16, 1000), None)


@pytest.mark.parametrize(("bits", "channels"), [(10, 3), (12, 3), (12, 2), (12, 4), (16, 3)])
def test_a_deep_picture_of_several_channels_is_refused_if_its_upper_bits_are_empty(bits, channels):
    values = np.linspace(0, 2**bits - 1, 400 * channels).reshape(20, 20, channels)
    if bits == 16:
        picture = read_picture(deep_png(values), None)
        assert picture["converted"] == "16 bit to 8"
        assert max(high for _, high in open_picture(picture).getextrema()) == 255
    else:
        with pytest.raises(RowError, match=f"no value above {2**bits - 1:,} of 65,535; scale them to 8 bits"):
            read_picture(deep_png(values), None)


def test_the_content_decides_and_not_the_ending(tmp_path):
    (tmp_path / "1.png").write_bytes(picture_bytes(1, "JPEG", quality=95))
    assert read_picture("1.png", tmp_path)["size"] == [48, 40]


def test_a_picture_that_changed_after_its_row_was_read_is_refused(tmp_path):
    picture = read_picture(str(save(tmp_path / "1.png")), tmp_path)
    save(tmp_path / "1.png", 2)
    with pytest.raises(DataError, match="the picture changed after its row was read"):
        open_picture(picture)


def test_a_row_without_a_file_only_has_pictures_inside(tmp_path):
    save(tmp_path / "1.png")
    with pytest.raises(RowError, match="only data URLs are read here"):
        read_picture(str(tmp_path / "1.png"), None)
    assert read_picture(data_url(1), None)["content"] == read_picture("1.png", tmp_path)["content"]


def test_pillow_is_not_imported_for_rows_of_text():
    program = "import sys, llmtune.data.preparation, llmtune.cli; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_phones_photo_with_a_second_view_is_its_first(tmp_path):
    draw(1).save(tmp_path / "1.jpg", "MPO", save_all=True, append_images=[draw(2)], quality=95)
    shown = np.asarray(open_picture(read_picture("1.jpg", tmp_path)), dtype=int)
    assert abs(shown - np.asarray(draw(1), dtype=int)).mean() < 8
