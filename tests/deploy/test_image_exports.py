"""Exports of models tuned with pictures: their answers to pictures, their towers and their processors are certified."""

import contextlib
import io
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.image_runs import QUESTION, finish_image_run
from support.image_text import build_image_text
from support.pictures import picture_bytes
from support.runs import invoke
from transformers import AutoModelForImageTextToText, AutoProcessor

from llmtune import load_run
from llmtune.deploy.export import export, open_to_export
from llmtune.deploy.exported_model import open_folder
from llmtune.deploy.gguf_export import gguf_format
from llmtune.deploy.merged_model import merged_format
from llmtune.deploy.model_card import PublishOptions
from llmtune.deploy.onnx_export import onnx_format
from llmtune.deploy.products import certify_export
from llmtune.deploy.publish import publish_run
from llmtune.deploy.quantized_model import quantized_format
from llmtune.deploy.search_parity import make_reference
from llmtune.deploy.tuned_model import TransformersReader, load_tuned
from llmtune.errors import GateFailed, RecipeError
from llmtune.records import Prompt

ASKED = ["gemma3", "qwen2_5_vl", "smolvlm"]
TOWERS = ("vision", "visual", "projector", "connector")


def stored(folder):
    """Return the tensors of all weight files in a folder; none may be in two files."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(str(file), "pt") as opened:
            assert tensors.keys().isdisjoint(opened.keys())
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    return tensors


def outside_text(tensors):
    return {name: tensor for name, tensor in tensors.items() if any(mark in name for mark in TOWERS)}


@pytest.fixture(scope="module")
def merged(image_run, tmp_path_factory, quiet_console):
    """The merged folder of each family, and its certificate."""
    made = {}

    def merge(family):
        if family not in made:
            out = tmp_path_factory.mktemp(family) / "merged"
            context = open_to_export(image_run(family), quiet_console, offline=False)
            made[family] = out, export(context, merged_format(), out)
        return made[family]

    return merge


@pytest.fixture(scope="module")
def quiet_console():
    from rich.console import Console

    return Console(file=io.StringIO(), width=200)


def answer_plainly(folder, picture, tokens):
    """Answer as a user of transformers alone does; return the number of tokens and the answer."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=[[picture]], return_tensors="pt")
    count = inputs["input_ids"].shape[1]
    answer = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return inputs["input_ids"][0].tolist(), processor.decode(answer[0, count:], skip_special_tokens=True)


@pytest.mark.parametrize("family", [ASKED[0], *(pytest.param(one, marks=pytest.mark.slow) for one in ASKED[1:])])
def test_a_merged_folder_answers_pictures_in_plain_transformers_as_the_run_does(image_run, merged, tmp_path, family):
    out, certificate = merged(family)
    base, weights = stored(image_run(family).parents[1] / "base"), stored(out)
    assert weights.keys() == base.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in outside_text(base).items())
    assert certificate["checkpoint"]["towers"]["equal"] == len(outside_text(base))
    measured = certificate["measured"]
    assert measured["pictures"] >= 3
    assert measured["same_ids"]
    assert measured["answer_agreement"] == 1.0
    assert measured["kl_mean"] < 1e-5 < measured["effect_kl"]
    (tmp_path / "x.png").write_bytes(picture_bytes(5))
    run = load_run(image_run(family))
    ids, answer = answer_plainly(out, Image.open(tmp_path / "x.png").convert("RGB"), 8)
    served = run.load({"prompt": QUESTION}, base=False, max_new_tokens=None)
    prompt = served.task.prompt(
        served.task.make_row({"prompt": QUESTION, "image": str(tmp_path / "x.png")}), served.processor, served.recipe
    )
    assert ids == [*prompt.ids]
    assert answer.strip() == run.generate(QUESTION, image=tmp_path / "x.png").strip()


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def double_a_tower_tensor(folder):
    for file in folder.glob("model*.safetensors"):
        tensors = load_file(file)
        names = sorted(name for name in tensors if any(mark in name for mark in TOWERS))
        if names:
            tensors[names[0]] = tensors[names[0]] * 2 + 1
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError


CHANGES = {
    "a tower tensor": (double_a_tower_tensor, "not the base's bytes"),
    "do_resize": (lambda folder: set_image(folder, do_resize=False), r"preprocessor_config.json: do_resize is False"),
    "size": (lambda folder: set_image(folder, size={"height": 28, "width": 28}), r"preprocessor_config.json: size"),
    "image_mean": (
        lambda folder: set_image(folder, image_mean=[0.4, 0.5, 0.5]),
        r"other pixel_values of a picture.*preprocessor_config.json: image_mean is",
    ),
    "image_seq_length": (
        lambda folder: change_json(folder / "processor_config.json", lambda one: one.update(image_seq_length=9)),
        "image_seq_length is 9",
    ),
    "no preprocessor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
}


def set_image(folder, **values):
    change_json(folder / "preprocessor_config.json", lambda one: one.update(values))


