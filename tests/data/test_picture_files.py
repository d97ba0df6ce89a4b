"""Files of rows with pictures: bad rows by line, splits by picture, the lock, and texts that are not slower."""

import json
import re

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from support.pictures import draw, picture_bytes, save, write_bomb, write_cut
from support.rows import make_recipe, prepare, rows_of, write_jsonl
from support.runs import invoke

from llmtune.data.data_notes import picture_blocks
from llmtune.data.data_report import describe_pictures
from llmtune.data.hub_datasets import as_files_hold_it
from llmtune.data.pictures import PLACE, read_picture, row_pictures
from llmtune.data.preparation import write_test_rows
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_kind import near_text, row_input
from llmtune.data.sources import list_sources
from llmtune.display.blocks import Page, Section
from llmtune.errors import DataError
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.report.render_html import to_html
from llmtune.report.render_markdown import to_markdown


def chat(path, question="What is it?", answer="A dot."):
    part = {"type": "image", "path": path}
    user = {"role": "user", "content": [part, {"type": "text", "text": question}]}
    return {"messages": [user, {"role": "assistant", "content": answer}]}


def shown(rows):
    """Return the hashes of the pictures of each split."""
    return {
        split: {picture["content"] for row in rows_of(rows, split) for picture in row_pictures(row)}
        for split in rows.files
    }


def write_table(folder, name="metadata.csv", head="file_name,text"):
    lines = [f"{save(folder / f'{n}.png', n).name},answer {n}" for n in range(1, 5)]
    (folder / name).write_text("\n".join([head, *lines]) + "\n")
    return folder


def test_a_folder_with_a_table_is_read_as_pictures_with_answers(tmp_path):
    rows = prepare(tmp_path, str(write_table(tmp_path / "pictures")))
    assert [row["messages"][0]["content"] for row in rows_of(rows)] == [PLACE] * 4
    assert [row["messages"][1]["content"] for row in rows_of(rows)] == [f"answer {n}" for n in range(1, 5)]


def test_a_table_of_file_names_is_read_next_to_its_pictures(tmp_path):
    write_table(tmp_path / "rows", "table.csv", "image,answer")
    rows = prepare(tmp_path, str(tmp_path / "rows" / "table.csv"))
    assert rows.counts["train"] == 4


