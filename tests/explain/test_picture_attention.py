"""Attention on pictures, and answers with grey pictures: runs and models of families with different layouts."""

import base64

import numpy as np
import pytest
import torch
from PIL import Image
from support.browser import browser, open_browser
from support.explaining import expect, explain, page_data, values_of
from support.image_text import build_image_text
from support.models import build_llama
from support.pictures import save
from transformers import AutoModelForImageTextToText, AutoProcessor

from llmtune.explain.picture_attention import FAINT, OPAQUE, find_row, paint_heat
from llmtune.explain.token_text import Token, TokenLine

DRAWN = """
state.side = "all"; drawPictures();
[...document.querySelectorAll("#patches image")].map((image) => image.getAttribute("href")).slice(0, 4)
"""
FAMILIES = ("gemma3", "qwen3_vl", "smolvlm", "llava")
"""Tokens that see each other both ways, positions in three dimensions, tiles, and a crop."""
SIZE = (96, 56)
QUESTION, ANSWER = "Which colour is it?", "red and blue"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return save(tmp_path_factory.mktemp("picture") / "shapes.png", size=SIZE)


def ask(model, picture, out, *options):
    asked = ("--text", QUESTION, "--image", picture, "--target", ANSWER, "--out", out, "--offline", "--json")
    return values_of(explain("attention", model, *asked, *options))


def plain_attention(folder, picture):
    """Return plain transformers' weights [H, T, T] of each layer, and which tokens are the picture's."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    call = {"text": [text + ANSWER], "images": [[Image.open(picture).convert("RGB")]], "add_special_tokens": False}
    read = processor(**call, images_kwargs={"return_tensors": "pt"})
    inputs = {name: torch.as_tensor(part) for name, part in read.items()}
    with torch.inference_mode():
        layers = model(**inputs, output_attentions=True, use_cache=False).attentions
    token = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    return [layer[0].numpy() for layer in layers], (inputs["input_ids"][0] == token).numpy()


def unpack(pictures, key):
    count = sum(item["count"] for item in pictures["items"])
    return np.frombuffer(base64.b64decode(pictures["values"][key]), "<u2").reshape(-1, count) / 65535


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_on_a_picture_are_those_of_plain_transformers(tmp_path, picture, family):
    folder = build_image_text(tmp_path / "model", family)
    found = ask(folder, picture, tmp_path / "out", "--layer", 1)
    layers, seen = plain_attention(folder, picture)
    assert [item["count"] for item in found["pictures"]] == [seen.sum()]
    after = len(found["tokens"]["source"]) - found["on_pictures"]["row"]
    weights = np.array(found["on_pictures"]["weights"]["model"][0])
    assert weights == pytest.approx(layers[1].mean(0)[-after, seen], abs=1e-6)
    assert weights.sum() > 0.01
    pictures = page_data(tmp_path / "out" / "attention.html")["pictures"]
    for layer, weights_HTT in enumerate(layers):
        for head, weights_TT in enumerate(weights_HTT):
            packed = unpack(pictures, f"model/{layer}/{head}")
            assert packed[-after:] == pytest.approx(weights_TT[-after:][:, seen], abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_is_one_row_of_the_text_and_rows_still_sum_to_one(tmp_path, picture, family):
    found = ask(build_image_text(tmp_path / "model", family), picture, tmp_path / "out")
    texts = [token["text"] for token in found["tokens"]["source"]]
    rows, columns = np.array(found["pictures"][0]["grids"][0]["tokens"]).shape
    assert texts.count(f"<picture:{rows}×{columns}>") == 1
    assert not any("soft" in text or "image_pad" in text for text in texts)
    kind = page_data(tmp_path / "out" / "attention.html")["kinds"][0]
    packed = np.frombuffer(base64.b64decode(kind["values"]["model/1/mean"]), "<u2") / 65535
    table = np.zeros((len(texts), len(texts)))
    table[np.tril_indices(len(texts))] = packed
    assert table.sum(1) == pytest.approx(1, abs=1e-3)
    assert {"attention-picture.png", "attention-picture.svg"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_run_shows_base_and_tuned_on_the_picture(image_run, picture, tmp_path):
    found = ask(image_run, picture, tmp_path)
    base, tuned = (np.array(found["on_pictures"]["weights"][side][0]) for side in ("base", "tuned"))
    assert base.shape == tuned.shape == (4,)
    assert not np.array_equal(base, tuned)
    assert "looks at the picture, to predict" in found["on_pictures"]["says"]


def test_two_pictures_lie_at_their_marks_and_the_answer_is_the_models_own(tmp_path, picture):
    folder, other = build_image_text(tmp_path / "model", "smolvlm"), save(tmp_path / "other.png", seed=5)
    asked = ("--text", "Is <image> like <image>?", "--image", picture, "--image", other, "--out", tmp_path / "out")
    result = explain("attention", folder, *asked, "--offline", "--json")
    assert "the model's own answer" in " ".join(result.stderr.split())
    found = values_of(result)
    texts = [token["text"] for token in found["tokens"]["source"]]
    first, second = (at for at, text in enumerate(texts) if text == "<picture:2×2>")
    assert "".join(texts[first + 2 : second - 2]) == " like "
    assert [item["name"] for item in found["pictures"]] == ["shapes.png", "other.png"]
    assert [len(part) for part in found["on_pictures"]["weights"]["model"]] == [4, 4]
    assert found["target"]


def test_a_family_without_a_known_layout_gets_no_map_and_says_so(tmp_path, picture):
    folder = build_image_text(tmp_path / "model", "granite4_vision")
    result = explain("attention", folder, "--text", QUESTION, "--image", picture, "--target", ANSWER, "--out", tmp_path)
    assert "No map: the order of its 10 tokens" in " ".join(result.stdout.split())
    assert not (tmp_path / "attention-picture.png").exists()


def test_each_word_of_an_answer_is_scored_with_a_grey_picture_too(image_run, picture, tmp_path):
    asked = ("--prompt", QUESTION, "--image", picture, "--max-new-tokens", 3, "--out", tmp_path)
    found = values_of(explain("generation", image_run, *asked, "--json"))
    for side in ("base", "tuned"):
        steps = [step["probability"] for step in found["traces"][side]["steps"]]
        grey = [score["probability"] for score in found["blind"][side]]
        assert len(grey) == len(steps) > 0
        assert grey != pytest.approx(steps, rel=1e-3)
        assert all(step["layers"] for step in found["traces"][side]["steps"])
    plain = grey_answer(image_run.parent / "model", found["traces"]["base"])
    assert [score["probability"] for score in found["blind"]["base"]] == pytest.approx(plain, rel=1e-4)
    shown = explain("generation", image_run, *asked).stdout
    assert "Without the picture" in shown
    assert "4 of them pictures" in shown


def grey_answer(folder, trace):
    """Return plain transformers' probabilities of an answer's tokens with a grey picture."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    grey = Image.new("RGB", SIZE, (128, 128, 128))
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[grey]], return_tensors="pt", add_special_tokens=False)
    answer = [step["token"]["id"] for step in trace["steps"]]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]], dtype=torch.long)], 1)
    kinds = torch.nn.functional.pad(inputs["token_type_ids"], (0, len(answer) - 1))
    with torch.inference_mode():
        logits = model(input_ids=ids, token_type_ids=kinds, pixel_values=inputs["pixel_values"]).logits
    shares = logits[0, -len(answer) :].softmax(-1)
    return [float(shares[at, token]) for at, token in enumerate(answer)]


