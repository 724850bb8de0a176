"""Engines on the CPU: what goes in must fit, what comes out is what the model says, whatever its batch size."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import tiny_bundle, tiny_model
from onnx import TensorProto

from inflight_edge import DependencyError, Detector, EngineError, OptionError
from inflight_edge.engines import EngineOptions, _wire
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.engines.openvino import OpenVinoEngine
from inflight_edge.runtime import make_engine

CpuEngine = type[OnnxRuntimeEngine] | type[OpenVinoEngine]


@pytest.fixture(params=["onnxruntime", "openvino"])
def engine_type(request: pytest.FixtureRequest) -> CpuEngine:
    """Every behaviour test runs on every engine of the CPU."""
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return {"onnxruntime": OnnxRuntimeEngine, "openvino": OpenVinoEngine}[request.param]


def images(n_frames: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.arange(n_frames * 4, dtype=np.float32).reshape(n_frames, 1, 2, 2)


@pytest.mark.parametrize("batch", ["N", 1, 3, 4])
@pytest.mark.parametrize("n_frames", [1, 3, 4, 5, 8])
def test_any_number_of_frames_runs_whatever_the_batch_size(
    engine_type: CpuEngine, batch: int | str, n_frames: int
) -> None:
    engine = engine_type(tiny_model(batch=batch, n_features=3), threads=1)
    logits, features = engine.run(images(n_frames))
    flat = images(n_frames).reshape(n_frames, 4)
    np.testing.assert_array_equal(features, flat[:, :3])
    np.testing.assert_array_equal(logits, np.pad(flat[:, :3], ((0, 0), (0, 1))))
    assert logits.dtype == features.dtype == np.float32


def test_what_the_model_declares_is_exposed(engine_type: CpuEngine) -> None:
    engine = engine_type(tiny_model(n_features=3))
    assert (engine.name, engine.input_shape, engine.n_classes, engine.n_features) == (engine_type.name, (1, 2, 2), 4, 3)


def test_openvino_takes_fixed_sizes_only() -> None:
    """It would answer an image whose size does not fit the weights."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    with pytest.raises(
        EngineError, match=r"expected fixed channels, height and width for openvino, got \(1, None, None\)"
    ):
        OpenVinoEngine(tiny_model(shape=(1, "H", "W")))


def test_free_sizes_take_what_the_weights_take() -> None:
    engine = OnnxRuntimeEngine(tiny_model(shape=(1, "H", "W")))
    assert engine.input_shape == (1, None, None)
    logits, _ = engine.run(np.ones((2, 1, 1, 4), np.float32))
    assert logits.shape == (2, 4)
    with pytest.raises(EngineError, match=r"onnxruntime failed on a batch \(2, 1, 3, 3\): .*MatMul"):
        engine.run(np.ones((2, 1, 3, 3), np.float32))