@pytest.mark.parametrize("inside", [True, False])
def test_parquet_of_the_datasets_library_is_read(inside, tmp_path):
    paths = [str(save(tmp_path / f"{n}.png", n)) for n in (1, 2)]
    cells = [{"path": None, "bytes": picture_bytes(n)} for n in (1, 2)] if inside else paths
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    columns = {"image": cells, "question": ["What is it?"] * 2, "answer": ["one", "two"]}
    table = Dataset.from_dict(columns, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    rows = prepare(tmp_path, str(tmp_path / "rows.parquet"))
    pictures = [row_pictures(row)[0] for row in rows_of(rows)]
    assert all(one["picture"].startswith("data:image/png;base64,") for one in pictures) or not inside
    assert [one["size"] for one in pictures] == [[48, 40]] * 2
    assert pictures[0]["content"] != pictures[1]["content"]
    assert rows.filled == 0, "one of bytes and path is null in every row"


def table(folder, head, texts):
    """Write a table whose first column names pictures, and a Parquet file of the datasets library with the same."""
    names = [str(save(folder / f"{n}.png", n)) for n in range(1, 13)]
    cells = dict(zip(head, [names, *([text.format(n, n % 2) for n in range(1, 13)] for text in texts)], strict=True))
    data = Dataset.from_dict(cells)
    data.to_csv(folder / "table.csv")
    data.cast_column(head[0], ImageFeature()).to_parquet(folder / "table.parquet")
    return [str(folder / f"table.{ending}") for ending in ("csv", "parquet")]


OTHER_TASKS = sorted(TASK_FACTS.keys() - {"chat"})


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_a_task_without_pictures_is_never_advised_to_read_their_names(task, tmp_path):
    for file in table(tmp_path, ("picture", "kind"), ["kind {}"]):
        with pytest.raises(DataError) as refusal:
            prepare(tmp_path, file, task=task)
        assert "'picture' has pictures, which only `task: chat` reads" in str(refusal.value)
        assert not re.search(r"\w+: (picture|kind)\b", str(refusal.value))


def test_the_advice_for_a_table_with_pictures_maps_its_texts(tmp_path):
    for file in table(tmp_path, ("scan", "words", "kind"), ["so many words {}", "kind {1}"]):
        with pytest.raises(DataError, match=r"text: words, label: kind") as refusal:
            prepare(tmp_path, file, task="classify")
        assert "text: scan" not in str(refusal.value)


@pytest.mark.parametrize("task", ["classify", "completion", "summarize", "translate"])
def test_init_proposes_no_names_of_pictures_as_texts(task, tmp_path):
    for file in table(tmp_path, ("scan", "kind"), ["kind {}"]):
        assert invoke("init", file, "--task", task, "--out", tmp_path / "recipe.yaml").exit_code == 3
        assert not (tmp_path / "recipe.yaml").exists()


def test_bad_pictures_are_listed_with_file_and_line(tmp_path):
    save(tmp_path / "good.png")
    write_cut(tmp_path / "cut.jpg")
    write_bomb(tmp_path / "bomb.png")
    names = ["good.png", "cut.jpg", "bomb.png", "none.png"]
    file = write_jsonl(tmp_path / "rows.jsonl", [chat(name) for name in names])
    with pytest.raises(DataError) as error:
        prepare(tmp_path, str(file))
    text = str(error.value)
    assert f"{file}:2: picture unreadable: message 1: {tmp_path}/cut.jpg" in text
    assert f"{file}:3: picture too large: message 1: {tmp_path}/bomb.png has more than 50,000,000 pixels" in text
    assert f"{file}:4: picture missing: message 1: file not found: {tmp_path}/none.png" in text
    rows = prepare(tmp_path, str(file), max_dropped=0.8)
    assert (rows.counts["train"], sum(rows.dropped.values())) == (1, 3)


def test_rows_are_equal_if_the_contents_of_their_pictures_are(tmp_path):
    save(tmp_path / "1.png", 1), save(tmp_path / "copy.png", 1), save(tmp_path / "2.png", 2)
    file = write_jsonl(tmp_path / "rows.jsonl", [chat(f"{name}.png") for name in ("1", "copy", "2")])
    rows = prepare(tmp_path, str(file), deduplicate="near")
    assert rows.counts["train"] == 2
    assert rows.dropped == {"exact duplicate": 1}
    one, two = rows_of(rows)
    assert near_text(one).tag != near_text(two).tag
    assert row_input(one).context() != row_input(two).context()


def test_many_questions_on_one_picture_stay_on_one_side(tmp_path):
    rows = []
    for number in range(1, 13):
        save(tmp_path / f"{number}.png", number)
        rows += [chat(f"{number}.png", f"What about item {n} of the {n + 40} here?", f"fact {n}") for n in range(20)]
    result = prepare(tmp_path, str(write_jsonl(tmp_path / "rows.jsonl", rows)), deduplicate="near", test=0.3)
    assert sum(result.counts.values()) == 240
    sides = shown(result)
    assert not sides["train"] & sides["test"]
    assert len(sides["train"]) + len(sides["test"]) == 12


@pytest.mark.parametrize("change", ["equal", "smaller", "compressed", "brighter"])
def test_training_rows_with_the_picture_of_a_test_row_are_dropped(change, tmp_path):
    for number in range(1, 31):
        save(tmp_path / f"{number}.png", number, (240, 200))
    copy = draw(3, (240, 200))
    if change == "smaller":
        copy = copy.resize((120, 100), Image.Resampling.LANCZOS)
    elif change == "brighter":
        copy = copy.point(lambda value: min(255, value * 1.1))
    copy.save(tmp_path / ("copy.jpg" if change == "compressed" else "copy.png"))
    train = [chat(f"{n}.png", f"Name thing number {n}, please.", f"thing {n}") for n in range(1, 31)]
    test = [chat("copy.jpg" if change == "compressed" else "copy.png", "Which colour has it?", "red")]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", test))]
    rows = prepare(tmp_path, str(files[0]), test=str(files[1]), deduplicate="near")
    assert rows.counts == {"train": 29, "validation": 0, "test": 1}
    assert rows.dropped == {"near a test row": 1}


def test_a_picture_in_many_rows_is_the_task_itself(tmp_path):
    save(tmp_path / "map.png")
    train = [chat("map.png", f"Where is place {n} of region {n * 7}?", f"at {n}") for n in range(40)]
    test = [chat("map.png", "Which river is longest?", "the Dor")]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", test))]
    rows = prepare(tmp_path, str(files[0]), test=str(files[1]), deduplicate="near")
    assert rows.counts["train"] == 40


def test_the_lock_lists_every_picture_once_and_notices_a_change(tmp_path):
    save(tmp_path / "1.png", 1), save(tmp_path / "sub" / "2.png", 2)
    rows = [chat("1.png"), chat("1.png", "And now?"), chat("sub/2.png"), {"prompt": "q", "completion": "a"}][:3]
    recipe = make_recipe(tmp_path, str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    before, files = list_sources(recipe.data, "chat")
    assert [(one.name, one.kind) for one in files] == [
        ("rows.jsonl", "sha256"),
        ("1.png", "xxh3_128"),
        ("sub/2.png", "xxh3_128"),
    ]
    save(tmp_path / "1.png", 3)
    assert list_sources(recipe.data, "chat")[0] != before


@pytest.mark.parametrize("key", ["images", "\\u0069mages", "photo"])
def test_pictures_are_listed_whatever_names_their_column(key, tmp_path):
    save(tmp_path / "1.png", 1)
    (tmp_path / "1.png").rename(tmp_path / "dot")
    lines = [f'{{"prompt": "{text}", "completion": "A dot.", "{key}": "dot"}}' for text in ("What?", "What image?")]
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[0], lines[1].replace('"dot"', "null")]))
    source = {"path": str(tmp_path / "rows.jsonl"), "columns": {"images": "photo"} if key == "photo" else {}}
    recipe = make_recipe(tmp_path, [source])
    assert [one.name for one in list_sources(recipe.data, "chat")[1]] == ["rows.jsonl", "dot"]


