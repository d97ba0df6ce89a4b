"""Questions with pictures: the same tokens and pixels from every way of asking, and what a server refuses."""

import base64
import io
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch
from PIL import Image
from support.adapting import quiet
from support.image_runs import QUESTION
from support.image_text import FAMILIES
from support.pictures import data_url, picture_bytes, write_animated, write_bomb, write_cut
from support.runs import finish_run
from support.serving import load_served, serving

from llmtune import load_run
from llmtune.data.row_store import iterate_rows
from llmtune.errors import DataError, RecipeError
from llmtune.plan import open_finished
from llmtune.serve.chat_prompt import MAX_PICTURES
from llmtune.serve.finished_run import ChatSession

FAMILIES_ASKED = ["gemma3", "qwen2_5_vl", "smolvlm"]


def encoded(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def user(text, *urls):
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def served(image_run):
    """The tuned model of each family, and what it was asked last."""
    made = {}

    def load(family):
        if family not in made:
            made[family] = load_served(tiny=image_run(family))
            for one in made[family].values():
                note_prompts(one)
        return made[family]

    return load


def note_prompts(served):
    """Let a served model keep the prompt of each answer, with its media."""
    plain = served.generate

    def generate(prompt, *others):
        served.asked = prompt.ids, dict(prompt.media()) if prompt.media else {}
        return plain(prompt, *others)

    served.generate = generate


@pytest.fixture(scope="module")
def talk(served):
    """OpenAI's client of the server of one family, its address, and the served model."""
    models = served("gemma3")
    with serving(*models.values()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client, url, models["tiny"]


def assert_same(one, other):
    (ids, media), (expected, tensors) = one, other
    assert [*ids] == [*expected]
    assert media.keys() == tensors.keys()
    assert all(torch.equal(media[name], tensors[name]) for name in media)


@pytest.mark.parametrize("family", FAMILIES_ASKED)
def test_training_evaluation_chat_generate_and_server_make_the_same_tokens_and_pixels(family, served, image_run):
    model = served(family)["tiny"]
    context = open_finished(image_run(family), quiet(), False)
    row = next(row for _, row in iterate_rows(context.rows, "train") if len(row["messages"][0].get("images", ())) == 2)
    task, processor, recipe = model.task, model.processor, model.recipe
    ((example,),) = task.encode([row], processor, recipe)
    prompt = task.prompt(task.split_answer(row)[0], processor, recipe)
    asked = prompt.ids, dict(prompt.media())
    batch = task.collator(processor, recipe, False)([example], 0)
    assert [*example.input_ids[: example.spans[0]]] == [*prompt.ids]
    for name, part in asked[1].items():
        trained = batch[name][:, : len(prompt)] if name.endswith("type_ids") else batch[name]
        assert torch.equal(trained, part)

    paths = [picture["picture"] for picture in row["messages"][0]["images"]]
    text = row["messages"][0]["content"].lstrip("\ufffc")
    session = ChatSession(model)
    said = "".join(piece.content for piece in session.answer(text, image=paths, keep=True))
    assert_same(model.asked, asked)

    run = load_run(image_run(family))
    note_prompts(tuned := run.load({"prompt": text}, base=False, max_new_tokens=None))
    assert run.generate(text, image=paths) == said
    assert_same(tuned.asked, asked)
    assert run.generate(f"<image><image>{text}", image=paths) == said

    urls = [encoded(Path(path).read_bytes()) for path in paths]
    with serving(model) as url:
        body = {"messages": user(text, *urls), "return_token_ids": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["prompt_token_ids"] == [*prompt.ids]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["choices"][0]["message"]["content"] == said
    assert_same(model.asked, asked)

    before = len(model.asked[0])
    "".join(piece.content for piece in session.answer("And now?", keep=True))
    assert len(model.asked[0]) > before
    assert torch.equal(model.asked[1]["pixel_values"], asked[1]["pixel_values"])


def test_another_picture_gives_other_pixels_and_another_answer_distribution(talk):
    client, _, model = talk
    pixels = []
    for seed in (1, 2):
        client.chat.completions.create(model="tiny", messages=user(QUESTION, data_url(seed)))
        pixels.append(model.asked[1]["pixel_values"])
    assert not torch.equal(*pixels)


def test_a_stream_has_the_pieces_and_the_usage_of_the_whole_answer(talk):
    client, _, model = talk
    messages = user(QUESTION, data_url(1), data_url(2))
    whole = client.chat.completions.create(model="tiny", messages=messages)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, stream=True, stream_options=options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].usage == whole.usage
    without = client.chat.completions.create(model="tiny", messages=user(QUESTION)).usage.prompt_tokens
    soft = model.processor.convert_tokens_to_ids(FAMILIES["gemma3"].tokens["image_token"])
    assert whole.usage.prompt_tokens - without >= 2 * 4
    assert [*model.asked[0]].count(soft) == 0
    client.chat.completions.create(model="tiny", messages=messages)
    assert [*model.asked[0]].count(soft) == 2 * 4


def test_the_base_is_asked_the_same_picture(talk, served):
    client, _, _ = talk
    base = next(one for one in served("gemma3").values() if one.is_base)
    client.chat.completions.create(model=base.name, messages=user(QUESTION, data_url(3)))
    assert "pixel_values" in base.asked[1]


def bad_pictures(folder):
    (folder / "inside.png").write_bytes(picture_bytes())
    yield "a path", str(folder / "inside.png"), "only data URLs"
    yield "a file address", f"file://{folder / 'inside.png'}", "only data URLs"
    yield "a way up", "../inside.png", "only data URLs"
    yield "an address", "http://127.0.0.1:9/x.png", "fetches no addresses"
    yield "a secure address", "https://example.org/x.png", "fetches no addresses"
    yield "a bomb", encoded(write_bomb(folder / "bomb.png").read_bytes()), "pixels"
    yield "half a picture", encoded(write_cut(folder / "cut.png").read_bytes()), "messages"
    yield "two frames", encoded(write_animated(folder / "two.gif").read_bytes(), "gif"), "several frames"
    yield "a drawing", encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), "is none of PNG"
    yield "no base64", "data:image/png;base64,????", "not base64"
    yield "nothing", "data:image/png;base64,", "no bytes"
    yield "empty", "", "messages"
    yield "one pixel", encoded(png((1, 1))), "pixels"
    yield "a line", encoded(png((30_000, 4))), "sides"


def png(size):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def test_what_is_no_picture_in_the_request_is_refused_with_the_reason(talk, tmp_path):
    client, url, _ = talk
    for what, picture, reason in bad_pictures(tmp_path):
        started = time.monotonic()
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": user(QUESTION, picture)}, timeout=30)
        assert answer.status_code == 400, (what, answer.text)
        assert reason in answer.json()["error"]["message"], (what, answer.text)
        assert time.monotonic() - started < 10, what
    assert client.chat.completions.create(model="tiny", messages=user(QUESTION, data_url(1))).usage.prompt_tokens


@pytest.mark.parametrize("key", ["path", "image", "url", "base64"])
def test_no_form_of_a_part_reads_a_file_of_the_server(talk, tmp_path, key):
    _, url, _ = talk
    (tmp_path / "secret.png").write_bytes(picture_bytes())
    for path in (str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png"):
        part = {"type": "image", key: path}
        body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
        assert answer.status_code == 400, answer.text


REFUSED = [
    ({"messages": user(QUESTION, *[data_url(1)] * (MAX_PICTURES + 1))}, f"may have {MAX_PICTURES}"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(1), "detail": "low"}}]}
            ]
        },
        "scaled as in training",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "images": [data_url(1)]}]}, "unknown key 'images'"),
    (
        {"messages": [{"role": "assistant", "content": user("x", data_url(1))[0]["content"]}, *user("y")]},
        "messages",
    ),
    ({"messages": user(QUESTION, *[data_url(1)] * 2), "max_tokens": 1 << 20}, "context"),
]


