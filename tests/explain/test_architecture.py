from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support import families
from support.explaining import open_quietly
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from llmtune.explain.architecture import Architecture, Blocks, ModelPart, describe_architecture
from llmtune.explain.architecture_figure import briefly, draw_architecture
from llmtune.explain.fake_model import FakeModel, build_fake_model, fake_model
from llmtune.explain.model_explainer import count_parts
from llmtune.explain.trained_modules import TrainedModule, TrainedModules, short_module_name

FAMILIES = ("llama", "gpt2", "bert", "distilbert", "roberta", "deberta", "modernbert", "t5", "mt5", "bart", "nllb")
FAMILIES += ("whisper", "wav2vec2")
Built = Callable[[str], Path]
AUTO = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
KINDS = {"causal": "decoder", "masked": "encoder", "seq2seq": "encoder-decoder"}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "pad_token_id": 0,
}


@cache
def describe(folder: Path) -> tuple[Architecture, FakeModel]:
    target = open_quietly(folder)
    fake = build_fake_model(target)
    return describe_architecture(target, fake), fake


def describe_config(auto: Any, settings: Any, kind: str = "decoder") -> Architecture:
    class Stand:
        name, family, takes_images = "tiny", kind, False

    return describe_architecture(Stand, fake_model(lambda: auto.from_config(settings, attn_implementation="eager")))


def branches_of(blocks: Blocks) -> list[ModelPart]:
    return [part for part in blocks.parts if part.kind != "norm"]


def spell(blocks: Blocks) -> str:
    """Norms in brackets, `|` between branches side by side, `>` before norms on the path, `+` where a branch ends."""
    signs = {"": "", "branch": ", ", "beside": " | ", "path": " > "}
    words = [signs[p.place] + (f"[{p.title}]" if p.kind == "norm" else p.kind) + "+" * p.added for p in blocks.parts]
    return "".join(words).removeprefix(", ")


def texts_of(path: Path) -> list[str | None]:
    return [text.text for text in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_stacks_and_blocks_match_the_model_without_reading_weights(built: Built, family: str):
    architecture, fake = describe(built(family))
    with open_quietly(built(family)).open_model("model") as model:
        config = model.config
        assert architecture.parameters == model.num_parameters()
    assert sum(count_parts(architecture).values()) == architecture.parameters
    assert architecture.other == (2048 if family == "deberta" else 0)  # its table of distances is in no layer
    assert all(isinstance(parameter, FakeTensor) for parameter in fake.model.parameters())
    expected = ["encoder", "decoder"] if config.is_encoder_decoder else [architecture.family]
    assert [stack.name for stack in architecture.stacks] == expected
    for stack in architecture.stacks:
        layers = getattr(config, f"{stack.name}_layers", config.num_hidden_layers)
        assert sum(len(blocks.numbers) for blocks in stack.blocks) == layers
        for blocks in stack.blocks:
            crossed = config.is_encoder_decoder and stack.name == "decoder"
            parts = branches_of(blocks)
            assert [p.kind for p in parts] == ["attention", *(["cross-attention"] if crossed else []), "feed-forward"]
            assert parts[0].about.startswith("4 heads of 16")
            assert parts[0].title.startswith("Masked") == (stack.name == "decoder")


WIRED = """
causal llama: [RMSNorm]attention+, [RMSNorm]feed-forward+
causal gpt2: [LayerNorm]attention+, [LayerNorm]feed-forward+
masked bert: attention+ > [LayerNorm], feed-forward+ > [LayerNorm]
causal gemma2: [RMSNorm]attention[RMSNorm]+, [RMSNorm]feed-forward[RMSNorm]+
causal olmo2: attention[RMSNorm]+, feed-forward[RMSNorm]+
causal gpt_neox: [LayerNorm]attention | [LayerNorm]feed-forward+
causal phi: [LayerNorm]attention | feed-forward+
causal mixtral: [RMSNorm]attention+, [RMSNorm]experts+
causal opt: [LayerNorm]attention+, [LayerNorm]feed-forward+
causal afmoe: [RMSNorm]attention[RMSNorm]+, [RMSNorm]experts[RMSNorm]+
masked albert: attention+ > [LayerNorm], feed-forward+ > [LayerNorm]
seq2seq t5: [RMSNorm]attention+, [RMSNorm]cross-attention+, [RMSNorm]feed-forward+
seq2seq bart: attention+ > [LayerNorm], cross-attention+ > [LayerNorm], feed-forward+ > [LayerNorm]
seq2seq mbart: [LayerNorm]attention+, [LayerNorm]cross-attention+, [LayerNorm]feed-forward+
"""


@pytest.mark.parametrize("line", WIRED.strip().splitlines())
def test_norms_are_where_the_papers_put_them(line):
    model, _, expected = line.partition(": ")
    kind, family = model.split()
    architecture = describe_config(AUTO[kind], AutoConfig.for_model(family, **SMALL), KINDS[kind])
    assert spell(architecture.stacks[-1].blocks[-1]) == expected


def test_falcons_parallel_branches_each_have_a_norm():
    """Both norms run before the attention."""
    falcon = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2}
    settings = AutoConfig.for_model("falcon", **falcon, vocab_size=50, new_decoder_architecture=True)
    (stack,) = describe_config(AutoModelForCausalLM, settings).stacks
    assert spell(stack.blocks[0]) == "[LayerNorm]attention | [LayerNorm]feed-forward+"


