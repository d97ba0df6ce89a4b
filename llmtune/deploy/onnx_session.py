"""An ONNX file in onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from llmtune.deploy.parity import LIMITS, Limits
from llmtune.errors import EnvironmentProblem, first_line
from llmtune.recipe.model_kind import ModelKind

PAST = "past_key_values"
"""First part of the names of the inputs with the keys and values of earlier tokens."""
INT8_LIMITS = Limits(kl_floor=3e-2, kl_cap=3e-2, top1=0.9, cosine=3e-2, score=5e-2)
ONNX_TYPES = {
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
}
FATAL = 4
"""onnxruntime's level for fatal errors only."""
Tensors = Mapping[str, torch.Tensor | None]


class OnnxSession:
    """One ONNX file, opened by onnxruntime on the CPU with the threads of this process."""

    def __init__(self, file: Path, layers: Sequence[str] = ()) -> None:
        """Open `file`; `layers` are inner values to return as well."""
        import onnxruntime

        self.file = file
        onnxruntime.set_default_logger_severity(FATAL)  # its log writes names out of the file to the terminal
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = FATAL
        content = str(file)
        with self.explained("open"):
            if layers:
                import onnx

                graph = onnx.load(file)
                graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in layers)
                content = graph.SerializeToString()
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.inputs = {one.name: (self._read_type(one.type), one.shape) for one in self.session.get_inputs()}
        """Number type and shape of each input."""
        self.outputs = [one.name for one in self.session.get_outputs()]
        for one in self.session.get_outputs():
            self._read_type(one.type)
        self.shape = self.session.get_outputs()[0].shape
        """Shape of the first output; names of lengths that vary."""

    def _read_type(self, kind: str) -> str:
        """Return the number type of an input or output."""
        if kind not in ONNX_TYPES:
            what = f"an input or output has the type {kind}; known types are {', '.join(ONNX_TYPES)}"
            raise EnvironmentProblem.of(what, str(self.file), "Export the model in float32 or float16.")
        return ONNX_TYPES[kind]

    @property
    def runtime(self) -> str:
        """Name and version of the program."""
        return f"onnxruntime {version('onnxruntime')}"

    def is_rounded(self) -> bool:
        """Return whether weights are integers."""
        return bool({"INT8", "UINT8"} & self.read_formats())

    def read_formats(self) -> set[str]:
        """Return ONNX's names of the number formats of weight matrices."""
        import onnx

        with self.explained("read"):
            weights = onnx.load(self.file, load_external_data=False).graph.initializer
        return {onnx.TensorProto.DataType.Name(one.data_type) for one in weights if len(one.dims) > 1}

    def limits(self) -> Limits:
        """Return how far the number format of the weights may move the model."""
        halves = "FLOAT16" in self.read_formats()
        return INT8_LIMITS if self.is_rounded() else LIMITS["rounded" if halves else "exact"]

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn errors of the program, which have no common class, into an EnvironmentProblem."""
        from google.protobuf.message import DecodeError
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        kinds = (
            DecodeError,
            *(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
        )
        try:
            yield
        except kinds as error:
            reason = f"onnxruntime cannot {what} the file: {first_line(error)}"
            raise EnvironmentProblem.of(reason, str(self.file)) from error

    def check_head(self, widths: Sequence[int], kind: ModelKind) -> None:
        """Raise EnvironmentProblem if the outputs are not those of a head of this kind.

        If the first output has a fixed width, it must be one of `widths`.
        """
        axes = kind.output_axes or len(self.shape)
        width = self.shape[-1] if len(self.outputs) == 1 else None
        other_head = len(self.outputs) == 1 if kind.points_at_span else "start_logits" in self.outputs
        if other_head or len(self.shape) != axes or (isinstance(width, int) and width not in widths):
            what = f"the file returns {', '.join(self.outputs)} of shape {self.shape}: it lacks the run's head"
            raise EnvironmentProblem.of(what, str(self.file), "Export the model with its head.")

    def run(self, given: Tensors) -> dict[str, torch.Tensor]:
        """Return the outputs by name; an empty cache and token types are filled in."""
        batch = len(next(part for part in given.values() if part is not None))
        feed = {}
        for name, (kind, shape) in self.inputs.items():
            part = given.get(name)
            if part is not None:
                feed[name] = part.numpy().astype(kind, copy=False)
            elif name.startswith(PAST) and len(shape) == 4 and all(isinstance(shape[i], int) for i in (1, 3)):
                # [B, heads, P, width]
                feed[name] = np.zeros((batch, shape[1], 0, shape[3]), kind)
            elif name == "token_type_ids":
                feed[name] = np.zeros_like(feed["input_ids"])
            else:
                raise EnvironmentProblem.of(f"the file needs the unknown input {name!r}", str(self.file))
        with self.explained("run"):
            arrays = self.session.run(None, feed)
        return {name: torch.from_numpy(part) for name, part in zip(self.outputs, arrays, strict=True)}