def test_written_test_rows_name_their_pictures(tmp_path):
    for number in range(1, 9):
        save(tmp_path / "rows" / f"{number}.png", number)
    write_jsonl(tmp_path / "rows" / "rows.jsonl", [chat(f"{n}.png", f"Say {n}.", f"It is {n}.") for n in range(1, 9)])
    recipe = make_recipe(tmp_path, str(tmp_path / "rows" / "rows.jsonl"), test=0.4)
    rows = prepare(tmp_path, str(tmp_path / "rows" / "rows.jsonl"), test=0.4)
    (tmp_path / "kept").mkdir()
    write_test_rows(recipe, rows, tmp_path / "kept" / "test.jsonl", tmp_path)
    again = prepare(tmp_path, str(tmp_path / "kept" / "test.jsonl"), out="again")
    assert shown(again)["train"] == shown(rows)["test"]


def test_the_data_report_counts_pictures_and_shows_twelve_with_their_rows(tmp_path):
    rows = []
    for number in range(1, 21):
        save(tmp_path / f"{number}.png", number, (40 + number, 40), "RGBA" if number < 4 else "RGB")
        rows.append(chat(f"{number}.png", f"What is thing {number}? " + "Say it well. " * 30, f"thing {number}"))
    half = draw(1).convert("RGBA")
    half.putalpha(128)
    half.save(tmp_path / "21.png")
    rows += [chat("21.png", "And this one?", "glass"), {"prompt": "no picture", "completion": "none"}][:1]
    result = prepare(tmp_path, str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    facts, thumbnails = describe_pictures(result)
    assert {key: facts[key] for key in facts if key != "shown"} == {
        "rows": 21,
        "pictures": 21,
        "different": 21,
        "smallest": [41, 40],
        "largest": [60, 40],
        "converted": {"transparent parts on white": 1},
    }
    assert len(facts["shown"]) == len(thumbnails) == 12
    assert json.loads(json.dumps(facts)) == facts
    assert "base64" not in json.dumps(facts)
    sections = [Section("Data", picture_blocks(facts, thumbnails))]
    page = to_html(Page("pictures", sections))
    markdown = to_markdown(Page("pictures", sections))
    assert page.count('src="data:image/jpeg;base64,') == 12
    assert "base64" not in markdown
    assert "21 pictures (21 different) in 21 rows, from 41 x 40 to 60 x 40 pixels." in markdown
    assert "Converted: 1 transparent parts on white." in markdown
    for name, _, prompt, _ in facts["shown"]:
        assert prompt.startswith(f"[image: {name}]")
        assert len(prompt) <= 160
        assert name in markdown


def test_rows_without_pictures_have_no_part_in_the_data_report(tmp_path):
    rows = prepare(tmp_path, str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a"}])))
    assert describe_pictures(rows) == ({}, [])
    assert picture_blocks({}) == []


@pytest.mark.parametrize("streamed", [True, False])
def test_pictures_of_a_hub_data_set_are_read_from_their_bytes_and_caches_only(streamed, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", str(tmp_path / "cache"))
    cached, other = save(tmp_path / "cache" / "1.png", 1), save(tmp_path / "2.png", 2)
    cells = [{"bytes": picture_bytes(3), "path": None}, {"bytes": None, "path": str(cached)}]
    cells += [{"bytes": None, "path": str(other)}]
    features = Features({"image": ImageFeature(), "images": List(ImageFeature()), "answer": Value("string")})
    columns = {"image": cells, "images": [[cell, cell] for cell in cells], "answer": ["a", "b", "c"]}
    made = Dataset.from_dict(columns, features=features)
    rows, plain = as_files_hold_it(made.to_iterable_dataset() if streamed else made)
    plain_rows = [plain(row) for row in rows]
    sizes = [read_picture(row["image"], None)["size"] for row in plain_rows[:2]]
    sizes += [read_picture(one, None)["size"] for row in plain_rows[:2] for one in row["images"]]
    assert sizes == [[48, 40]] * 6
    with pytest.raises(RowError, match="picture in a file"):
        read_picture(plain_rows[2]["image"], None)
