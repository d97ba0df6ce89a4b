"""Tiny random checkpoints of models that read text and pictures, with their processors: the files of a hub folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support.architectures import save_weights, shrink, silence
from support.models import train_tokenizer

TEMPLATE = (
    "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
    "{{% for part in message['content'] %}}"
    "{{{{ '{placeholder}' if part['type'] == 'image' else part['text'] }}}}{{% endfor %}}{{% endif %}}"
    "{{{{ '<|im_end|>\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)
_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_IDEFICS_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


class Family(NamedTuple):
    """A family: its tokens, its processor, and what its configuration needs to read a picture of 56 x 56 pixels."""

    tokens: Mapping[str, str]
    """Name in the configuration, without `_id` or `_index` -> token."""
    processor: str
    image_processor: str
    sizes: Mapping[str, Any] = {}
    """Arguments of the image processor."""
    arguments: Mapping[str, Any] = {}
    """Arguments of the processor."""
    config: Mapping[str, Any] = {}
    vision: Mapping[str, Any] = {}
    """Fields of the vision tower's configuration."""
    video_processor: str | None = None
    placeholder: str = ""
    """A picture in the chat template, if not the image token."""
    files: str = "apart"
    """`apart`: the image processor has its own file; `bare`: no processor_config.json either; `one`: a single file."""