def test_parts_name_their_modules_heads_and_activation(built: Built):
    (stack,) = describe_config(AutoModelForCausalLM, AutoConfig.for_model("qwen3", **SMALL)).stacks
    attention, forward = branches_of(stack.blocks[0])
    assert attention.about.startswith("4 heads of 8, 2 for keys and values; RMSNorm on queries and keys; rotary")
    assert [weights.name for weights in attention.weights][:4] == [f"self_attn.{name}_proj" for name in "qkvo"]
    assert attention.weights[1].shape == "32 → 16"
    assert forward.about == "48 wide, silu, gated"
    assert branches_of(describe(built("gpt2"))[0].stacks[0].blocks[0])[1].about == "256 wide, gelu_new"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["rotary"]),
        ("gpt2", ["a learned table"]),
        ("deberta", ["relative"]),
        ("modernbert", ["rotary"]),
        ("t5", ["relative", "relative"]),
        ("nllb", ["sines", "sines"]),
        ("whisper", ["sines", "a learned table"]),
        ("wav2vec2", ["a convolution"]),
    ],
)
def test_position_encodings_are_found_by_family(built: Built, family: str, expected: list[str]):
    for stack, begins in zip(describe(built(family))[0].stacks, expected, strict=True):
        (order,) = stack.orders
        assert order.startswith(begins)


def test_a_tied_head_adds_no_parameters(built: Built):
    head = describe(built("llama"))[0].stacks[-1].behind[-1]
    assert (head.title, head.parameters, head.tied) == ("Head", 0, True)


def test_weights_stored_twice_are_not_tied(tmp_path: Path):
    """T5's configuration always says that they are tied; loading looks at the files."""
    folder = families.build_t5(tmp_path / "t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    architecture, _ = describe(folder)
    with open_quietly(folder).open_model("model") as model:
        assert model.lm_head.weight is not model.shared.weight
        assert architecture.parameters == model.num_parameters()
    assert architecture.stacks[-1].behind[-1].parameters > 0


def test_different_blocks_are_drawn_separately(built: Built):
    """ModernBERT's first block has no norm before its attention, and its attention reaches 8 tokens in two of three."""
    (stack,) = describe(built("modernbert"))[0].stacks
    assert [(blocks.title, spell(blocks)) for blocks in stack.blocks] == [
        ("block 0", "attention+, [LayerNorm]feed-forward+"),
        ("blocks 1 to 2", "[LayerNorm]attention+, [LayerNorm]feed-forward+"),
    ]
    assert "window 8 each way in 2 of 3 layers" in branches_of(stack.blocks[0])[0].about


def test_shared_weights_are_counted_once(tmp_path: Path):
    settings = AutoConfig.for_model("albert", **{**SMALL, "num_hidden_layers": 5}, embedding_size=16)
    architecture = describe_config(AutoModelForMaskedLM, settings, "encoder")
    (blocks,) = architecture.stacks[0].blocks
    assert (blocks.numbers, blocks.runs) == ((0,), 5)
    assert "× 5" in texts_of(draw_architecture(tmp_path / "model", architecture, None)[0])


def test_a_model_that_cannot_run_on_shapes_is_drawn_without_a_path(built: Built, tmp_path: Path):
    architecture, _ = describe(built("llama"))
    target = open_quietly(built("llama"))
    fake = build_fake_model(target)

    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("cannot be run")

    fake.model.forward = broken
    drawn = describe_architecture(target, fake)
    assert drawn.untraced == "cannot be run"
    assert drawn.stacks[0].blocks[0].typical == architecture.stacks[0].blocks[0].typical
    shown = texts_of(draw_architecture(tmp_path / "model", drawn, None)[0])
    assert "Masked self-attention" in shown
    assert "+" not in shown  # no residual path is drawn


@pytest.mark.parametrize(("family", "added"), [("llama", 0), ("bert", 2), ("whisper", 2), ("t5", 0)])
def test_a_drawing_has_a_sum_for_each_residual_path_and_is_self_contained(built: Built, tmp_path: Path, family, added):
    architecture, _ = describe(built(family))
    (path,) = draw_architecture(tmp_path / "model", architecture, None)
    shown = texts_of(path)
    assert shown.count("× 2") == len(architecture.stacks)
    parts = [part for stack in architecture.stacks for blocks in stack.blocks for part in blocks.parts]
    assert shown.count("+") == sum(part.added for part in parts) + added  # positions, token types
    assert set(re.findall(r'(?:href|src)="([^"#][^"]*)"', path.read_text())) == set()


def test_outputs_are_described():
    """BERT's pooler sees only the first token, so its output is not per word."""
    bert = AutoConfig.for_model("bert", **SMALL, num_labels=5)
    pooled = describe_config(AutoModel, bert, "encoder").stacks[0]
    assert [part.about for part in pooled.behind] == ["32 → 32, once for the text"]
    assert pooled.gives == "32 numbers for each word, and as many for the text"
    llama = AutoConfig.for_model("llama", **SMALL, num_labels=5)
    assert describe_config(AutoModelForTokenClassification, bert).stacks[0].gives == "5 scores for each token"
    for settings in (bert, llama):
        assert describe_config(AutoModelForSequenceClassification, settings).stacks[0].gives == "5 scores for the text"


def test_trained_modules_are_marked_with_their_number_of_blocks():
    trained = TrainedModules("lora", {"layers.2.q_proj": TrainedModule("LoRA", 10, 4)})
    assert trained.mark([f"layers.{number}.q_proj" for number in range(3)]) == "LoRA r 4 in 1 of 3"
    assert trained.mark(["layers.2.q_proj"]) == "LoRA r 4"
    assert trained.mark(["layers.2.k_proj"]) == ""


def test_numbers_and_names_are_short():
    assert [briefly(n) for n in (7, 999, 1000, 134_515_008, 2.5e12)] == ["7", "999", "1 k", "135 M", "2.5 T"]
    names = ["attention.output.dense", "output.dense", "attention.self.query"]
    assert [short_module_name(name, names) for name in names] == ["attention.output.dense", "output.dense", "query"]
