"""Conversations with pictures, compared with plain transformers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.adapting import open_model, quiet, recipe_with
from support.architectures import save_weights, shrink
from support.image_text import FAMILIES, TEMPLATE, build_image_text
from support.models import build_llama, train_tokenizer
from support.plain_images import PlainModel, mixed_rows, write_picture_rows
from support.runs import llmtune, write_recipe
from support.training import read_metrics, trained_bytes
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ChameleonImageProcessor,
    ChameleonProcessor,
    MllamaImageProcessor,
    MllamaProcessor,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmtune.adapter.injection import inject
from llmtune.data.pictures import PLACE
from llmtune.errors import DataError, LlmtuneError, RecipeError
from llmtune.evaluate.generation import answer_ends, generate_completions
from llmtune.model.processor import load_processor, save_tokenizer
from llmtune.model.resolve import resolve_model
from llmtune.model.towers import find_towers
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from llmtune.tasks.image_chat import ImageChat, open_images

TASK = ImageChat()
FAST = ("gemma3", "qwen3_vl", "llava", "smolvlm")
SOME = pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in FAST else pytest.mark.slow) for family in FAMILIES]
)


def image_recipe(folder, **sections):
    return recipe_with(folder, **{"chat": {"images": True}, "adapter": {"method": "full"}, **sections})


def processor_of(folder):
    recipe = image_recipe(folder)
    return load_processor(resolve_model(str(folder), recipe.model, quiet()), recipe.model), recipe


def encode(rows, processor, recipe):
    encoded = TASK.encode(rows, processor, recipe)
    assert not [row for row in encoded if isinstance(row, str)]
    return [example for row in encoded for example in row]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_pixels_losses_and_gradients_are_those_of_plain_transformers_and_tokens_are_counted(tmp_path, family):
    recipe = image_recipe(build_image_text(tmp_path / "model", family))
    selected, plain = open_model(recipe), PlainModel(tmp_path / "model")
    adapted = inject(selected, recipe, quiet())
    rows = mixed_rows(tmp_path)
    examples = encode(rows, selected.processor, recipe)
    assert dict(TASK.check_examples(selected.model, selected.processor, recipe, examples)) == {}
    batch = TASK.collator(selected.processor, recipe)(examples, 0)
    loss = TASK.loss(adapted.model, batch, True)
    (loss.sum / loss.count).backward()

    expected = []
    media = {}
    for row, example in zip(rows, examples, strict=True):
        inputs = plain.inputs(row["messages"])
        assert inputs["input_ids"][0].tolist()[: len(example.input_ids)] == list(example.input_ids)
        expected.append(plain.loss(inputs, example.spans))
        for name in batch["media"]:
            if name in inputs and "type" not in name:
                media[name] = [*media.get(name, []), inputs[name]]
    (sum(expected) / loss.count).backward()
    for name, parts in media.items():
        assert torch.equal(batch[name][batch[name] != 0], torch.cat([part[part != 0] for part in parts])), name
    torch.testing.assert_close(loss.row_sums.detach(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)
    trained = {name: one for name, one in adapted.model.named_parameters() if one.requires_grad}
    gradients = dict(plain.model.named_parameters())
    for name, parameter in trained.items():
        if parameter.grad is None:
            assert gradients[name].grad is None, name
            continue
        torch.testing.assert_close(
            parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert any(one.grad is not None and one.grad.any() for one in trained.values())


@SOME
def test_no_label_lies_on_a_picture_and_the_answers_have_theirs(tmp_path, family):
    folder = build_image_text(tmp_path / "model", family)
    processor = load_processor(
        resolve_model(str(folder), image_recipe(folder).model, quiet()), image_recipe(folder).model
    )
    image_token = AutoConfig.from_pretrained(folder).image_token_id
    answers = {
        "assistant": [["you"], ["yes it is"], ["no", "more words", "three"]],
        "last": [["you"], ["yes it is"], ["three"]],
    }
    for train_on in ("assistant", "last", "all"):
        recipe = image_recipe(folder, data={"train_on": train_on})
        examples = encode(mixed_rows(tmp_path), processor, recipe)
        for number, example in enumerate(examples):
            spans = list(zip(example.spans[::2], example.spans[1::2], strict=True))
            labels = [list(example.input_ids[start:end]) for start, end in spans]
            assert not any(image_token in ids for ids in labels)
            texts = [processor.decode(ids).removesuffix("<|im_end|>").strip() for ids in labels]
            if train_on != "all":
                assert texts == answers[train_on][number]
            else:
                special = open_images(processor, recipe).special_ids(example.list_pictures())
                others = [one for one in example.input_ids[1:] if one not in special]
                assert sum(map(len, labels)) == len(others)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "llava", "smolvlm", "internvl"])
def test_an_example_shows_a_picture_once_with_the_number_of_its_tokens(tmp_path, family):
    folder = build_image_text(tmp_path / "model", family)
    processor, recipe = processor_of(folder)
    token = AutoConfig.from_pretrained(folder).image_token_id
    for example in encode(mixed_rows(tmp_path), processor, recipe):
        shown = "".join(piece.text for piece in TASK.highlighted_text(example, processor, recipe))
        more = [int(number) for number in re.findall(r"\[\.\.\. (\d+) more \.\.\.\]", shown)]
        assert shown.count(processor.decode([token])) == len(more) == len(example.list_pictures())
        assert sum(more) + len(more) == list(example.input_ids).count(token)


def write_image_recipe(folder, family="llava", **sections):
    """Write a tiny model, rows and the recipe that trains on them; return the recipe's file."""
    build_image_text(folder / "model", family)
    rows = write_picture_rows(folder)
    data = {"max_length": 256, "validation": 0, "test": 0, "deduplicate": "none", **sections.pop("data", {})}
    train = {"max_steps": 4, "num_train_epochs": None, "save_steps": 2, "batch_size": 4, **sections.pop("train", {})}
    sections = {"evaluate": None, "data": data, "train": train, "generation": None, **sections}
    return write_recipe(folder / "recipe.yaml", folder / "model", rows, **sections)


