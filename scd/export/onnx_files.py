"""Modules as ONNX graphs, and the weights of several graphs in one file, each of them once.

Needs onnx and onnxscript: pip install -e ".[onnx]".
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scd.export.graphs import Graph
from scd.export.settings import WeightType

try:
    import onnx
    import onnxscript  # noqa: F401  # What torch.onnx writes graphs with.
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise ValueError(
        'ONNX files need onnx and onnxscript: pip install -c constraints.txt -e ".[onnx]"'
    ) from error

OPSET = 18
"""Of the graphs: the oldest that torch.onnx writes, for as many runtimes as can be."""

WEIGHTS = "weights.bin"
"""Name of the file."""

SMALLEST = 256
"""Values of a tensor from which on it stands in the file of weights, not in its graph."""

ALIGNMENT = 64
"""Bytes to a multiple of which tensors begin: a line of a CPU's cache."""


def traced(graph: Graph) -> onnx.ModelProto:
    """Turn a module into ONNX, for one stream and these shapes alone."""
    inputs = tuple(graph.inputs.values())
    with torch.no_grad(), _quiet():
        program = torch.export.export(graph.module.eval(), inputs, strict=False)
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    assert made is not None
    proto = made.model_proto
    # Where in our code each node was traced: paths of this machine, several times the graph.
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        value.ClearField("metadata_props")
    proto.graph.ClearField("metadata_props")
    proto.ClearField("metadata_props")
    onnx.checker.check_model(proto)
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter says of itself, and of packages that are not there, from the user."""
    log = logging.getLogger("torch.onnx")
    before, log.disabled = log.level, False
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def interface(proto: onnx.ModelProto) -> dict[str, Any]:
    """Say which tensors a graph takes and returns."""
    return {
        side: {
            value.name: {
                "type": TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
                "shape": [axis.dim_value for axis in value.type.tensor_type.shape.dim],
            }
            for value in values
        }
        for side, values in (("inputs", proto.graph.input), ("outputs", proto.graph.output))
    }


class WeightsFile:
    """Collects the tensors of graphs; equal ones stand in the file once."""

    def __init__(self, kind: WeightType) -> None:
        self.kind: WeightType = kind
        self.data = bytearray()
        self._offsets: dict[tuple[bytes, int], int] = {}

    def take(self, model: onnx.ModelProto) -> None:
        """Move the large tensors of a graph into the file; the graph reads them there.

        Raises:
            ValueError: a weight is too large for float16.
        """
        graph, casts = model.graph, []
        for tensor in graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype != np.float32 or values.size < SMALLEST:
                continue
            name = tensor.name
            kind, data = _stored(values, name, self.kind)
            if kind != TensorProto.FLOAT:
                # ONNX Runtime does this once, when it loads the graph.
                tensor.name = f"{name}.stored"
                tensor.data_type = kind
                casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
            self._put(tensor, data)
        for place, node in enumerate(casts):
            graph.node.insert(place, node)

    def _put(self, tensor: TensorProto, data: bytes) -> None:
        key = hashlib.sha256(data).digest(), len(data)
        if key not in self._offsets:
            self.data += bytes(-len(self.data) % ALIGNMENT)
            self._offsets[key] = len(self.data)
            self.data += data
        for field in ("raw_data", "float_data", "external_data"):
            tensor.ClearField(field)
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": WEIGHTS, "offset": self._offsets[key], "length": len(data)}
        for name, value in where.items():
            tensor.external_data.add(key=name, value=str(value))

    def write(self, folder: Path) -> dict[str, str | int]:
        """Write the file; return its name, size, hash and the type of the weights."""
        (folder / WEIGHTS).write_bytes(self.data)
        return {**described(self.data, WEIGHTS), "type": self.kind}


def described(data: bytes | bytearray, name: str) -> dict[str, str | int]:
    """Return name, size and hash of a file."""
    return {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _stored(values: np.ndarray, name: str, kind: WeightType) -> tuple[int, bytes]:
    """Return the type in which a weight is stored, and its bytes."""
    values = np.ascontiguousarray(values)
    bits = values.view(np.uint32)
    if kind == "auto" and not (bits & 0xFFFF).any():
        return TensorProto.BFLOAT16, (bits >> 16).astype("<u2").tobytes()
    if kind != "fp16":
        return TensorProto.FLOAT, values.tobytes()
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(
            f"the weight {name} has values up to {np.abs(values).max():.3g}, float16 ends at "
            "65504: export with --weights fp32"
        )
    return TensorProto.FLOAT16, half.tobytes()