@pytest.fixture(scope="module")
def reference(image_run, quiet_console):
    """The tuned model of one family with its answers."""
    return make_reference(load_tuned(open_to_export(image_run("gemma3"), quiet_console, offline=False)))


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_was_changed_after_its_export_fails_by_name(reference, merged, tmp_path, change):
    spoil, reason = CHANGES[change]
    folder = tmp_path / "copy"
    shutil.copytree(merged("gemma3")[0], folder)
    spoil(folder)
    exported = open_folder(folder, reference.tuned)
    certificate = reference.checkpoint.certify(exported, reference.certify(exported), exported.limits)
    assert not certificate["passed"]
    assert re.search(reason, "; ".join(certificate["breaches"]))


def test_a_folder_whose_pictures_have_other_tokens_than_its_model_fails_by_name(image_run, merged, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(merged("gemma3")[0], folder)
    CHANGES["image_seq_length"][0](folder)
    result = invoke("deploy", "certify", folder, "--run", image_run("gemma3"))
    assert result.exit_code == GateFailed.exit_code
    assert "image_seq_length is 9" in " ".join(result.stderr.split())


def test_an_unchanged_folder_passes(image_run, merged, quiet_console):
    certificate = certify_export(image_run("gemma3"), merged("gemma3")[0], offline=False, console=quiet_console)
    assert certificate["passed"]
    assert re.search("with [0-9]+ pictures", quiet_console.file.getvalue())


@pytest.mark.parametrize(
    ("form", "cure"),
    [
        (gguf_format("f16"), "--mmproj"),
        (gguf_format("f16", adapter_only=True), "--mmproj"),
        (onnx_format(), "deploy merge"),
        (onnx_format(int8=True), "deploy merge"),
        (quantized_format("w4a16"), "deploy merge"),
        (quantized_format("w8a8"), "deploy merge"),
        (quantized_format("fp8"), "deploy merge"),
        (merged_format(text_only=True), "Omit it"),
    ],
)
def test_exports_that_would_not_read_pictures_are_refused_with_a_cure(image_run, tmp_path, quiet_console, form, cure):
    context = open_to_export(image_run("gemma3"), quiet_console, offline=False)
    with pytest.raises(RecipeError, match="tuned with pictures") as refused:
        export(context, form, tmp_path / "out")
    assert cure in refused.value.problems[0].fix


@pytest.mark.parametrize("name", ["model.gguf", "model.onnx"])
def test_somebody_elses_export_that_reads_no_pictures_is_not_certified(image_run, tmp_path, quiet_console, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(RecipeError, match="tuned with pictures"):
        certify_export(image_run("gemma3"), tmp_path / name, offline=False, console=quiet_console)


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_trained_projector_is_in_the_merged_folder_and_the_rest_of_the_towers_is_the_bases(
    tmp_path, quiet_console, family
):
    train = {"num_train_epochs": None, "max_steps": 3, "batch_size": 4, "learning_rate": 0.05}
    run = finish_image_run(tmp_path, family, adapter={"train_projector": True}, train=train)
    context = open_to_export(run, quiet_console, offline=False)
    certificate = export(context, merged_format(), tmp_path / "merged")
    base, weights = stored(tmp_path / "base"), stored(tmp_path / "merged")
    assert weights.keys() == base.keys()
    changed = {name for name, one in outside_text(base).items() if not torch.equal(one, weights[name])}
    assert changed
    assert all("projector" in name or "merger" in name for name in changed)
    assert certificate["checkpoint"]["towers"]["equal"] == certificate["checkpoint"]["towers"]["tensors"]
    spoiled = tmp_path / "spoiled"
    shutil.copytree(tmp_path / "merged", spoiled)
    for file in spoiled.glob("model*.safetensors"):
        tensors = {name: base[name] if name in changed else one for name, one in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(GateFailed):
        certify_export(run, spoiled, offline=False, console=quiet_console)


@pytest.mark.parametrize("merge", [False, True])
def test_the_code_on_the_card_answers_a_picture(image_run, tmp_path, quiet_console, merge):
    run = image_run("qwen2_5_vl")
    if merge:
        copied = tmp_path / "runs" / "tiny"
        shutil.copytree(run, copied)
        run = copied
        assert invoke("deploy", "merge", run).exit_code == 0
    publish_run(run, PublishOptions(to=tmp_path / "hub", merged=merge), quiet_console)
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "tuned with pictures" in card.text
    assert "tuned on text" not in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    base = image_run("qwen2_5_vl").parents[1] / "base"
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace('"base"', repr(str(base))).replace('"tiny"', repr(str(tmp_path / "hub"))), names)
    assert type(names["model"]).__name__.startswith("PeftModel") != merge
    names["picture"].save(tmp_path / "teal.png")
    expected = load_run(image_run("qwen2_5_vl")).generate(
        "What does the picture show?", image=tmp_path / "teal.png", max_new_tokens=64
    )
    assert printed.getvalue().strip() == expected.strip()


def test_an_answer_of_a_certificate_ends_before_the_token_of_a_picture(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(build_image_text(tmp_path, "qwen2_5_vl")).eval()
    prompt, picture = Prompt([5, 6, 7]), torch.tensor([model.config.image_token_id])
    assert len(TransformersReader(model).answer(prompt, [], 4)) == 4
    model.lm_head.register_forward_hook(
        lambda head, inputs, logits: logits.index_fill(-1, torch.tensor([picture]), 1e4)
    )
    assert TransformersReader(model).answer(prompt, [], 4) == []