def test_frames_that_are_not_contiguous_run(engine_type: CpuEngine) -> None:
    engine = engine_type(tiny_model())
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
def test_batch_that_does_not_fit(engine_type: CpuEngine, batch: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine_type(tiny_model()).run(batch)


def second_input(model: onnx.ModelProto) -> None:
    mask = onnx.helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1])
    model.graph.input.append(mask)
    model.graph.node.append(onnx.helper.make_node("Identity", ["mask"], ["used"]))  # one without use may be dropped
    model.graph.output.append(onnx.helper.make_tensor_value_info("used", TensorProto.FLOAT, [1]))


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
        (edited(deep_features), r"output features: expected two axes \(N, width\), got \[.*, 4, 1\]; flatten it"),
    ],
)
def test_model_that_does_not_fit(engine_type: CpuEngine, model: bytes, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        engine_type(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "{}"])
def test_weights_outside_the_model_are_never_read(
    engine_type: CpuEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
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
        engine_type(edited(move_weights))


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_wrong_number_of_threads(engine_type: CpuEngine, threads: Any) -> None:
    with pytest.raises(OptionError, match="threads: expected an integer of at least 1 or None, got"):
        engine_type(tiny_model(), threads=threads)


def test_missing_library_is_named_with_its_remedy(engine_type: CpuEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, engine_type.name, None)
    with pytest.raises(DependencyError, match=rf"needed here .*; pip install 'inflight-edge\[{engine_type.name}\]'"):
        engine_type(tiny_model())


def test_nothing_is_printed(engine_type: CpuEngine, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError):
        engine_type(b"no protocol buffer")
    if engine_type is OnnxRuntimeEngine:
        with pytest.raises(EngineError):
            engine_type(tiny_model(shape=(1, "H", "W"))).run(np.ones((1, 1, 3, 3), np.float32))
    assert capfd.readouterr() == ("", "")


def test_threads_may_call_at_once(engine_type: CpuEngine) -> None:
    engine = engine_type(tiny_model(), threads=1)
    results: dict[int, np.ndarray[Any, Any]] = {}

    def work(i: int) -> None:
        for _ in range(50):
            results[i] = engine.run(images(i + 1) + np.float32(i))[1]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(6):
        np.testing.assert_array_equal(results[i], images(i + 1).reshape(i + 1, 4) + np.float32(i))


def test_an_answer_is_not_overwritten_by_the_next(engine_type: CpuEngine) -> None:
    engine = engine_type(tiny_model())
    first = engine.run(images(2))
    kept = [array.copy() for array in first]
    engine.run(images(2) * 7)
    for array, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_verdicts_are_those_of_the_self_test(engine_type: CpuEngine) -> None:
    bundle = tiny_bundle()
    verdicts = Detector(bundle, engine=engine_type.name).run(list(bundle.self_test.frames))
    assert [v.decision.value for v in verdicts] == list(bundle.self_test.decisions)


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("optimisation", ["all", "extended", "basic", "off"])
def test_options_of_onnxruntime_change_no_answer(arena: bool, optimisation: Any) -> None:
    bundle = tiny_bundle()
    options = EngineOptions(arena=arena, optimisation=optimisation)
    engine = make_engine(bundle, "onnxruntime", options=options)
    assert isinstance(engine, OnnxRuntimeEngine)
    chosen = engine._session._session.get_session_options()
    levels = {"all": "ENABLE_ALL", "extended": "ENABLE_EXTENDED", "basic": "ENABLE_BASIC", "off": "DISABLE_ALL"}
    assert (chosen.enable_cpu_mem_arena, chosen.graph_optimization_level.name) == (arena, f"ORT_{levels[optimisation]}")
    np.testing.assert_array_equal(engine.run(images(3))[0], images(3).reshape(3, 4))


def test_openvino_computes_in_float32(rng: np.random.Generator) -> None:
    """Told nothing, it takes bfloat16 or float16 where the processor has them: then 1 + 2**-12 is 1."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    engine = OpenVinoEngine(tiny_model())
    assert engine._held["compiled"].get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    batch = np.full((1, 1, 2, 2), 1 + 2**-12, np.float32)
    np.testing.assert_array_equal(engine.run(batch)[1], batch.reshape(1, 4))


def test_bytes_that_are_onnx_and_onnx_runtimes_own_format_are_read_as_onnx() -> None:
    """What the check for external data read is what the engine reads, though it prefers its own format elsewhere."""
    polyglot = b"\x0a\x06\0\0ORTM" + b"\x0a\x7f" + bytes(127)  # two fields of text
    with pytest.raises(EngineError, match=r"model: expected an ONNX file, got .*") as caught:
        OnnxRuntimeEngine(polyglot)
    assert "ORT model" not in str(caught.value)


@pytest.mark.parametrize("kind", [OnnxRuntimeEngine, OpenVinoEngine])
def test_bytes_that_are_a_message_and_openvinos_own_format_are_refused(kind: Any) -> None:
    """Its reader takes XML too, whatever white space and comments come before."""
    rest = b' --><net name="a" version="11"><layers/><edges/></net>'
    polyglot = b"\n <!--" + b"x" * 28 + b"\x0a" + bytes([len(rest)]) + rest
    list(_wire._fields(memoryview(polyglot)))  # a message of two fields
    with pytest.raises(EngineError, match="model: expected an ONNX file, got damaged or other data"):
        kind(polyglot)


def test_openvino_leaves_the_stack_for_signals_alone() -> None:
    """Its CPU plugin exchanges that of the thread and frees it: the next signal would end the process."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    code = """
import os, signal
from bundles import tiny_model
import numpy as np
from inflight_edge.engines.openvino import OpenVinoEngine
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
for _ in range(3):
    engine = OpenVinoEngine(tiny_model())
    engine.run(np.zeros((2, 1, 2, 2), np.float32))
    os.kill(os.getpid(), signal.SIGTERM)
    del engine
    os.kill(os.getpid(), signal.SIGTERM)
print(len(seen))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr
