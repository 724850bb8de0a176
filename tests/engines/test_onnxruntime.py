"""ONNX Runtime: what goes in must fit, what comes out is what the model says, whatever its batch size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import tiny_model
from onnx import TensorProto

from inflight_edge import DependencyError, EngineError, OptionError
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine


def images(n_frames: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.arange(n_frames * 4, dtype=np.float32).reshape(n_frames, 1, 2, 2)


@pytest.mark.parametrize("batch", ["N", 1, 3, 4])
@pytest.mark.parametrize("n_frames", [1, 3, 4, 5, 8])
def test_any_number_of_frames_runs_whatever_the_batch_size(batch: int | str, n_frames: int) -> None:
    engine = OnnxRuntimeEngine(tiny_model(batch=batch, n_features=3), threads=1)
    logits, features = engine.run(images(n_frames))
    flat = images(n_frames).reshape(n_frames, 4)
    np.testing.assert_array_equal(features, flat[:, :3])
    np.testing.assert_array_equal(logits, np.pad(flat[:, :3], ((0, 0), (0, 1))))
    assert logits.dtype == features.dtype == np.float32


def test_what_the_model_declares_is_exposed() -> None:
    engine = OnnxRuntimeEngine(tiny_model(n_features=3))
    assert (engine.name, engine.input_shape, engine.n_classes, engine.n_features) == ("onnxruntime", (1, 2, 2), 4, 3)
    assert OnnxRuntimeEngine(tiny_model(shape=(1, "H", "W"))).input_shape == (1, None, None)


def test_free_sizes_take_what_the_weights_take() -> None:
    engine = OnnxRuntimeEngine(tiny_model(shape=(1, "H", "W")))
    logits, _ = engine.run(np.ones((2, 1, 1, 4), np.float32))
    assert logits.shape == (2, 4)
    with pytest.raises(EngineError, match=r"onnxruntime failed on a batch \(2, 1, 3, 3\): .*MatMul"):
        engine.run(np.ones((2, 1, 3, 3), np.float32))


def test_frames_that_are_not_contiguous_run() -> None:
    engine = OnnxRuntimeEngine(tiny_model())
    batch = images(4).transpose(0, 1, 3, 2)
    assert not batch.flags.c_contiguous
    np.testing.assert_array_equal(engine.run(batch)[0], batch.reshape(4, 4))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            images(1).astype(np.float64),
            r"batch: expected a float32 array \('N', 1, 2, 2\), got float64; use",
        ),
        ([[1.0]], "batch: expected a float32 array .*, got list"),
        (images(1)[0], r"batch: expected shape \('N', 1, 2, 2\) with N >= 1, got \(1, 2, 2\)"),
        (images(0), r"batch: expected shape .* with N >= 1, got \(0, 1, 2, 2\)"),
        (np.zeros((1, 3, 2, 2), np.float32), r"batch: expected shape .*, got \(1, 3, 2, 2\)"),
    ],
)
def test_batch_that_does_not_fit(batch: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        OnnxRuntimeEngine(tiny_model()).run(batch)


def second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))


def lost_input(model: onnx.ModelProto) -> None:
    del model.graph.input[0].type.tensor_type.shape.dim[0]


def deep_features(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Unsqueeze", ["features", "axis"], ["deep"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "axis"))
    deep = onnx.helper.make_tensor_value_info("deep", TensorProto.FLOAT, ["N", 4, 1])
    model.graph.output[1].CopyFrom(deep)
    for node in model.graph.node:
        node.output[:] = [{"deep": "features", "features": "flat_features"}.get(name, name) for name in node.output]
        node.input[:] = ["flat_features" if name == "features" else name for name in node.input]
    model.graph.output[1].name = "features"


def edited(edit: Any) -> bytes:
    model = onnx.load_from_string(tiny_model())
    edit(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"", "model: expected an ONNX file, got .*; export it again"),
        (b"no protocol buffer", "model: expected an ONNX file, got .*"),
        (tiny_model()[:-30], "model: expected an ONNX file, got .*"),
        (tiny_model(names=("logits", "hidden")), "expected the outputs logits and features, got logits, hidden"),
        (tiny_model(names=("scores", "features")), "expected the outputs logits and features, got scores, features"),
        (tiny_model(element=TensorProto.DOUBLE), r"input image: expected tensor\(float\), got tensor\(double\)"),
        (edited(second_input), r"model: expected one input, got 2 \(image, mask\)"),
        (edited(lost_input), r"input image: expected \(N, channels, height, width\), got \[1, 2, 2\]"),
        (edited(deep_features), r"output features: expected two axes \(N, width\), got \['N', 4, 1\]; flatten it"),
    ],
)
def test_model_that_does_not_fit(model: bytes, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        OnnxRuntimeEngine(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "{}"])
def test_weights_outside_the_model_are_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    """They would not be covered by the hash of the model."""
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for folder in (inner, tmp_path):
        (folder / "weights.bin").write_bytes(np.eye(4, dtype=np.float32).tobytes())

    def move_weights(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location.format(inner / "weights.bin"))

    with pytest.raises(EngineError, match=r"model: expected an ONNX file with its weights inside, got external data"):
        OnnxRuntimeEngine(edited(move_weights))


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_wrong_number_of_threads(threads: Any) -> None:
    with pytest.raises(OptionError, match="threads: expected an integer of at least 1 or None, got"):
        OnnxRuntimeEngine(tiny_model(), threads=threads)


def test_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"needed here .*; pip install 'inflight-edge\[onnxruntime\]'"):
        OnnxRuntimeEngine(tiny_model())


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    engine = OnnxRuntimeEngine(tiny_model(shape=(1, "H", "W")))
    with pytest.raises(EngineError):
        engine.run(np.ones((1, 1, 3, 3), np.float32))
    with pytest.raises(EngineError):
        OnnxRuntimeEngine(b"no protocol buffer")
    assert capfd.readouterr() == ("", "")


def test_bytes_that_are_onnx_and_onnx_runtimes_own_format_are_read_as_onnx() -> None:
    """What the check for external data read is what the engine reads, though it prefers its own format elsewhere."""
    polyglot = b"\x0a\x06\0\0ORTM" + b"\x0a\x7f" + bytes(127)  # two fields of text
    with pytest.raises(EngineError, match=r"model: expected an ONNX file, got .*") as caught:
        OnnxRuntimeEngine(polyglot)
    assert "ORT model" not in str(caught.value)
