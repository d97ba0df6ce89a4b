"""`llmtune generate` and `chat` with pictures, from the command line and from files."""

import base64
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.image_runs import QUESTION
from support.pictures import picture_bytes, save
from support.runs import finish_run, invoke, llmtune

from llmtune import load_run


@pytest.fixture(scope="module")
def run(image_run):
    return image_run("gemma3")


@pytest.fixture
def answers(run, tmp_path):
    """Two pictures, and what the run answers to each."""
    asked = load_run(run)
    for number in (1, 2):
        save(tmp_path / f"p/{number}.png", number)
    return [asked.generate(QUESTION, image=tmp_path / f"p/{number}.png") for number in (1, 2)]


def test_generate_takes_pictures_before_the_text_and_at_their_marks(run, answers, tmp_path):
    result = invoke("generate", run, QUESTION, "--image", tmp_path / "p/1.png", "--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["text"] == answers[0]
    assert shown["image"] == [str(tmp_path / "p/1.png")]
    pictures = [argument for number in (1, 2) for argument in ("--image", tmp_path / f"p/{number}.png")]
    marked = invoke("generate", run, "First <image> then <image>?", *pictures)
    assert marked.exit_code == 0, marked.stderr
    one = invoke("generate", run, "First <image> then <image>?", *pictures[:2])
    assert one.exit_code == 3
    assert "Traceback" not in one.stderr


@pytest.mark.parametrize(
    ("name", "reason"), [("none.png", "file not found"), ("text.png", "is none of"), ("http://x.org/a.png", "fetches")]
)
def test_generate_names_the_picture_that_it_cannot_read(run, tmp_path, monkeypatch, name, reason):
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    result = invoke("generate", run, QUESTION, "--image", name)
    assert result.exit_code == 3
    assert reason in result.stderr
    assert "--image" in result.stderr


def test_a_picture_next_to_a_file_of_rows_is_refused(run, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    result = invoke("generate", run, "--input", tmp_path / "rows.jsonl", "--image", save(tmp_path / "x.png"))
    assert result.exit_code == 2
    assert "--input takes its texts from the file" in result.stderr


def parts(*names):
    images = [{"type": "image_url", "image_url": {"url": name}} for name in names]
    return [{"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]}]


def write_jsonl(folder):
    url = "data:image/png;base64," + base64.b64encode(picture_bytes(2)).decode()
    shutil.copy(folder / "p/2.png", folder / "p/two.png")
    lines = [{"messages": parts("p/1.png")}, {"messages": [*parts("p/two.png"), {"role": "assistant", "content": "x"}]}]
    lines.append({"messages": [{"role": "user", "content": f"<image>{QUESTION}"}], "images": ["p/1.png"]})
    lines.append({"messages": parts(url)})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, [0, 1, 0, 1]


def write_csv(folder):
    path = folder / "rows.csv"
    path.write_text(f"image,question\np/1.png,{QUESTION}\np/2.png,{QUESTION}\n")
    return path, [0, 1]


def write_parquet(folder):
    cells = [{"bytes": (folder / f"p/{number}.png").read_bytes(), "path": None} for number in (1, 2)]
    path = folder / "rows.parquet"
    pq.write_table(pa.table({"image": cells, "question": [QUESTION] * 2}), path)
    return path, [0, 1]


def write_alpaca(folder):
    path = folder / "rows.json"
    rows = [{"instruction": QUESTION, "images": [f"p/{number}.png"]} for number in (1, 2)]
    path.write_text(json.dumps(rows))
    return path, [0, 1]


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet, write_alpaca])
def test_every_form_of_a_row_with_a_picture_gets_the_answer_of_generate(run, answers, tmp_path, write):
    path, expected = write(tmp_path)
    result = invoke("generate", run, "--input", path, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.get("answer", line) for line in lines] == [answers[number] for number in expected]


def test_a_row_whose_picture_cannot_be_read_has_the_reason_and_the_others_an_answer(run, answers, tmp_path):
    (tmp_path / "rows.csv").write_text(f"image,question\np/1.png,{QUESTION}\nmissing.png,{QUESTION}\n../x.png,?\n")
    result = invoke("generate", run, "--input", tmp_path / "rows.csv", "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.stderr
    first, *others = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert first["answer"] == answers[0]
    assert "file not found" in others[0]["error"]
    assert "leads out of" in others[1]["error"]


def test_a_run_without_pictures_answers_no_row_with_one(tmp_path, tiny_llama):
    run = finish_run(tmp_path / "run", tiny_llama, train={"num_train_epochs": None, "max_steps": 1})
    save(tmp_path / "p/1.png")
    rows = [{"messages": parts("p/1.png")}, {"messages": [{"role": "user", "content": "Text?"}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("generate", run, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.stderr
    refused, answered = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "picture" in refused["error"]
    assert "answer" in answered
    asked = invoke("generate", run, "What?", "--image", tmp_path / "p/1.png")
    assert asked.exit_code == 2
    assert "tuned without pictures" in asked.stderr


def test_chat_adds_pictures_to_the_next_message_and_goes_on_after_a_bad_one(run, answers, tmp_path):
    typed = f"/image missing.png\n/image p/1.png\n{QUESTION}\n/reset\n/image p/1.png\n<image> <image>?\n/quit\n"
    result = llmtune("chat", run, cwd=tmp_path, stdin=typed)
    assert "file not found" in result.stderr
    assert result.stdout.splitlines()[0] == answers[0]
    assert "Added to the next message" in result.stderr
    assert result.returncode == 3
    assert "Traceback" not in result.stderr
