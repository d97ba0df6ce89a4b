from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from support import families
from support.adapting import quiet
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from llmtune.explain.architecture import Architecture, describe_model
from llmtune.explain.architecture_figure import draw_architecture
from llmtune.explain.labels import briefly, describe_branch, describe_outputs, describe_piece, mark, rows_of, shorten
from llmtune.explain.meta_device_model import MetaModel, build_meta_model
from llmtune.explain.model_explainer import count_parts
from llmtune.explain.target import open_target
from llmtune.explain.trained_modules import TrainedModule, TrainedModules

FAMILIES = ("llama", "gpt2", "bert", "distilbert", "roberta", "deberta", "modernbert", "t5", "mt5", "bart", "nllb")
FAMILIES += ("whisper", "wav2vec2")
Built = Callable[[str], Path]


@cache
def describe(folder: Path) -> tuple[Architecture, MetaModel]:
    target = open_target(str(folder), quiet(), offline=True)
    meta = build_meta_model(target)
    return describe_model(target, meta), meta


def add_up(architecture: Architecture) -> int:
    pieces = sum(p.parameters for stack in architecture.stacks for p in (*stack.before, *stack.behind))
    blocks = sum(group.parameters for stack in architecture.stacks for group in stack.blocks)
    return pieces + blocks + sum(architecture.other.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_counted_once(built: Built, family: str):
    architecture, meta = describe(built(family))
    with open_target(str(built(family)), quiet(), offline=True).open_model("model") as model:
        assert architecture.parameters == model.num_parameters()
    assert add_up(architecture) == architecture.parameters
    assert sum(count_parts(architecture).values()) == architecture.parameters
    assert all(parameter.is_meta for parameter in meta.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_blocks_count_as_the_config_says(built: Built, family: str):
    config = AutoConfig.from_pretrained(built(family))
    architecture, _ = describe(built(family))
    layers = {
        "encoder": getattr(config, "encoder_layers", config.num_hidden_layers),
        "decoder": getattr(config, "decoder_layers", config.num_hidden_layers),
    }
    expected = ["encoder", "decoder"] if config.is_encoder_decoder else [architecture.family]
    assert [stack.name for stack in architecture.stacks] == expected
    for stack in architecture.stacks:
        assert sum(len(group.numbers) for group in stack.blocks) == layers[stack.name]
        assert stack.causal is (stack.name == "decoder")
        for group in stack.blocks:
            assert group.unknown is None
            kinds = [branch.kind for branch in group.branches()]
            crossed = config.is_encoder_decoder and stack.name == "decoder"
            assert kinds == ["attention", *(["cross-attention"] if crossed else []), "feed-forward"]
            assert group.branches()[0].heads == 4
            assert group.branches()[0].head_size == 16


def test_grouped_keys_are_told(built: Built):
    architecture, _ = describe(built("llama"))
    (stack,) = architecture.stacks
    (group,) = stack.blocks
    assert stack.kv_heads == 2
    assert group.shapes["self_attn.k_proj"] == (64, 32)
    assert describe_branch(group.branches()[0], group, stack)[0] == "4 heads of 16, 2 for keys and values"
    assert describe_branch(group.branches()[1], group, stack) == ["128 wide, SiLU, gated"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["rotary"]),
        ("gpt2", ["a learned table"]),
        ("bert", ["a learned table"]),
        ("deberta", ["relative"]),
        ("modernbert", ["rotary"]),
        ("t5", ["relative", "relative"]),
        ("nllb", ["sines", "sines"]),
        ("whisper", ["sines", "a learned table"]),
        ("wav2vec2", ["a convolution"]),
    ],
)
def test_how_a_model_knows_the_order_of_words(built: Built, family: str, expected: list[str]):
    architecture, _ = describe(built(family))
    assert len(architecture.stacks) == len(expected)
    for stack, begins in zip(architecture.stacks, expected, strict=True):
        (order,) = stack.orders
        assert order.startswith(begins)


def test_a_tied_head_has_no_parameters_of_its_own(built: Built):
    architecture, _ = describe(built("llama"))
    head = architecture.stacks[-1].behind[-1]
    assert (head.parameters, head.tied_to) == (0, "model.embed_tokens")
    assert architecture.tied_head
    untied, _ = describe(built("mt5"))
    head = untied.stacks[-1].behind[-1]
    assert (head.parameters, head.tied_to) == (64 * head.shape[1], None)
    assert not untied.tied_head


