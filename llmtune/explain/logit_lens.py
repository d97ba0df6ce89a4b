"""The logit lens: what each layer would predict if it were the last one, read through the model's own head.

nostalgebraist, "interpreting GPT: the logit lens" (2020). Shapes: P positions that are looked at, L layers and one more
(what goes into the first), D width, V vocabulary, R rows of a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from transformers.modeling_outputs import BaseModelOutput

from llmtune.model.causal_lm_loss import accepted_arguments, unwrap
from llmtune.model.oom import is_out_of_memory

ROWS = 64
"""Hidden states that are read at once: that many times the vocabulary is in memory."""
TOLERANCE = 1e-3
"""How far the last layer's logits may lie from the model's, as a share of their standard deviation (RMS)."""
SHAPE_ERRORS = (ValueError, TypeError, IndexError, AttributeError, KeyError, NotImplementedError)
Output = torch.Tensor | tuple[torch.Tensor | None, ...]


def find_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers before the head, in order; an empty list where they cannot be found.

    They are the longest list of modules that lies nearest to the top of the body (of two halves: of the decoder).
    """
    inner = unwrap(model)
    body = inner.get_decoder() if inner.config.is_encoder_decoder else inner.base_model
    lists = [(name.count("."), part) for name, part in body.named_modules() if isinstance(part, torch.nn.ModuleList)]
    nearest = min((depth for depth, _ in lists), default=0)
    return list(max((part for depth, part in lists if depth == nearest), key=len, default=()))


class HiddenStates:
    """Keeps, of each forward pass of a model, the hidden states at some positions before and behind every layer.

    Use it as a context. `passes` holds a list a forward pass, of L tensors [P, D], on the CPU; `first` and `last` the
    model's own logits at those positions, [P, V], of the first pass and the last.
    """

    def __init__(self, model: torch.nn.Module, positions: Sequence[int]) -> None:
        self.model = unwrap(model)
        self.positions = list(positions)
        self.passes: list[list[torch.Tensor]] = []
        self.first: torch.Tensor | None = None
        self.last: torch.Tensor | None = None
        self.output_sizes: dict[torch.nn.Module, int] = dict.fromkeys(find_layers(model), 0)
        """The length of the tuple that a layer returns; 0 where it returns the hidden state alone."""
        self._stack = ExitStack()

    def __enter__(self) -> HiddenStates:
        hooks = [self.model.register_forward_pre_hook(lambda *_: self.passes.append([]))]
        hooks.append(self.model.register_forward_hook(self._keep_logits))
        for layer in self.output_sizes:
            hooks.append(layer.register_forward_pre_hook(self._keep_input, with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._keep_output))
        for hook in hooks:
            self._stack.callback(hook.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _keep_input(
        self, layer: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
    ) -> None:
        if not self.passes[-1]:  # the first layer's
            self.passes[-1].append(self._pick(args[0] if args else kwargs["hidden_states"]))

    def _keep_output(self, layer: torch.nn.Module, args: tuple[object, ...], output: Output) -> None:
        self.output_sizes[layer] = len(output) if isinstance(output, tuple) else 0
        hidden = output[0] if isinstance(output, tuple) else output
        assert hidden is not None
        self.passes[-1].append(self._pick(hidden))

    def _keep_logits(self, model: torch.nn.Module, args: tuple[object, ...], output: BaseModelOutput) -> None:
        self.last = self._pick(output.logits)
        self.first = self.last if self.first is None else self.first

    def _pick(self, hidden_1TD: torch.Tensor) -> torch.Tensor:
        return hidden_1TD.detach()[0, self.positions].float().cpu()

    def stacked(self) -> torch.Tensor | None:
        """Return the hidden states of all passes, [passes * P, L, D]; None where a layer was not seen once a pass."""
        counts = {len(seen) for seen in self.passes}
        shapes = {part.shape for seen in self.passes for part in seen}
        if not self.passes or len(counts) != 1 or len(shapes) != 1 or counts.pop() < 2:
            return None
        return torch.cat([torch.stack(seen, dim=1) for seen in self.passes])


def read_lens(states: HiddenStates) -> Iterator[torch.Tensor] | None:
    """Return logits [L, V] for each position of each pass; None where this model's layers cannot be read so.

    Nothing is assumed of what stands behind the layers (norm, scale, soft cap, bias): the model itself is run with
    layers that do nothing but return the hidden state. The last layer's logits have to be the model's own: that is
    checked before anything is returned.
    """
    hidden_NLD = states.stacked()
    if hidden_NLD is None:
        return None
    try:
        for row, logits_PV in ((0, states.first), (-1, states.last)):
            assert logits_PV is not None
            if not agree(replay(states, hidden_NLD[row, -1:])[0], logits_PV[row]):
                return None
    except SHAPE_ERRORS:
        return None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return None
    return (torch.cat([replay(states, part) for part in hidden_LD.split(ROWS)]) for hidden_LD in hidden_NLD)


def agree(read_V: torch.Tensor, expected_V: torch.Tensor) -> bool:
    """Whether two logits [V] are the same but for rounding; those that the model rules out (-inf) do not count."""
    counted = expected_V.isfinite()
    if not counted.any() or not read_V[counted].isfinite().all():
        return False
    apart = (read_V[counted] - expected_V[counted]).square().mean().sqrt()
    return bool(apart <= TOLERANCE * expected_V[counted].std().clamp(min=1e-6))


@torch.inference_mode()
def replay(states: HiddenStates, hidden_RD: torch.Tensor) -> torch.Tensor:
    """Return the logits [R, V] that the model makes of hidden states [R, D] as if they came from its last layer."""
    model = states.model
    weight = model.get_output_embeddings().weight
    # 4-bit weights are bytes: those models say in which format they compute
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
    with replaced_layers(states.output_sizes, hidden_R1D):
        return cast(torch.Tensor, model(**inputs).logits[:, -1].float().cpu())


@contextmanager
def replaced_layers(output_sizes: Mapping[torch.nn.Module, int], hidden: torch.Tensor) -> Iterator[None]:
    """Let each layer return `hidden` whatever it gets, in a tuple where it returns one otherwise.

    Layers that return more in a tuple (T5's biases) return None in its other places: only layers read those.
    """
    own = {layer: layer.__dict__.get("forward") for layer in output_sizes}
    try:
        for layer, size in output_sizes.items():
            layer.forward = _constant(hidden, size)
        yield
    finally:
        for layer, forward in own.items():
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _constant(hidden: torch.Tensor, size: int) -> Callable[..., Output]:
    output = (hidden, *[None] * (size - 1)) if size else hidden
    return lambda *args, **kwargs: output
