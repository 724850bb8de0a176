"""Mistakes planted in the TensorRT session, one at a time: the double must catch each of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import tiny_bundle, tiny_model
from driver_double import Driver, Pinned
from tensorrt_double import TensorRt

from inflight_edge import Bundle, Detector
from inflight_edge.engines import _tensorrt_build, _tensorrt_session, tensorrt
from inflight_edge.engines._tensorrt_build import BuildOptions
from inflight_edge.engines.tensorrt import TensorRtEngine
from inflight_edge.errors import EngineError
from inflight_edge.scoring.device import Device, Memory

Install = Callable[..., TensorRt]

_SCORED = "self._features.address, self._logits.address, self._input.host.shape[0]"
# What is replaced, by what.
Change = tuple[str, str]
SESSION: dict[str, Change | list[Change]] = {
    "input copied after the engine": (
        "            self._input.to_device()\n            if not self._context.execute_async_v3(self._device.stream):",
        "            ok = self._context.execute_async_v3(self._device.stream)\n            self._input.to_device()\n"
        "            if not ok:",
    ),
    "input never copied": ("            self._input.to_device()\n", ""),
    "results copied before the engine": [
        ("            self._logits.to_host()\n", ""),
        (
            "            self._input.to_device()\n",
            "            self._input.to_device()\n            self._logits.to_host()\n",
        ),
    ],
    "features not copied back": ("            self._features.to_host()\n", ""),
    "scorer before the engine": [
        ("            if self._scorer is not None:\n                self._scorer.enqueue(" + _SCORED + ")\n", ""),
        (
            "            self._input.to_device()\n",
            "            self._input.to_device()\n            if self._scorer is not None:\n"
            "                self._scorer.enqueue(" + _SCORED + ")\n",
        ),
    ],
    "no wait for the answer": (
        "        self._launch()\n        self._wait()\n        scorer =",
        "        self._launch()\n        scorer =",
    ),
    "input written while the engine runs": (
        "        np.copyto(self._input.host, batch)\n        self._launch()\n",
        "        self._launch()\n        np.copyto(self._input.host, batch)\n",
    ),
    "default stream": ("execute_async_v3(self._device.stream)", "execute_async_v3(0)"),
    "stream of its own": (
        "execute_async_v3(self._device.stream)",
        "execute_async_v3(int(self._device.driver.Stream().handle))",
    ),
    "event on another stream": (
        "self._event.record(self._device.pycuda_stream)",
        "self._event.record(self._device.driver.Stream())",
    ),
    "capture before the first run": (
        "            self._enqueue()  # once before the capture: TensorRT allocates in its first run\n            self._wait()\n",
        "",
    ),
    "address of the host": (
        "set_tensor_address(name, buffer.address)",
        "set_tensor_address(name, buffer.host.ctypes.data)",
    ),
    "one output is not bound": (
        "for name, buffer in self._buffers.items():\n            expect(",
        "for name, buffer in list(self._buffers.items())[:2]:\n            expect(",
    ),
    "outputs exchanged": (
        "self._logits, self._features = (self._buffers[name] for name in OUTPUTS)",
        "self._features, self._logits = (self._buffers[name] for name in OUTPUTS)",
    ),
    "stale address: buffers made again after binding": (
        "                self._bind()\n",
        "                self._bind()\n                self._allocate(guards, n_classes)\n",
    ),
    "stale address: memory freed under the engine": (
        "                self._bind()\n",
        "                self._bind()\n                [a.free() for a in self._device._allocations]\n",
    ),
    "buffer too small": (
        "(self._batch, *map(int, filter(None, shape)))",
        "(max(1, self._batch - 1), *map(int, filter(None, shape)))",
    ),
    "shape not set": (
        'expect(self._context.set_input_shape(name, shape), f"shape {shape} of {name}", self._log)',
        "pass",
    ),
    "refused enqueue is taken for done": (
        "            if not self._context.execute_async_v3",
        "            if None is self._context.execute_async_v3",
    ),
    "engine freed while its graph lives": (
        "        self._launch()\n        self._wait()\n        scorer =",
        "        self._engine = None\n        self._launch()\n        self._wait()\n        scorer =",
    ),
    "runtime freed before the context is made": (
        "        self._context = self._engine.create_execution_context()\n",
        "        self._runtime = None\n        self._context = self._engine.create_execution_context()\n",
    ),
    "context not current": (
        "            with self._device.current():\n                self._event =",
        "            if True:\n                self._event =",
    ),
    "memory stays after close": (
        "        finally:\n            self._device.close()\n",
        "        finally:\n            pass\n",
    ),
    "old answer is not forgotten": (
        "        self._logits.host[...] = np.nan\n"
        "        self._features.host[...] = np.nan\n"
        "        if self._scorer is not None:\n"
        "            self._scorer.forget()\n",
        "",
    ),
    "batch that runs as another size": ("self._input.host.shape[0])", "1)"),
}
BUILD: dict[str, Change | list[Change]] = {
    "not strongly typed": ("1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)", "0"),
    "flag not shifted": (
        "1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)",
        "int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)",
    ),
    "TF32 left on": ("    config.clear_flag(trt.BuilderFlag.TF32)\n", ""),
    "no profile": ("    if shape[0] == -1:\n", "    if False:\n"),
    "parse errors not looked at": ("if not parser.parse(model):", "if parser.parse(b'junk') is None:"),
    "failed build not looked at": ("    if plan is None:\n", "    if False:\n"),
    "context not current": ("    with device.current():\n        return", "    if True:\n        return"),
}


def mutant(module: ModuleType, changes: Change | list[Change]) -> ModuleType:
    """The module with one mistake."""
    path = Path(str(module.__file__))
    text = path.read_text()
    for old, new in [changes] if isinstance(changes, tuple) else changes:
        assert text.count(old) == 1, f"{path.name} has {text.count(old)} of: {old}"
        text = text.replace(old, new)
    made = ModuleType(module.__name__)
    exec(compile(text, str(path), "exec"), made.__dict__)
    return made


def bundle_of_unlike_outputs() -> Bundle:
    """The tiny bundle with logits twice the features, so that one cannot pass for the other."""
    model = onnx.load_from_string(tiny_model())
    weights = 2 * onnx.numpy_helper.to_array(model.graph.initializer[1])
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(weights, "to_logits"))
    bundle = tiny_bundle()
    test = bundle.self_test
    doubled = replace(test, logits=2 * test.logits)
    return replace(bundle, model=bytes(model.SerializeToString()), self_test=doubled)


def build(model: bytes, **options: Any) -> bytes:
    device = Device()
    try:
        plan: bytes = _tensorrt_build.build_plan(model, device, BuildOptions(**options), b"")[0]
        return plan
    finally:
        device.close()


def exercise(gpu: Install, memory: Memory, graph: bool, eager: bool) -> None:
    """Build and run as in flight, on a GPU that is slow or quick; fails when anything is not as it should be."""
    driver = Driver(capability=(11, 0))
    driver.eager = eager
    library = gpu(driver)
    bundle = bundle_of_unlike_outputs()
    plan = build(bundle.model, batch=2)
    assert not any(config.flags for config in library.configs), "TF32"
    frames = list(bundle.self_test.frames)
    with TensorRtEngine(plan, guards=bundle.guards, n_classes=4, memory=memory, graph=graph) as engine:
        detector = Detector(bundle, engine=engine)
        for order in (frames, frames[::-1], frames[1:4]):
            batch = np.stack([bundle.preprocess(frame) for frame in order])
            logits, features = engine.run(batch)
            np.testing.assert_array_equal(logits, 2 * batch.reshape(-1, 4))
            np.testing.assert_array_equal(features, batch.reshape(-1, 4))
            expected = Detector(bundle, scorer="reference").run(order)
            assert [v.decision for v in detector.run(order)] == [v.decision for v in expected]
        if graph:  # a launch that does nothing gives no answer
            sys.modules["inflight_edge.scoring._cuda"].graph_launch = lambda graph, stream: 0  # type: ignore[attr-defined]
            if memory == "mapped":
                assert not any(v.passes for v in detector.run(frames[1:4]))
        else:
            library.failing["run"] = True
            assert not any(v.passes for v in detector.run(frames))
    assert all(isinstance(memory, Pinned) for memory in driver.live.values()), "memory stays"


def everything(gpu: Install) -> None:
    exercise(gpu, "copied", graph=True, eager=False)
    exercise(gpu, "copied", graph=False, eager=True)
    exercise(gpu, "mapped", graph=True, eager=False)
    gpu().needed_workspace = 1 << 30
    with pytest.raises(EngineError, match="TensorRT cannot build it"):
        build(tiny_model(), workspace=1 << 20)
    with pytest.raises(EngineError, match="TensorRT cannot read it"):
        build(b"junk")


def caught(gpu: Install) -> str:
    """How the mistake shows: an assertion of the double, a refusal, a wrong answer; "" when it does not."""
    try:
        everything(gpu)
    except Exception as error:  # noqa: BLE001  whatever it is, it is seen
        return type(error).__name__
    return ""


def test_without_a_mistake_everything_passes(gpu: Install) -> None:
    everything(gpu)


@pytest.mark.parametrize("mistake", SESSION)
def test_mistake_in_the_session_is_caught(gpu: Install, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    monkeypatch.setattr(tensorrt, "Session", mutant(_tensorrt_session, SESSION[mistake]).Session)
    assert caught(gpu)


@pytest.mark.parametrize("mistake", BUILD)
def test_mistake_in_the_build_is_caught(gpu: Install, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    monkeypatch.setattr(_tensorrt_build, "build_plan", mutant(_tensorrt_build, BUILD[mistake]).build_plan)
    assert caught(gpu)