@pytest.mark.parametrize(("body", "reason"), REFUSED)
def test_requests_that_training_could_not_have_are_refused(talk, body, reason):
    _, url, _ = talk
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    assert reason in answer.json()["error"]["message"]


def test_texts_that_look_like_pictures_are_texts_or_refused_but_never_an_error(talk):
    _, url, model = talk
    token = FAMILIES["gemma3"].tokens
    for text in ("\ufffc", "<image>", token["boi_token"], token["image_token"], f"{token['boi_token']} \ufffc <image>"):
        for urls in ((), (data_url(1),)):
            body = {"messages": user(f"What is {text}?", *urls), "return_token_ids": True}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
            assert answer.status_code in (200, 400), (text, answer.text)
            if answer.status_code == 200:
                soft = model.processor.convert_tokens_to_ids(token["image_token"])
                assert answer.json()["prompt_token_ids"].count(soft) == 4 * len(urls), text
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": text}, timeout=30)
        assert answer.status_code in (200, 400), (text, answer.text)


def test_a_run_without_pictures_refuses_them_by_name(tmp_path, tiny_llama):
    run = load_run(finish_run(tmp_path, tiny_llama, train={"num_train_epochs": None, "max_steps": 1}))
    (tmp_path / "x.png").write_bytes(picture_bytes())
    with pytest.raises(RecipeError, match="tuned without pictures") as refused:
        run.generate("What is it?", image=tmp_path / "x.png")
    assert refused.value.problems[0].where == "--image"
    with pytest.raises(RecipeError, match="tuned without pictures"):
        next(run.chat().answer("What is it?", image=tmp_path / "x.png"))


@pytest.mark.parametrize(
    ("prompt", "images", "reason"),
    [
        ("What?", ["missing.png"], "file not found"),
        ("What?", ["http://127.0.0.1:9/x.png"], "fetches no addresses"),
        ("<image> or <image>?", ["one.png"], "2"),
        ("", [], "no content"),
    ],
)
def test_a_picture_that_cannot_be_asked_about_is_named(image_run, tmp_path, monkeypatch, prompt, images, reason):
    (tmp_path / "one.png").write_bytes(picture_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=reason):
        load_run(image_run("gemma3")).generate(prompt, image=images)


def test_a_picture_alone_is_a_question(image_run, tmp_path):
    run = load_run(image_run("gemma3"))
    (tmp_path / "one.png").write_bytes(picture_bytes())
    assert run.generate(image=tmp_path / "one.png") == run.generate("<image>", image=str(tmp_path / "one.png"))
