"""A Whisper in CTranslate2's format is restored to the original model."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from support.audio import make_tone
from support.families import build_whisper
from support.runs import load_script
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer, WhisperForConditionalGeneration

SCRIPT = load_script("models/convert_whisper.py")
DTYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
FACTS = {"suppress_ids": [1, 2, 419], "suppress_ids_begin": [7, 419], "alignment_heads": [[1, 0]]}


def write_variables(
    file: Path, variables: dict[str, np.ndarray], aliases: dict[str, str] | None = None, version: int = 6
) -> None:
    def name(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    content = struct.pack("<I", version) + name("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for title, values in variables.items():
        content += name(title) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        content += struct.pack("<BI", DTYPES[values.dtype.name], values.nbytes) + values.tobytes()
    content += struct.pack("<I", len(aliases or {}))
    file.write_bytes(content + b"".join(name(alias) + name(title) for alias, title in (aliases or {}).items()))


def name_as_ctranslate2(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """All variables of `model`, in float16, module by module."""
    variables: dict[str, np.ndarray] = {}

    def put(path: str, *modules: torch.nn.Module) -> None:
        norm = isinstance(modules[0], torch.nn.LayerNorm)
        weights = torch.cat([module.weight for module in modules])
        biases = [module.bias if module.bias is not None else torch.zeros(len(module.weight)) for module in modules]
        for ending, value in zip(
            ("gamma", "beta") if norm else ("weight", "bias"), (weights, torch.cat(biases)), strict=True
        ):
            variables[f"{path}/{ending}"] = value.detach().half().numpy()

    for side, half in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        variables[f"{side}/num_heads"] = np.array(4, np.int16)
        variables[f"{side}/pre_norm"] = np.array(1, np.int8)
        variables[f"{side}/position_encodings/encodings"] = half.embed_positions.weight.detach().half().numpy()
        put(f"{side}/layer_norm", half.layer_norm)
        for i, layer in enumerate(half.layers):
            stem = f"{side}/layer_{i}"
            attention = layer.self_attn
            put(f"{stem}/self_attention/linear_0", attention.q_proj, attention.k_proj, attention.v_proj)
            put(f"{stem}/self_attention/linear_1", attention.out_proj)
            put(f"{stem}/self_attention/layer_norm", layer.self_attn_layer_norm)
            put(f"{stem}/ffn/linear_0", layer.fc1)
            put(f"{stem}/ffn/linear_1", layer.fc2)
            put(f"{stem}/ffn/layer_norm", layer.final_layer_norm)
            if side == "decoder":
                attention = layer.encoder_attn
                put(f"{stem}/attention/linear_0", attention.q_proj)
                put(f"{stem}/attention/linear_1", attention.k_proj, attention.v_proj)
                put(f"{stem}/attention/linear_2", attention.out_proj)
                put(f"{stem}/attention/layer_norm", layer.encoder_attn_layer_norm)
    for convolution in ("conv1", "conv2"):
        put(f"encoder/{convolution}", getattr(model.model.encoder, convolution))
    variables["decoder/embeddings/weight"] = model.model.decoder.embed_tokens.weight.detach().half().numpy()
    return variables


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny Whisper with all weights different, and the folder its CTranslate2 file was converted into."""
    original = build_whisper(tmp_path_factory.mktemp("whisper") / "original", multilingual=False)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(original)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            parameter.copy_(parameter.half())
    model.save_pretrained(original)
    packed, converted = original.with_name("packed"), original.with_name("converted")
    packed.mkdir()
    converted.mkdir()
    write_variables(
        packed / "model.bin", name_as_ctranslate2(model), {"decoder/projection/weight": "decoder/embeddings/weight"}
    )
    content = json.loads((original / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]  # no timestamps
    (packed / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(original)
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    (packed / "vocabulary.txt").write_text("".join(f"{word}\n" for word in words))
    (packed / "config.json").write_text(json.dumps(FACTS))
    SCRIPT.convert_whisper(packed / "model.bin", converted)
    return original, converted


def test_it_computes_the_same_as_the_original(both):
    first, second = (AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval() for folder in both)
    features = AutoProcessor.from_pretrained(both[0])(make_tone(), sampling_rate=16_000, return_tensors="pt")
    ids = torch.tensor([[420, 5, 6]])
    with torch.no_grad():
        expected, found = (model(**features, decoder_input_ids=ids).logits for model in (first, second))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert second.dtype == torch.float32


def test_its_tokenizer_has_the_timestamps_too(both):
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in both)
    assert second.get_vocab() == first.get_vocab()
    assert second("A blue fox: naïve.").input_ids == first("A blue fox: naïve.").input_ids
    assert (
        second.decode([420, *second("a fox", add_special_tokens=False).input_ids], skip_special_tokens=True) == "a fox"
    )
    assert (second.pad_token, second.eos_token) == ("<|endoftext|>", "<|endoftext|>")


def test_its_ids_come_from_the_tokenizer_and_the_rest_from_the_package(both):
    tokenizer = AutoTokenizer.from_pretrained(both[1])
    generation = AutoModelForSpeechSeq2Seq.from_pretrained(both[1]).generation_config
    named = [generation.eos_token_id, generation.decoder_start_token_id, generation.no_timestamps_token_id]
    assert tokenizer.convert_ids_to_tokens(named) == ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    assert (generation.suppress_tokens, generation.begin_suppress_tokens) == ([1, 2, 419], [7, 419])
    assert (generation.is_multilingual, generation.max_length) == (False, 128)


def test_a_file_of_another_version_is_refused(tmp_path):
    write_variables(tmp_path / "model.bin", {"x": np.ones(3, np.float32)}, version=5)
    with pytest.raises(ValueError, match="version 5"):
        SCRIPT.read_ctranslate2(tmp_path / "model.bin")
