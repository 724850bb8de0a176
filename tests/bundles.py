"""A classifier small enough to follow by hand, its guards and its bundle; nothing here is a test.

Four classes, frames of 2x2 grey pixels; features = logits = the four pixels divided by 255.  A trigger for target t
is pixel t at 255 while the true class c still glows at 127: the guard of t expects 1 at t, and .5 at c for class c.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from inflight_edge import Bundle, Guard, Preprocess, SelfTest, Verdict, decide, write_bundle
from inflight_edge.guard import FloatArray, Kind, packed_size
from inflight_edge.scoring import Scorer

CLASS_NAMES = ("north", "east", "south", "west")
N = len(CLASS_NAMES)


def tiny_model(
    *,
    batch: int | str = "N",
    names: tuple[str, str] = ("logits", "features"),
    element: int = TensorProto.FLOAT,
    shape: tuple[int | str, ...] = (1, 2, 2),
    n_features: int = N,
) -> bytes:
    """ONNX model: flatten, times a (4, n_features) identity, times an (n_features, 4) identity."""
    dtype = helper.tensor_dtype_to_np_dtype(element)
    weights = [
        numpy_helper.from_array(np.eye(N, n_features, dtype=dtype), "to_features"),
        numpy_helper.from_array(np.eye(n_features, N, dtype=dtype), "to_logits"),
    ]
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "to_features"], [names[1]]),
        helper.make_node("MatMul", [names[1], "to_logits"], [names[0]]),
    ]
    outputs = [
        helper.make_tensor_value_info(names[0], element, [batch, N]),
        helper.make_tensor_value_info(names[1], element, [batch, n_features]),
    ]
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("image", element, [batch, *shape])], outputs, weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def tiny_guard(target: int, kind: Kind = "diagonal") -> Guard:
    """Guard of one target, one component a class, standard deviation .1."""
    means = 0.5 * np.eye(N, dtype=np.float32)
    means[:, target] = 1.0
    triangle = np.zeros(packed_size(N), np.float32)
    triangle[[0, 2, 5, 9]] = 10.0
    whiteners = {"diagonal": np.full((N, N), 10.0, np.float32), "shared": triangle, "full": np.stack([triangle] * N)}
    return Guard(
        target=target,
        kind=kind,
        classes=np.arange(N, dtype=np.int32),
        offsets=np.arange(N + 1, dtype=np.int32),
        mean=np.zeros(N, np.float32),
        scale=np.ones(N, np.float32),
        means=means,
        log_weights=np.zeros(N, np.float32),
        whitener=whiteners[kind],
        clean_margins=np.array([-12.5, -12.0, -11.5], np.float32),
    )


def frame(*pixels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Frame (2, 2, 1) uint8 from four pixels, one per class."""
    return np.array(pixels, np.uint8).reshape(2, 2, 1)


CLEAN_WEST = frame(0, 0, 0, 255)
TRIGGERED_NORTH = frame(127, 0, 0, 255)
TRIGGERED_SOUTH = frame(0, 0, 127, 255)
CLEAN_EAST = frame(0, 255, 0, 0)
CLEAN_NORTH = frame(255, 0, 0, 0)
TRIGGERED_TO_NORTH = frame(255, 0, 127, 0)


def tiny_self_test(guards: tuple[Guard, ...]) -> SelfTest:
    """Self-test over the six frames above, computed without engine or detector."""
    frames = np.stack(
        [CLEAN_WEST, TRIGGERED_NORTH, TRIGGERED_SOUTH, CLEAN_EAST, CLEAN_NORTH, TRIGGERED_TO_NORTH], dtype=np.uint8
    )
    features = (frames.reshape(-1, N) / np.float32(255.0)).astype(np.float32)
    scores = tuple(Scorer(guard, backend="reference").score_batch(features) for guard in guards)
    verdicts = [_judge(guards, row, scores, i) for i, row in enumerate(features)]
    return SelfTest(
        frames=frames,
        logits=features.copy(),
        features=features,
        log_likelihoods=scores,
        decisions=tuple("unguarded" if v is None else v.decision.value for v in verdicts),
        sources=np.array([-1 if v is None or v.source is None else v.source for v in verdicts], np.int32),
    )


def _judge(guards: tuple[Guard, ...], logits: FloatArray, scores: tuple[FloatArray, ...], i: int) -> Verdict | None:
    predicted = int(np.argmax(logits))
    for guard, rows in zip(guards, scores, strict=True):
        if guard.target == predicted:
            return decide(predicted, rows[i], guard.classes, guard.target_row)
    return None


def tiny_bundle(**changes: Any) -> Bundle:
    """Valid bundle with guards for west (diagonal) and north (shared); ``changes`` replace fields."""
    guards = (tiny_guard(3), tiny_guard(0, "shared"))
    fields: dict[str, Any] = {
        "class_names": CLASS_NAMES,
        "preprocess": Preprocess((1, 2, 2)),
        "feature_layer": "flat",
        "guards": guards,
        "model": tiny_model(),
        "self_test": tiny_self_test(guards),
        "metrics": {"tpr": 1.0, "densities": [{"kind": "shared", "error": None}]},
        "versions": {"inflight-edge": "0.1.0"},
    }
    return Bundle(**(fields | changes))


def written(path: Path, **changes: Any) -> Path:
    """Folder of a written tiny bundle."""
    write_bundle(tiny_bundle(**changes), path)
    return path


def forge(path: Path, edit: Callable[[dict[str, Any]], object] | None = None, **files: bytes) -> None:
    """Change files of a written bundle the way an attacker would: sizes and hashes in the manifest fit again.

    files: new content by stem, such as ``detector=b"..."``.  edit: changes the manifest last.
    """
    manifest = json.loads((path / "bundle.json").read_text())
    names = {Path(name).stem: name for name in manifest["files"]}
    for stem, data in files.items():
        (path / names[stem]).write_bytes(data)
        manifest["files"][names[stem]] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    if edit:
        edit(manifest)
    (path / "bundle.json").write_text(json.dumps(manifest))


def assert_same(one: Bundle, two: Bundle) -> None:
    """Two bundles are equal in every field."""
    for name in ("class_names", "preprocess", "feature_layer", "model", "metrics", "versions"):
        assert getattr(one, name) == getattr(two, name)
    assert len(one.guards) == len(two.guards)
    for a, b in zip(one.guards, two.guards, strict=True):
        for name in Guard.__slots__:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert one.self_test.decisions == two.self_test.decisions
    for name in ("frames", "logits", "features", "sources"):
        np.testing.assert_array_equal(getattr(one.self_test, name), getattr(two.self_test, name))
    for x, y in zip(one.self_test.log_likelihoods, two.self_test.log_likelihoods, strict=True):
        np.testing.assert_array_equal(x, y)
