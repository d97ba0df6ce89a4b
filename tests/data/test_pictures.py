"""Pictures in rows: every form of row gives the same picture, and hostile files are refused by row."""

import json

import numpy as np
import pytest
from support.pictures import (
    data_url,
    draw,
    picture_bytes,
)

from llmtune.data.column_mapping import rename
from llmtune.data.pictures import PLACE, open_picture
from llmtune.data.row_formats import detect_format, map_columns, parse_row
from llmtune.data.row_hash import row_json
from llmtune.data.row_kind import hash_row

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