_QWEN_SIZES = {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}}
_LLAMA4_TOKENS = {
    "image_token": "<|patch|>",
    "boi_token": "<|image_start|>",
    "eoi_token": "<|image_end|>",
    "fake_token": "<|image|>",
    "tile_x_token": "<|tile_x_separator|>",
    "tile_y_token": "<|tile_y_separator|>",
}
_TILES = [[28, 28], [28, 56], [56, 28], [56, 56]]
_SQUARE = {"size": {"height": 56, "width": 56}}
_PIXTRAL = Family(
    {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    "PixtralProcessor",
    "PixtralImageProcessor",
    {"size": {"longest_edge": 56}, "patch_size": {"height": 14, "width": 14}},
    {"patch_size": 14, "spatial_merge_size": 2},
    vision={"image_size": 56, "patch_size": 14},
)
_QWEN3 = Family(
    _QWEN_TOKENS,
    "Qwen3VLProcessor",
    "Qwen2VLImageProcessor",
    {"size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}, "patch_size": 16},
    video_processor="Qwen3VLVideoProcessor",
    placeholder=_QWEN_PICTURE,
    files="bare",
)
_IDEFICS = Family(
    _IDEFICS_TOKENS,
    "Idefics3Processor",
    "Idefics3ImageProcessor",
    {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 56}},
    {"image_seq_len": 4},
    vision={"image_size": 56, "patch_size": 14},
)
FAMILIES: dict[str, Family] = {
    "gemma3": Family(
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        _SQUARE,
        {"image_seq_length": 4},
        {"mm_tokens_per_image": 4},
        {"image_size": 56, "patch_size": 14},
        placeholder="<start_of_image>",
    ),
    "gemma4": Family(
        {
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "video_token": "<|video|>",
        },
        "Gemma4Processor",
        "Gemma4ImageProcessor",
        {"patch_size": 16, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        config={"vision_config": "gemma4_vision"},
        vision={"pooling_kernel_size": 2},
        video_processor="Gemma4VideoProcessor",
        files="one",
    ),
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    "qwen2_5_vl": Family(
        _QWEN_TOKENS,
        "Qwen2_5_VLProcessor",
        "Qwen2VLImageProcessor",
        _QWEN_SIZES,
        vision={"window_size": 56, "fullatt_block_indexes": [1]},
        video_processor="Qwen2VLVideoProcessor",
        placeholder=_QWEN_PICTURE,
        files="bare",
    ),
    "qwen3_vl": _QWEN3._replace(vision={"deepstack_visual_indexes": [0, 1]}),
    "mistral3": _PIXTRAL,
    "mistral4": _PIXTRAL._replace(config={"text_config": "mistral4"}),
    "llama4": Family(
        _LLAMA4_TOKENS,
        "Llama4Processor",
        "Llama4ImageProcessor",
        {"size": {"height": 56, "width": 56}, "max_patches": 1},
        {"patch_size": 14, "pixel_shuffle_ratio": 0.5},
        vision={"image_size": 56, "patch_size": 14, "intermediate_size": 256},
        placeholder="<|image|>",
    ),
    "smolvlm": _IDEFICS._replace(
        processor="SmolVLMProcessor",
        image_processor="SmolVLMImageProcessor",
        video_processor="SmolVLMVideoProcessor",
    ),
    "idefics3": _IDEFICS,
    "internvl": Family(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        _SQUARE | {"crop_to_patches": False},
        {"image_seq_length": 4},
        {"image_seq_length": 4},
        {"image_size": [56, 56], "patch_size": [14, 14]},
        video_processor="InternVLVideoProcessor",
        placeholder="<IMG_CONTEXT>",
    ),
    "llava": Family(
        {"image_token": "<image>"},
        "LlavaProcessor",
        "LlavaImageProcessor",
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        {"image_seq_length": 16},
        {"image_size": 56, "patch_size": 14},
    ),
    "llava_onevision": Family(
        {"image_token": "<image>"},
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": _TILES},
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"},
        {"image_grid_pinpoints": _TILES, "vision_aspect_ratio": "anyres_max_9"},
        {"image_size": 28, "patch_size": 14},
        video_processor="LlavaOnevisionVideoProcessor",
    ),
    "llava_next": Family(
        {"image_token": "<image>"},
        "LlavaNextProcessor",
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "image_grid_pinpoints": _TILES},
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        {"image_grid_pinpoints": _TILES},
        {"image_size": 28, "patch_size": 14},
    ),
    "glm46v": Family(
        {
            "image_token": "<|image|>",
            "video_token": "<|video|>",
            "image_start_token": "<|begin_of_image|>",
            "image_end_token": "<|end_of_image|>",
            "video_start_token": "<|begin_of_video|>",
            "video_end_token": "<|end_of_video|>",
        },
        "Glm46VProcessor",
        "Glm46VImageProcessor",
        _QWEN_SIZES,
        vision={"image_size": 56},
        video_processor="Glm46VVideoProcessor",
        placeholder="<|begin_of_image|><|image|><|end_of_image|>",
    ),
    "lfm2_vl": Family(
        {
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
        "Lfm2VlProcessor",
        "Lfm2VlImageProcessor",
        {
            "tile_size": 64,
            "min_image_tokens": 4,
            "max_image_tokens": 16,
            "max_num_patches": 64,
            "do_image_splitting": False,
        },
    ),
    "granite4_vision": Family(
        {"image_token": "<image>"},
        "Granite4VisionProcessor",
        "LlavaNextImageProcessor",
        {
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "image_grid_pinpoints": [[56, 56]],
        },
        {
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "downsample_rate": "1/2",
        },
        {
            "image_grid_pinpoints": [[56, 56]],
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[0, 0]],
            "spatial_target_layers": [1, 1, 1, 1],
            "projector_dropout": 0.0,
        },
        {"image_size": 56, "patch_size": 14},
        files="one",
    ),
}


def picture() -> Image.Image:
    """Return a picture of 56 x 56 pixels; no two columns or rows are equal."""
    return Image.frombytes(
        "RGB", (56, 56), bytes((3 * x + y * c) % 256 for y in range(56) for x in range(56) for c in (1, 2, 3))
    )


def build_image_text(folder: Path, family: str, **config: Any) -> Path:
    """Save a tiny checkpoint of `family` with tokenizer, chat template and processor; `config` sets text fields."""
    facts = FAMILIES[family]
    template = TEMPLATE.format(placeholder=facts.placeholder or facts.tokens["image_token"])
    tokenizer = train_tokenizer(template, named_tokens=facts.tokens)
    sizes = _config(family, tokenizer, config)
    silence(sizes)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(sizes, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():  # projectors that start at zero
                parameter.normal_(std=0.1)
    save_weights(model, folder)
    _save_processor(facts, tokenizer, folder)
    return folder


def _config(family: str, tokenizer: PreTrainedTokenizerFast, text: Mapping[str, Any]) -> transformers.PreTrainedConfig:
    facts = FAMILIES[family]
    config = shrink(CONFIG_MAPPING["mistral3" if family == "mistral4" else family])
    for name, value in facts.config.items():
        setattr(config, name, shrink(CONFIG_MAPPING[value]) if name in config.sub_configs else value)
    for name, value in facts.vision.items():
        setattr(config.vision_config, name, value)
    sizes = {name: len(tokenizer) for name in vars(config.text_config) if name.startswith("vocab_size")}
    for name, value in (sizes | text).items():
        setattr(config.text_config, name, value)
    for name, token in facts.tokens.items():
        for field in (f"{name.replace('context_', '')}_id", f"{name}_index"):
            if hasattr(config, field):
                setattr(config, field, tokenizer.convert_tokens_to_ids(token))
    return type(config).from_dict(config.to_dict())


def _save_processor(facts: Family, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    parts = {"image_processor": getattr(transformers, facts.image_processor)(**facts.sizes), "tokenizer": tokenizer}
    if facts.video_processor:
        parts["video_processor"] = getattr(transformers, facts.video_processor)(**_video_sizes(facts))
    if facts.processor == "Gemma4Processor":
        parts["feature_extractor"] = transformers.Gemma4AudioFeatureExtractor()
    processor = getattr(transformers, facts.processor)(
        **parts, chat_template=tokenizer.chat_template, **facts.arguments
    )
    processor.save_pretrained(folder)
    if facts.files == "one":
        return
    path = folder / "processor_config.json"
    content = {name: value for name, value in json.loads(path.read_text("utf-8")).items() if name not in parts}
    path.write_text(json.dumps(content, indent=2), "utf-8")
    for name in parts.keys() - {"tokenizer"}:
        parts[name].save_pretrained(folder)
    if facts.files == "bare":
        path.unlink()


def _video_sizes(facts: Family) -> dict[str, Any]:
    return {name: value for name, value in facts.sizes.items() if name in {"size", "patch_size", "max_image_size"}}
