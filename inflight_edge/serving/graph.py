"""The guards inside the ONNX file: one network from the input to the verdict, for TensorRT and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._contents import DECISIONS
from inflight_edge._optional import require
from inflight_edge.bundle import Bundle
from inflight_edge.errors import ModelError
from inflight_edge.guard import FloatArray, Guard
from inflight_edge.scoring.parameters import prepare
from inflight_edge.verdict import Decision

__all__ = ["OUTPUTS", "with_verdict"]

# Name, Triton's type, dimensions without the batch (0: one per class).
OUTPUTS = (
    ("decision", "INT32", 1),
    ("predicted", "INT32", 1),
    ("source", "INT32", 1),
    ("margin", "FP32", 1),
    ("log_likelihoods", "FP32", 0),
)
_LEAST_OPSET = 13


def with_verdict(bundle: Bundle) -> bytes:
    """ONNX file with the bundle's input and the outputs of OUTPUTS, each (N, width), by the rule of verdict.decide.

    decision         int32: 0 accept, 1 trigger, 2 unguarded, 3 invalid.    predicted  int32, -1 when invalid.
    source           int32, -1 for none.                                    margin     float32 nats, NaN for none.
    log_likelihoods  (N, C) float32 nats, NaN for a class without a density row and where no guard judged.

    The log-sum-exp subtracts the maximum explicitly: TensorRT's parser expands ReduceLogSumExp without, and densities
    underflow.  float32 throughout; in TensorRT switch TF32 off, or the products lose 13 of 24 bits.
    Raises ModelError for a model of an operator set below 13, DependencyError without onnx.
    """
    onnx = require("onnx", "pip install onnx")
    model = onnx.load_model_from_string(bundle.model)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _LEAST_OPSET:
        raise ModelError(f"model.onnx: expected operator set {_LEAST_OPSET} or later, got {opset}; calibrate again")
    graph = _Graph(onnx, model, opset)
    n_classes = len(bundle.class_names)
    logits, features = "logits", "features"
    predicted = graph.op("ArgMax", logits, axis=1, keepdims=1)  # the lowest index among equals
    finite = graph.op("And", graph.all_finite(logits), graph.all_finite(features))
    nan, nothing = graph.constant(np.float32(np.nan)), graph.constant(np.int64(-1))
    # What holds where no guard judges; Where below spreads them to (N, 1) and (N, C).
    decision, source = graph.code(Decision.UNGUARDED), nothing
    margin, rows = nan, graph.constant(np.full((1, n_classes), np.nan, np.float32))
    for guard in bundle.guards:
        mine = graph.op("Equal", predicted, graph.constant(np.int64(guard.target)))
        scores = _rows(graph, features, guard)
        its_margin, its_source = _margin(graph, scores, guard)
        accepted = graph.op("Less", its_margin, graph.constant(np.float32(0)))
        flagged = graph.op("Not", graph.op("Or", accepted, graph.op("IsNaN", its_margin)))
        its_decision = graph.op("Where", flagged, graph.code(Decision.TRIGGER), graph.code(Decision.INVALID))
        its_decision = graph.op("Where", accepted, graph.code(Decision.ACCEPT), its_decision)
        decision = graph.op("Where", mine, its_decision, decision)
        source = graph.op("Where", graph.op("And", mine, flagged), its_source, source)
        margin = graph.op("Where", mine, its_margin, margin)
        judged = graph.op("And", mine, graph.op("Not", graph.op("IsNaN", its_margin)))
        rows = graph.op("Where", judged, _by_class(graph, scores, guard, n_classes), rows)
    decision = graph.op("Where", finite, decision, graph.code(Decision.INVALID))
    predicted = graph.op("Where", finite, predicted, nothing)
    source = graph.op("Where", finite, source, nothing)
    margin = graph.op("Where", finite, margin, nan)
    rows = graph.op("Where", finite, rows, nan)
    graph.outputs({"decision": decision, "predicted": predicted, "source": source}, onnx.TensorProto.INT32, 1)
    graph.outputs({"margin": margin}, onnx.TensorProto.FLOAT, 1)
    graph.outputs({"log_likelihoods": rows}, onnx.TensorProto.FLOAT, n_classes)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


class _Graph:
    """Appends nodes to a model; every name it makes begins with ``guard/``."""

    def __init__(self, onnx: Any, model: Any, opset: int) -> None:
        self._onnx, self._graph, self._opset, self._count = onnx, model.graph, opset, 0
        self._batch = model.graph.input[0].type.tensor_type.shape.dim[0]
        while model.graph.output:
            model.graph.output.pop()

    def _name(self) -> str:
        self._count += 1
        return f"guard/{self._count}"

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """Name of a constant."""
        name = self._name()
        self._graph.initializer.append(self._onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Name of a node's output."""
        name = self._name()
        self._graph.node.append(self._onnx.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def reduce(self, kind: str, value: str, *, keepdims: int = 1) -> str:
        """Reduce the last axis; where the axes stand depends on the operator set."""
        if self._opset >= (13 if kind == "ReduceSum" else 18):
            return self.op(kind, value, self.constant(np.array([-1])), keepdims=keepdims)
        return self.op(kind, value, axes=[-1], keepdims=keepdims)

    def all_finite(self, value: str) -> str:
        """(N, width) -> (N, 1) bool."""
        return self.op("Not", self.any(self.op("Or", self.op("IsNaN", value), self.op("IsInf", value))))

    def any(self, flags: str) -> str:
        """(N, width) bool -> (N, 1) bool."""
        numbers = self.op("Cast", flags, to=self._onnx.TensorProto.FLOAT)
        return self.op("Greater", self.reduce("ReduceMax", numbers), self.constant(np.float32(0)))

    def code(self, decision: Decision) -> str:
        """Constant code of a decision."""
        return self.constant(np.int64(DECISIONS.index(decision)))

    def outputs(self, named: dict[str, str], element: int, width: int) -> None:
        """Make values (N, width) outputs of the graph."""
        for name, value in named.items():
            cast = self._onnx.helper.make_node("Cast", [value], [name], name=f"guard/{name}", to=element)
            self._graph.node.append(cast)
            batch = self._batch.dim_value or self._batch.dim_param or "N"
            self._graph.output.append(self._onnx.helper.make_tensor_value_info(name, element, [batch, width]))


def _rows(graph: _Graph, features: str, guard: Guard) -> str:
    """Log-likelihoods (N, R) of features (N, D)."""
    known = prepare(guard)
    z = graph.op("Div", graph.op("Sub", features, graph.constant(known.mean)), graph.constant(known.scale))
    if guard.kind == "shared":
        centred = graph.op("Sub", z, graph.constant(known.origin))
        z = graph.op("MatMul", centred, graph.constant(np.ascontiguousarray(_triangle(known.whitener, guard).T)))
    middle = graph.op("Unsqueeze", z, graph.constant(np.array([1])))
    white = graph.op("Sub", middle, graph.constant(known.centres))  # (N, M, D)
    if guard.kind == "diagonal":
        white = graph.op("Mul", white, graph.constant(known.whitener))
    elif guard.kind == "full":
        whiteners = np.stack([_triangle(packed, guard) for packed in known.whitener])
        column = graph.op("Unsqueeze", white, graph.constant(np.array([3])))
        column = graph.op("MatMul", graph.constant(whiteners), column)
        white = graph.op("Squeeze", column, graph.constant(np.array([3])))
    squares = graph.reduce("ReduceSum", graph.op("Mul", white, white), keepdims=0)  # (N, M)
    halves = graph.op("Mul", squares, graph.constant(np.float32(-0.5)))
    return _log_sum_exp(graph, graph.op("Add", halves, graph.constant(known.constants)), guard)


def _triangle(packed: FloatArray, guard: Guard) -> FloatArray:
    """(D, D) of a packed lower triangle."""
    square = np.zeros((guard.n_features, guard.n_features), np.float32)
    square[np.tril_indices(guard.n_features)] = packed
    return square


def _log_sum_exp(graph: _Graph, components: str, guard: Guard) -> str:
    """(N, M) -> (N, R) over each row's components, the maximum taken out first."""
    counts = np.diff(guard.offsets)
    if counts.max() == 1:
        return components
    n_rows, most = len(counts), int(counts.max())
    positions = np.zeros((n_rows, most), np.int64)
    absent = np.full((n_rows, most), -np.inf, np.float32)
    for row, (start, count) in enumerate(zip(guard.offsets, counts, strict=False)):
        positions[row, :count] = np.arange(start, start + count)
        absent[row, :count] = 0.0
    gathered = graph.op("Gather", components, graph.constant(positions.ravel()), axis=1)
    gathered = graph.op("Add", gathered, graph.constant(absent.ravel()))
    gathered = graph.op("Reshape", gathered, graph.constant(np.array([-1, n_rows, most])))
    # At least the lowest finite number: -inf minus -inf would be NaN.
    largest = graph.op("Max", graph.reduce("ReduceMax", gathered), graph.constant(np.finfo(np.float32).min))
    total = graph.reduce("ReduceSum", graph.op("Exp", graph.op("Sub", gathered, largest)))
    return graph.op("Squeeze", graph.op("Add", graph.op("Log", total), largest), graph.constant(np.array([2])))


def _margin(graph: _Graph, rows: str, guard: Guard) -> tuple[str, str]:
    """Margin (N, 1), NaN where a row is NaN, and best other class (N, 1) int64."""
    target = guard.target_row
    others = np.array([row for row in range(len(guard.classes)) if row != target])
    theirs = graph.op("Gather", rows, graph.constant(others), axis=1)
    own = graph.op("Gather", rows, graph.constant(np.array([target])), axis=1)
    margin = graph.op("Sub", graph.reduce("ReduceMax", theirs), own)
    best = graph.op("ArgMax", theirs, axis=1, keepdims=1)
    source = graph.op("Gather", graph.constant(guard.classes[others].astype(np.int64)), best, axis=0)
    return graph.op("Where", graph.any(graph.op("IsNaN", rows)), graph.constant(np.float32(np.nan)), margin), source


def _by_class(graph: _Graph, rows: str, guard: Guard, n_classes: int) -> str:
    """(N, R) -> (N, C), NaN for classes without a row."""
    positions = np.zeros(n_classes, np.int64)
    absent = np.full(n_classes, np.nan, np.float32)
    positions[guard.classes] = np.arange(len(guard.classes))
    absent[guard.classes] = 0.0
    gathered = graph.op("Gather", rows, graph.constant(positions), axis=1)
    return graph.op("Add", gathered, graph.constant(absent))