def train(recipe, out):
    torch.set_num_threads(1)
    return run_pipeline(load_recipe(recipe), RunRequest(out=out, until="train"), quiet())


@pytest.mark.parametrize("projector", [False, True], ids=["frozen", "projector"])
def test_an_interrupted_run_on_pictures_resumes_to_the_same_bytes(tmp_path, projector):
    recipe = write_image_recipe(tmp_path, adapter={"train_projector": projector})
    train(recipe, tmp_path / "run")
    bytes_before = trained_bytes(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")
    assert train(recipe, tmp_path / "run")["train"]["resumed_from"] == 2
    assert trained_bytes(tmp_path / "run") == bytes_before


@pytest.mark.slow
def test_two_processes_learn_from_pictures_as_one_although_some_batches_have_none(tmp_path):
    recipe = write_image_recipe(tmp_path, adapter={"train_projector": True}, train={"batch_size": 2, "max_steps": 6})
    train(recipe, tmp_path / "one")
    words = ("launch", "local", recipe, "--processes", 2, "--threads", 1, "--out", "two")
    two = llmtune(*words, cwd=tmp_path, timeout=120)
    assert two.returncode == 0, two.stderr
    pairs = list(zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True))
    assert len(pairs) == 6
    for alone, together in pairs:
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)


