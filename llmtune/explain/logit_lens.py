"""The logit lens: each layer's prediction if it were the last one, read through the model's own head.

nostalgebraist, "interpreting GPT: the logit lens" (2020). Shapes: P examined positions, L layers plus one
(the input of the first), D width, V vocabulary, R rows of a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from llmtune.model.causal_lm_loss import accepted_arguments, unwrap
from llmtune.model.device import is_out_of_memory
from llmtune.model.towers import find_towers

ROWS = 64
"""Hidden states per replay; logits for each are in memory at once."""
TOLERANCE = 1e-3
"""Maximum RMS difference of the last layer's logits from the model's, as a share of their standard deviation."""
SHAPE_ERRORS = (ValueError, TypeError, IndexError, AttributeError, KeyError, NotImplementedError)
LayerOutput = torch.Tensor | tuple[torch.Tensor | None, ...]


def find_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers before the head, in order, or an empty list if not found.

    They are the longest module list nearest to the top of the body. For an encoder-decoder, or a model that has towers,
    it is that of the decoder.
    """
    inner = unwrap(model)
    body = inner.get_decoder() if inner.config.is_encoder_decoder or find_towers(inner) else inner.base_model
    lists = [(name.count("."), part) for name, part in body.named_modules() if isinstance(part, torch.nn.ModuleList)]
    nearest = min((depth for depth, _ in lists), default=0)
    return list(max((part for depth, part in lists if depth == nearest), key=len, default=()))


@dataclass
class ForwardPass:
    """The results of one forward pass at the examined positions."""

    model: PreTrainedModel
    logits: torch.Tensor
    """Logits [P, V], on the CPU."""
    hidden: list[torch.Tensor]
    """Hidden states [P, D] before and after every layer, on the CPU."""
    output_sizes: Mapping[torch.nn.Module, int]
    """Length of each layer's output tuple; 0 if it returns only the hidden state."""


@torch.inference_mode()
def run_forward(model: torch.nn.Module, inputs: Mapping[str, object], positions: Sequence[int] | slice) -> ForwardPass:
    """Run a model once, and keep its logits and hidden states at `positions`."""
    hidden: list[torch.Tensor] = []
    sizes: dict[torch.nn.Module, int] = dict.fromkeys(find_layers(model), 0)

    def pick(whole_1TD: torch.Tensor) -> torch.Tensor:
        return whole_1TD[0, positions].float().cpu()

    def keep_input(layer: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        if not hidden:  # the first layer's
            hidden.append(pick(args[0] if args else kwargs["hidden_states"]))

    def keep_output(layer: torch.nn.Module, args: tuple[object, ...], output: LayerOutput) -> None:
        sizes[layer] = len(output) if isinstance(output, tuple) else 0
        hidden.append(pick(cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)))

    with ExitStack() as hooks:
        for layer in sizes:
            hooks.callback(layer.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(keep_output).remove)
        logits = pick(model(**inputs).logits)
    return ForwardPass(unwrap(model), logits, hidden, sizes)


def read_lens(seen: ForwardPass) -> Iterator[torch.Tensor] | None:
    """Return logits [L, V] for each position; None if the lens cannot read this model.

    Nothing is assumed about the modules after the layers (norm, scale, soft cap, bias): the model itself runs with
    layers that only return a given hidden state. The last layer's logits must equal the model's own, which is
    checked before anything is returned.
    """
    if len(seen.hidden) < 2 or len({part.shape for part in seen.hidden}) > 1:
        return None
    hidden_PLD = torch.stack(seen.hidden, dim=1)
    try:
        for row in (0, -1):
            if not agree(replay(seen, hidden_PLD[row, -1:])[0], seen.logits[row]):
                return None
    except SHAPE_ERRORS:
        return None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return None
    return (torch.cat([replay(seen, part) for part in hidden_LD.split(ROWS)]) for hidden_LD in hidden_PLD)


def agree(read_V: torch.Tensor, expected_V: torch.Tensor) -> bool:
    """Whether two logits [V] are equal up to rounding; ignores tokens that the model rules out (-inf)."""
    counted = expected_V.isfinite()
    if not counted.any() or not read_V[counted].isfinite().all():
        return False
    apart = (read_V[counted] - expected_V[counted]).square().mean().sqrt()
    return bool(apart <= TOLERANCE * expected_V[counted].std().clamp(min=1e-6))


@torch.inference_mode()
def replay(seen: ForwardPass, hidden_RD: torch.Tensor) -> torch.Tensor:
    """Return the model's logits [R, V] for hidden states [R, D], as if they came from its last layer."""
    model = seen.model
    weight = model.get_output_embeddings().weight
    # 4-bit weights are bytes, so such models store their compute dtype
    dtype = weight.dtype if weight.dtype.is_floating_point else model.dtype
    hidden_R1D = hidden_RD[:, None].to(model.device, dtype)
    ids_R1 = torch.zeros((len(hidden_RD), 1), dtype=torch.int64, device=model.device)
    inputs: dict[str, object] = {"use_cache": False} if "use_cache" in accepted_arguments(model.__class__) else {}
    if model.config.is_encoder_decoder:
        width = getattr(model.config, "d_model", None) or model.config.hidden_size
        nothing = hidden_R1D.new_zeros((len(hidden_RD), 1, width))
        inputs |= {"encoder_outputs": BaseModelOutput(last_hidden_state=nothing), "decoder_input_ids": ids_R1}
    else:
        inputs["input_ids"] = ids_R1
    with replaced_layers(seen.output_sizes, hidden_R1D):
        return cast(torch.Tensor, model(**inputs).logits[:, -1].float().cpu())


@contextmanager
def replaced_layers(output_sizes: Mapping[torch.nn.Module, int], hidden: torch.Tensor) -> Iterator[None]:
    """Make each layer return `hidden` for any input, in a tuple if it normally returns one.

    Other items of the tuple (T5's biases) become None, because only layers read them.
    """
    original_forwards = {layer: layer.__dict__.get("forward") for layer in output_sizes}
    try:
        for layer, size in output_sizes.items():
            layer.forward = _constant(hidden, size)
        yield
    finally:
        for layer, forward in original_forwards.items():
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _constant(hidden: torch.Tensor, size: int) -> Callable[..., LayerOutput]:
    output = (hidden, *[None] * (size - 1)) if size else hidden
    return lambda *args, **kwargs: output
