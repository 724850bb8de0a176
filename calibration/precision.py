"""The classifier in float16 or int8: the precision is written into its ONNX file, for every engine to read.

Only the backbone changes, from the image to the last layers before the features and the logits.  Averages over the image
that these are made of, features and logits stay float32: what the guards see is not rounded again.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from inflight_edge.errors import ModelError

__all__ = ["backbone", "to_fp16", "to_int8"]

FloatArray = NDArray[np.float32]
_OUTPUTS = ("features", "logits")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum")
# Inputs that must stay float32, whatever the node computes in.
_FIXED_INPUTS = {"Resize": (1, 2)}
# Float16 ends at 65504; half of it leaves room for images that were not calibrated on.
_LARGEST = 32752.0


def backbone(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Nodes from the image to the last layers before the features and the logits, in the graph's order.

    float32 begins with the layers that make the features and the logits, and with the averages before these, and holds
    for all that follows.  Raises ModelError when nothing with weights remains.
    """
    nodes = list(model.graph.node)
    made_by = {name: node for node in nodes for name in node.output}
    used_by = defaultdict(list)
    for node in nodes:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ModelError(f"model: expected a graph without control flow, got {node.op_type}; keep fp32")
        for name in node.input:
            used_by[name].append(node)
    starts = [*_features_start(made_by), *_logits_start(made_by)]
    tail = _reachable(starts, lambda node: [user for name in node.output for user in used_by[name]])
    ends = [made_by[name] for name in _OUTPUTS if name in made_by]
    needed = _reachable(ends, lambda node: _sources(node, made_by))
    result = [node for node in nodes if id(node) in needed and id(node) not in tail]
    if not any(node.op_type in _LAYERS for node in result):
        raise ModelError("model: expected layers with weights before those of the features, got none; keep fp32")
    return result