@SOME
def test_rows_in_a_batch_score_and_answer_as_alone_and_as_transformers_generates(tmp_path, family):
    generation = {"max_new_tokens": 5}
    recipe = image_recipe(build_image_text(tmp_path / "model", family), generation=generation)
    selected, plain = open_model(recipe, training=False), PlainModel(tmp_path / "model")
    rows = mixed_rows(tmp_path)
    collate = TASK.collator(selected.processor, recipe)
    examples = encode(rows, selected.processor, recipe)
    with torch.inference_mode():
        together = TASK.loss(selected.model, collate(examples, 0), True).row_sums
        alone = [TASK.loss(selected.model, collate([example], 0), True).row_sums for example in examples]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)

    questions = [{"messages": row["messages"][:1]} for row in rows]
    prompts = [TASK.prompt(row, selected.processor, recipe) for row in questions]
    outputs = generate_completions(selected.model, prompts, selected.processor, recipe, device="cpu")
    for row, prompt, output in zip(questions, prompts, outputs, strict=True):
        inputs = plain.inputs(row["messages"], add_generation_prompt=True)
        assert inputs["input_ids"][0].tolist() == list(prompt.ids)
        ends = answer_ends(selected.model, selected.processor, recipe)
        expected = plain.generate(inputs, max_new_tokens=5, do_sample=False, eos_token_id=ends)
        assert output.token_ids == [one for one in expected if one not in ends]


def checked(folder, rows):
    """Return the problems that are found before training on prepared rows."""
    recipe = image_recipe(folder)
    selected = open_model(recipe)
    examples = encode(rows, selected.processor, recipe)
    return dict(TASK.check_examples(selected.model, selected.processor, recipe, examples))


def test_a_processor_of_another_model_is_refused_with_file_and_line_before_training(tmp_path):
    recipe = write_image_recipe(tmp_path, "gemma3")
    path = tmp_path / "model/processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_seq_length": 5}))
    with pytest.raises(DataError) as caught:
        train(recipe, tmp_path / "run")
    text = str(caught.value)
    assert "the model would read 16 rows wrongly" in text
    assert re.search(
        r"rows.jsonl:2: the row has 5 image tokens for 1 pictures \(wide.png: 5 tokens\), of wh.*s 4 fe", text
    )
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "smolvlm"])
def test_an_image_token_in_the_words_of_a_row_is_no_picture(tmp_path, family):
    folder = build_image_text(tmp_path / "model", family)
    rows = mixed_rows(tmp_path)
    words = FAMILIES[family].placeholder or FAMILIES[family].tokens["image_token"]
    for row in rows[:2]:
        row["messages"][0]["content"] += f" what is {words}?"
    assert checked(folder, rows) == {}


def count_tokens(folder, pictures):
    """Return the tokens that the processor of a folder makes of each picture."""
    processor = AutoProcessor.from_pretrained(folder)
    texts = [processor(text=[processor.image_token], images=[[one]], add_special_tokens=False) for one in pictures]
    return [len(one["input_ids"][0]) for one in texts]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "glm46v"])
def test_limits_of_pixels_are_saved_with_the_model(tmp_path, family):
    patch = 28
    limits = [4 * patch**2, 9 * patch**2]
    recipe = write_image_recipe(tmp_path, family, model={"image_pixels": limits})
    train(recipe, tmp_path / "run")
    pictures = [Image.open(path) for path in sorted(tmp_path.glob("*.png"))] + [Image.new("RGB", (400, 300))]
    before, after = (count_tokens(folder, pictures) for folder in (tmp_path / "model", tmp_path / "run/adapter"))
    assert before != after
    assert all(4 <= count <= 9 for count in after)
    loaded = load_recipe(recipe).recipe
    processor = load_processor(resolve_model(str(tmp_path / "model"), loaded.model, quiet()), loaded.model)
    ours = open_images(processor, loaded).processor
    assert [len(ours(text=[ours.image_token], images=[[one]])["input_ids"][0]) for one in pictures] == after
    save_tokenizer(processor, tmp_path / "merged")
    assert count_tokens(tmp_path / "merged", pictures) == after


def test_a_merged_model_is_certified_with_the_limits_of_its_recipe(tmp_path):
    sections = {"model": {"image_pixels": [3136, 7056]}, "data": {"test": 0.2}, "deploy": ["merged"]}
    generation = {"max_new_tokens": 2}
    recipe = write_image_recipe(
        tmp_path, "qwen2_5_vl", **sections, generation=generation, evaluate={"metrics": ["loss"]}
    )
    torch.set_num_threads(1)
    run_pipeline(load_recipe(recipe), RunRequest(out=tmp_path / "run"), quiet())
    (certificate,) = tmp_path.glob("run/merged/*certificate*.json")
    assert json.loads(certificate.read_text())["passed"]
    pictures = [Image.new("RGB", (400, 300)), Image.new("RGB", (30, 30))]
    counts = [count_tokens(tmp_path / name, pictures) for name in ("model", "run/adapter", "run/merged")]
    assert counts[0] != counts[1] == counts[2]