@browser
def test_the_page_draws_the_chosen_word_on_the_picture(image_run, picture, tmp_path):
    found = ask(image_run, picture, tmp_path)
    with open_browser(tmp_path / "profile") as page:
        page.open((tmp_path / "attention.html").as_uri())
        drawn = [
            page.run(DRAWN),
            page.run(f"$('word').value = {found['on_pictures']['row'] + 1}; drawPictures(); {DRAWN}"),
        ]
        assert page.errors == []
        assert page.run("$('word').selectedOptions[0].text").startswith("re → ·d")
    assert [len(images) for images in drawn] == [2 * len(found["sides"])] * 2
    assert drawn[0][0] == drawn[1][0] == page_data(tmp_path / "attention.html")["pictures"]["items"][0]["src"]
    assert drawn[0][1] != drawn[1][1]


@pytest.mark.parametrize("command", ["attention", "generation"])
def test_a_model_of_text_alone_refuses_a_picture(tmp_path, picture, command):
    given = "--text" if command == "attention" else "--prompt"
    model = build_llama(tmp_path / "model")
    expect(explain(command, model, given, QUESTION, "--image", picture), 2, "--image", "does not apply")


def test_what_cannot_be_shown_is_refused(tmp_path, picture):
    folder, asked = build_image_text(tmp_path / "model", "gemma3"), ("--text", QUESTION)
    missing = explain("attention", folder, *asked, "--image", tmp_path / "none.png")
    expect(missing, 3, "--image", "file not found")
    word = explain("attention", folder, *asked, "--image", picture, "--target", ANSWER, "--word", "green")
    expect(word, 2, "--word", "'green'", "red and blue")
    expect(explain("attention", folder, *asked, "--word", "red"), 2, "--word", "does not apply")
    long = explain("attention", folder, *asked, "--image", picture, "--max-tokens", 5)
    expect(long, 3, "--text", "5 of text")


def test_a_word_is_drawn_from_the_row_that_predicts_it():
    texts = ["<q>", "What", "?", "re", "d", " and", " blue"]
    line = TokenLine.of([Token(at, text, special=False, continues=False) for at, text in enumerate(texts)])
    assert find_row(line, 3, None) == 2
    assert find_row(line, 3, "red") == 2
    assert find_row(line, 3, "and") == 4
    assert find_row(line, 3, "blue") == 5


def test_the_picture_shows_through_where_attention_is():
    heat = np.array([[0.0, 0.04, np.nan]], dtype=np.float32)
    least, most, outside = paint_heat(heat, 0.04, difference=False)[0, :, 3]
    assert (least, most, outside) == pytest.approx((OPAQUE, FAINT, 0))
    same, less, more = paint_heat(np.array([[0.0, -0.04, 0.04]], dtype=np.float32), 0.04, difference=True)[0]
    assert (same[3], less[3], more[3]) == pytest.approx((FAINT, OPAQUE, OPAQUE))
    assert less[2] > less[0]
    assert more[0] > more[2]