def _sources(node: onnx.NodeProto, made_by: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that make a node's inputs."""
    return [made_by[name] for name in node.input if name in made_by]


def _features_start(made_by: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Going back from the features, the first average, layer with weights or sum of branches on each path."""
    pending = [made_by["features"]] if "features" in made_by else []
    while pending:
        node = pending.pop()
        sources = _sources(node, made_by)
        if node.op_type in (*_LAYERS, *_AVERAGES) or (len(sources) > 1 and node.op_type != "Concat"):
            yield node
        else:
            pending.extend(sources)


def _logits_start(made_by: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Going back from the logits, the first layer with weights on each path, and the average that is its input."""
    pending = [made_by["logits"]] if "logits" in made_by else []
    seen = set[int]()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        sources = _sources(node, made_by)
        if node.op_type not in _LAYERS:
            pending.extend(sources)
            continue
        yield node
        while len(sources) == 1 and sources[0].op_type not in _LAYERS:
            if sources[0].op_type in _AVERAGES:
                yield sources[0]
                break
            sources = _sources(sources[0], made_by)


def to_fp16(model: bytes, inputs: FloatArray) -> bytes:
    """The model with its backbone in float16; input and outputs stay float32.

    inputs  (N, channels, H, W) normalised clean images, to see that no activation leaves float16's range.
    Raises ModelError when one does or the model cannot be converted.
    """
    proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    nodes = backbone(proto)
    largest = _largest_activation(proto, nodes, inputs)
    if not largest <= _LARGEST:
        raise ModelError(f"model: activations up to {largest:.4g} leave float16's range; leave fp16 out of --precision")
    _convert(proto.graph, {id(node) for node in nodes}, _float_values(proto.graph))
    del proto.graph.value_info[:]
    return _checked(proto)


def to_int8(model: bytes, inputs: FloatArray) -> bytes:
    """The model with the backbone's layers in int8, by explicit QuantizeLinear and DequantizeLinear.

    Symmetric, weights per channel, bias in float32, as TensorRT takes it.  inputs: (N, channels, H, W) normalised clean
    images that the ranges are taken from.  Raises ModelError.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    proto = onnx.load_from_string(model)
    for i, node in enumerate(proto.graph.node):
        node.name = node.name or f"node_{i}"
    chosen = [node.name for node in backbone(proto) if node.op_type in _LAYERS]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        written = Path(folder) / "model.onnx"
        try:
            quantize_static(
                proto,
                str(written),
                _Reader(proto, inputs),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_LAYERS),
                nodes_to_quantize=chosen,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "AddQDQPairToWeight": True,
                    "OpTypesToExcludeOutputQuantization": list(_LAYERS),
                },
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ModelError(
                f"model: cannot be quantised ({str(error)[:200]}); leave int8 out of --precision"
            ) from error
        return _checked(onnx.load(str(written)))


class _Reader:
    """The images, in batches, for ONNX Runtime's calibration."""

    def __init__(self, model: onnx.ModelProto, inputs: FloatArray) -> None:
        self._batches = iter(_batches(model, inputs))

    def get_next(self) -> dict[str, FloatArray] | None:
        """The next batch by the input's name, None after the last."""
        return next(self._batches, None)


def _batches(model: onnx.ModelProto, inputs: FloatArray) -> Iterator[dict[str, FloatArray]]:
    """Batches of the size that the model takes; a last one that is too small is filled with the first images."""
    image = model.graph.input[0]
    fixed = image.type.tensor_type.shape.dim[0].dim_value
    size = fixed or min(64, len(inputs))
    for start in range(0, len(inputs), size):
        batch = inputs[start : start + size]
        if len(batch) < size and fixed:
            batch = np.concatenate([batch, np.resize(inputs, (size - len(batch), *inputs.shape[1:]))])
        yield {image.name: batch}


def _reachable(starts: list[onnx.NodeProto], following: Any) -> set[int]:
    """Identities of the nodes and of all that follow them."""
    found: set[int] = set()
    pending = list(starts)
    while pending:
        node = pending.pop()
        if id(node) not in found:
            found.add(id(node))
            pending.extend(following(node))
    return found


def _float_values(graph: onnx.GraphProto) -> set[str]:
    """Names of the float32 values."""
    values = [*graph.value_info, *graph.input, *graph.output]
    names = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return names | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}


def _largest_activation(model: onnx.ModelProto, nodes: list[onnx.NodeProto], inputs: FloatArray) -> float:
    """Largest magnitude of a value that the nodes make, over the images."""
    floats = _float_values(model.graph)
    names = [name for node in nodes for name in node.output if name in floats]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    known = {value.name for value in watched.graph.output}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return max(float(np.abs(values).max()) for batch in _batches(model, inputs) for values in session.run(names, batch))


def _convert(graph: onnx.GraphProto, chosen: set[int], floats: set[str]) -> None:
    """Let the chosen nodes compute in float16, with a cast wherever a float32 value enters or leaves."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    inside = {name for node in graph.node if id(node) in chosen for name in node.output if name in floats}
    outside = {name for node in graph.node if id(node) not in chosen for name in node.input}
    outside |= {value.name for value in graph.output}
    nodes: list[onnx.NodeProto] = []
    halves: set[str] = set()
    for node in graph.node:
        if id(node) not in chosen:
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            if name not in floats or i in _FIXED_INPUTS.get(node.op_type, ()):
                continue
            half = f"{name}_half"
            if name in tensors and half not in halves:
                values = numpy_helper.to_array(tensors[name]).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(values, half))
            elif name not in inside and half not in halves:
                nodes.append(helper.make_node("Cast", [name], [half], f"{half}_cast", to=TensorProto.FLOAT16))
            halves.add(half)
            node.input[i] = half
        leaving = [name for name in node.output if name in inside]
        node.output[:] = [f"{name}_half" if name in inside else name for name in node.output]
        _convert_attributes(node)
        nodes.append(node)
        nodes += [
            helper.make_node("Cast", [f"{name}_half"], [name], f"{name}_cast", to=TensorProto.FLOAT)
            for name in leaving
            if name in outside
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _convert_attributes(node: onnx.NodeProto) -> None:
    """Types and tensors that a node names itself."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))


def _checked(model: onnx.ModelProto) -> bytes:
    """The file, when types and shapes fit together."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model: cannot be written in this precision ({reason}); leave it out of --precision"
        ) from error
    return bytes(model.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice to run its own optimiser first: torch's exporter has folded what there is to fold."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