def test_weights_that_the_files_hold_twice_are_not_tied(tmp_path: Path):
    """T5's configuration says that they are, in any case; loading looks at the files."""
    folder = families.build_t5(tmp_path / "t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    architecture, _ = describe(folder)
    with open_target(str(folder), quiet(), offline=True).open_model("model") as model:
        assert model.lm_head.weight is not model.shared.weight
        assert architecture.parameters == model.num_parameters()
    assert architecture.stacks[-1].behind[-1].parameters > 0


def test_blocks_that_differ_are_drawn_apart(built: Built):
    """ModernBERT's first block has no norm before its attention, and its attention reaches 8 tokens in two of three."""
    (stack,) = describe(built("modernbert"))[0].stacks
    assert [group.numbers for group in stack.blocks] == [(0,), (1, 2)]
    assert [bool(group.branches()[0].before) for group in stack.blocks] == [False, True]
    assert stack.window == "window 8 each way in 2 of 3 layers"


def describe_config(kind: type, family: str, **config: object) -> Architecture:
    class Stand:
        name, family = "tiny", "decoder" if kind is AutoModelForCausalLM else "encoder"

    settings = AutoConfig.for_model(family, **config)
    with torch.device("meta"):
        model = kind.from_config(settings, attn_implementation="eager").eval()
    if getattr(settings, "_experts_implementation", None) is not None:
        model.set_experts_implementation("batched_mm")
    return describe_model(Stand, MetaModel(model, lambda: model))


def test_weights_that_are_used_again_and_again_are_counted_once(tmp_path: Path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "embedding_size": 16}
    architecture = describe_config(AutoModelForMaskedLM, "albert", num_hidden_layers=5, **sizes)
    (group,) = architecture.stacks[0].blocks
    assert (group.numbers, group.runs) == ((0,), 5)
    assert add_up(architecture) == architecture.parameters
    assert "× 5" in texts_of(draw_architecture(tmp_path / "model", architecture, None)[0])


def test_experts_and_their_router_are_told():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    architecture = describe_config(
        AutoModelForCausalLM, "mixtral", num_hidden_layers=2, num_local_experts=3, vocab_size=50, **sizes
    )
    (stack,) = architecture.stacks
    (group,) = stack.blocks
    branch = group.branches("experts")[0]
    assert describe_branch(branch, group, stack) == ["3 experts, a router, SiLU, gated"]
    rows = {row.name: row.shape for row in rows_of(branch.modules, group, None)}
    assert rows == {"gate": "32 → 3", "gate_up_proj": "3 × (96 × 32)", "down_proj": "3 × (32 × 48)"}
    assert add_up(architecture) == architecture.parameters


def test_a_model_that_looks_at_numbers_is_traced_all_the_same():
    """XLNet makes tensors on the CPU in its forward: it is run on zeros that take no memory."""
    settings = AutoConfig.for_model("xlnet", d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=50)

    def build() -> torch.nn.Module:
        return AutoModelForCausalLM.from_config(settings).eval()

    class Stand:
        name, family = "tiny", "decoder"

    with torch.device("meta"):
        model = build()
    architecture = describe_model(Stand, MetaModel(model, build))
    assert architecture.untraced is None
    assert [branch.kind for branch in architecture.stacks[0].blocks[0].branches()] == ["attention", "feed-forward"]


def test_a_model_that_cannot_be_run_is_drawn_without_an_order(built: Built, tmp_path: Path):
    architecture, _ = describe(built("llama"))
    target = open_target(str(built("llama")), quiet(), offline=True)
    model = build_meta_model(target).model

    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("cannot be run")

    model.forward = broken
    drawn = describe_model(target, MetaModel(model, lambda: model))
    assert drawn.untraced == "cannot be run"
    (group,) = drawn.stacks[0].blocks
    assert (group.wiring, group.parameters) == (None, architecture.stacks[0].blocks[0].parameters)
    assert add_up(drawn) == drawn.parameters
    shown = texts_of(draw_architecture(tmp_path / "model", drawn, None)[0])
    assert "Order of parts not known" in shown
    assert "+" not in shown  # no residual path is drawn


def texts_of(path: Path) -> list[str | None]:
    return [text.text for text in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("family", ["llama", "bert", "whisper", "t5"])
def test_a_drawing_has_a_sum_for_each_residual_path_and_stands_alone(built: Built, tmp_path: Path, family):
    architecture, _ = describe(built(family))
    (path,) = draw_architecture(tmp_path / "model", architecture, None)
    shown = texts_of(path)
    assert shown.count("× 2") == len(architecture.stacks)
    sublayers = [sublayer for stack in architecture.stacks for g in stack.blocks for sublayer in g.wiring.sublayers]
    added = {"llama": 0, "bert": 2, "whisper": 2, "t5": 0}[family]  # positions, token types
    assert shown.count("+") == len(sublayers) + added
    assert set(re.findall(r'(?:href|src)="([^"#][^"]*)"', path.read_text())) == set()


def test_a_layer_that_works_once_for_a_text_is_told():
    """BERT's pooler sees the first token alone: what it gives is no vector for each word."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    architecture = describe_config(AutoModel, "bert", **sizes)
    (stack,) = architecture.stacks
    assert [(piece.name, piece.once) for piece in stack.behind] == [("pooler.dense", True)]
    assert describe_piece(stack.behind[0]) == "32 → 32, once for the text"
    assert describe_outputs(architecture, stack) == "32 numbers for each word, and as many for the text"
    marked = describe_config(AutoModelForTokenClassification, "bert", num_labels=5, **sizes)
    assert describe_outputs(marked, marked.stacks[0]) == "5 scores for each token"
    classed = describe_config(AutoModelForSequenceClassification, "bert", num_labels=5, **sizes)
    assert describe_outputs(classed, classed.stacks[0]) == "5 scores for the text"
    sizes |= {"num_key_value_heads": 2, "num_attention_heads": 4, "vocab_size": 50, "num_labels": 5}
    judge = describe_config(AutoModelForSequenceClassification, "llama", **sizes)  # it scores all, and takes the last
    assert describe_outputs(judge, judge.stacks[0]) == "5 scores for the text"


def test_what_was_trained_is_marked_with_how_many_blocks_have_it():
    trained = TrainedModules("lora", {"layers.2.q_proj": TrainedModule("LoRA", 10, 4)})
    assert mark([f"layers.{number}.q_proj" for number in range(3)], trained) == "LoRA r 4 in 1 of 3"
    assert mark(["layers.2.q_proj"], trained) == "LoRA r 4"
    assert mark(["layers.2.k_proj"], trained) == mark(["layers.2.q_proj"], None) == ""


def test_numbers_and_names_are_short():
    assert [briefly(n) for n in (7, 999, 1000, 134_515_008, 2.5e12)] == ["7", "999", "1 k", "135 M", "2.5 T"]
    names = ["attention.output.dense", "output.dense", "attention.self.query"]
    assert [shorten(name, names) for name in names] == ["attention.output.dense", "output.dense", "query"]