@pytest.mark.parametrize(
    ("family", "instead"), [("gemma3", "'height': 56"), ("gemma4", "max_soft_tokens"), ("lfm2_vl", "max_image_tokens")]
)
def test_limits_of_pixels_are_refused_by_a_processor_without_them(tmp_path, family, instead):
    recipe = write_image_recipe(tmp_path, family, model={"image_pixels": [3136, 12544]})
    with pytest.raises(RecipeError, match=f"ImageProcessor of this model has no limits in pixels.*{instead}"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    "sections",
    [{"adapter": {"train_projector": True}}, {"model": {"image_pixels": [3136, 12544]}}],
    ids=["train_projector", "image_pixels"],
)
def test_keys_of_pictures_are_refused_for_rows_without_pictures(tmp_path, sections):
    recipe = write_image_recipe(tmp_path, "qwen2_5_vl", **sections)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::3]))
    with pytest.raises(RecipeError, match=r"'(adapter|model)\.\w+' has no effect: without pictures"):
        train(recipe, tmp_path / "run")


def test_prompt_methods_are_refused_by_name(tmp_path):
    adapter = {"method": "prompt_tuning", "r": None, "lora_alpha": None}
    recipe = write_image_recipe(tmp_path, adapter=adapter)
    with pytest.raises(RecipeError, match="prompt_tuning, which does not work with pictures"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize("way", ["truncate", "split"])
def test_a_row_whose_picture_would_be_cut_is_refused_by_name(tmp_path, way):
    folder = build_image_text(tmp_path / "model", "llava")
    square = mixed_rows(tmp_path)[1]["messages"][0]["images"][0]
    long = " and so on" * 10
    answer = {"role": "assistant", "content": "yes"}
    seen = {"role": "user", "content": f"{PLACE}what{long}?", "images": [square]}
    plain = {"role": "user", "content": f"what{long}?"}
    rows = [
        {"messages": [seen, answer, plain, answer]},  # the picture is in the first exchange
        {"messages": [plain, answer, seen, answer]},
        {"messages": [plain, answer, plain, answer, plain, answer]},
    ]
    recipe = image_recipe(folder, data={"max_length": 130, "on_overlong": way})
    processor, _ = processor_of(folder)
    first, second, third = TASK.encode(rows, processor, recipe)
    assert first.endswith(", and a picture would be cut")
    assert first.startswith("too long")
    image_token = AutoConfig.from_pretrained(folder).image_token_id
    assert sum(list(one.input_ids).count(image_token) for one in second) == 16
    assert [len(one.list_pictures()) for one in third] == [0] * len(third)


def test_a_question_whose_picture_would_be_cut_is_refused_by_name(tmp_path):
    folder = build_image_text(tmp_path / "model", "llava")
    square = mixed_rows(tmp_path)[1]["messages"][0]["images"][0]
    long = " and so on" * 30
    rows = [
        {
            "messages": [
                {"role": "user", "content": text, "images": [square]},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for text in (f"{PLACE}what{long}?", f"what{long}{PLACE}?")
    ]
    recipe = image_recipe(folder, data={"max_length": 90, "on_overlong": "truncate"})
    first, second = TASK.encode(rows, processor_of(folder)[0], recipe)
    assert first.endswith(", and a picture would be cut")
    assert len(second[0].list_pictures()) == 1
    assert len(second[0].input_ids) <= 90


def test_a_run_says_once_that_rows_with_pictures_are_padded(tmp_path):
    recipe, console = write_image_recipe(tmp_path), quiet()
    run_pipeline(load_recipe(recipe), RunRequest(out=tmp_path / "run", until="select"), console)
    assert console.file.getvalue().count("because pictures are not packed") == 1


def test_the_key_images_decides_whether_the_model_keeps_its_towers(tmp_path):
    folder = build_image_text(tmp_path / "model", "llava")
    kept = {
        images: find_towers(open_model(recipe_with(folder, chat={"images": images}, data={"packing": False})).model)
        for images in (True, False)
    }
    assert kept == {True: ["model.vision_tower", "model.multi_modal_projector"], False: []}
    recipe = write_image_recipe(tmp_path, chat={"images": False})
    with pytest.raises(DataError, match=r"it has pictures, but chat\.images is false"):
        train(recipe, tmp_path / "run")


def test_a_chat_template_without_a_place_for_pictures_is_refused_with_a_cure(tmp_path):
    template = tmp_path / "words.jinja"
    template.write_text(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    recipe = write_image_recipe(tmp_path, model={"chat_template": str(template)})
    with pytest.raises(RecipeError, match=r"has no place for pictures: it never writes <image>\n.*model.chat_template"):
        train(recipe, tmp_path / "run")


def test_candidates_are_ranked_with_the_pictures_of_the_rows(tmp_path):
    build_image_text(tmp_path / "other", "gemma3")
    build_llama(tmp_path / "words")
    names = [str(tmp_path / name) for name in ("model", "other", "words")]
    data = {"validation": 0.2}
    recipe = write_image_recipe(tmp_path, model={"name": None, "candidates": names}, data=data)
    console = quiet()
    run_pipeline(load_recipe(recipe), RunRequest(out=tmp_path / "run", until="select"), console)
    facts = json.loads((tmp_path / "run/run.json").read_text())["steps"]["select"]["facts"]
    reasons = {Path(one["name"]).name: one["reason"] for one in facts["ranking"]["candidates"]}
    assert reasons["model"] is reasons["other"] is None
    assert "which needs AutoModelForImageTextToText" in reasons["words"]


def build_mllama(folder):
    """Save a tiny Llama 3.2 Vision, which reads pictures by cross attention, without features in place of tokens."""
    tokenizer = train_tokenizer(TEMPLATE.format(placeholder="<|image|>"), named_tokens={"image_token": "<|image|>"})
    config = shrink(CONFIG_MAPPING["mllama"])
    config.vision_config.image_size, config.vision_config.max_num_tiles = 56, 1
    config.vision_config.intermediate_layers_indices = [0]
    config.vision_config.supported_aspect_ratios = [[1, 1]]
    config.vision_config.vision_output_dim = 128
    config.text_config.vocab_size = len(tokenizer)
    config.image_token_index = tokenizer.convert_tokens_to_ids("<|image|>")
    model = AutoModelForImageTextToText.from_config(type(config).from_dict(config.to_dict()), dtype=torch.float32)
    save_weights(model, folder)
    images = MllamaImageProcessor(size={"height": 56, "width": 56}, max_image_tiles=1)
    MllamaProcessor(images, tokenizer, chat_template=tokenizer.chat_template).save_pretrained(folder)


def test_a_model_that_puts_no_features_in_place_of_tokens_is_refused_by_name(tmp_path):
    recipe = write_image_recipe(tmp_path)
    shutil.rmtree(tmp_path / "model")
    build_mllama(tmp_path / "model")
    with pytest.raises(LlmtuneError, match=r"(?s)Mllama.*Or set chat.images: false"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run/adapter").exists()


def test_a_processor_that_writes_other_tokens_around_pictures_is_refused_by_name(tmp_path):
    folder = build_image_text(tmp_path, "llava")
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.sep_token = tokenizer.eos_token  # this processor ends each text with it
    tokenizer.boi_token = tokenizer.eoi_token = tokenizer.image_token
    pictures = ChameleonImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    ChameleonProcessor(pictures, tokenizer, image_seq_length=16).save_pretrained(folder)
    processor, recipe = processor_of(folder)
    with pytest.raises(RecipeError, match="needs other tokens around pictures, which its own processor writes"):
        TASK.check_examples(model, processor, recipe, [])
