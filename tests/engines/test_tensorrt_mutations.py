"""Mistakes planted in the TensorRT session, one at a time: the double must catch each of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from bundles import tiny_bundle
from driver_double import Driver
from tensorrt_double import TensorRt
from test_tensorrt import built

from inflight_edge import Detector
from inflight_edge.engines import _tensorrt_build, _tensorrt_session, tensorrt
from inflight_edge.engines.tensorrt import TensorRtEngine
from inflight_edge.scoring.device import Memory

Install = Callable[..., TensorRt]

# What is replaced, by what.
SESSION = {
    "input copied after the engine": (
        "            self._input.to_device()\n            if not self._context.execute_async_v3(self._device.stream):",
        "            ok = self._context.execute_async_v3(self._device.stream)\n            self._input.to_device()\n"
        "            if not ok:",
    ),
    "input never copied": ("            self._input.to_device()\n", ""),
    "results copied before the engine": (
        "            self._input.to_device()\n",
        "            self._input.to_device()\n            self._logits.to_host()\n",
    ),
    "features not copied back": ("            self._features.to_host()\n", ""),
    "scorer before the engine": (
        "            self._input.to_device()\n",
        "            self._input.to_device()\n            if self._scorer is not None:\n"
        "                self._scorer.enqueue(self._features.address, self._logits.address, self._input.host.shape[0])\n",
    ),
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
        "event.record(self._device.pycuda_stream)",
        "event.record(self._device.driver.Stream())",
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
        "            with self._device.current():\n                self._load(plan)",
        "            if True:\n                self._load(plan)",
    ),
    "memory stays after close": (
        "        finally:\n            self._device.close()\n",
        "        finally:\n            pass\n",
    ),
    "old answer is not forgotten": (
        "        self._logits.host[...] = np.nan\n        if self._scorer is not None:\n            self._scorer.forget()\n",
        "",
    ),
    "batch that runs as another size": ("self._input.host.shape[0])", "1)"),
}
BUILD = {
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


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """The module with one change."""
    path = Path(str(module.__file__))
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} of: {old}"
    made = ModuleType(module.__name__)
    exec(compile(text.replace(old, new), str(path), "exec"), made.__dict__)
    return made


def exercise(gpu: Install, memory: Memory, graph: bool) -> None:
    """Compile and run as in flight; fails when anything is not as it should be."""
    driver = Driver(capability=(11, 0))
    library = gpu(driver)
    bundle = tiny_bundle()
    plan = _tensorrt_build.__dict__["build_plan"] and built(bundle.model, 2)
    assert not any(config.flags for config in library.configs)
    frames = list(bundle.self_test.frames)
    with TensorRtEngine(plan, guards=bundle.guards, n_classes=4, memory=memory, graph=graph) as engine:
        detector = Detector(bundle, engine=engine)
        for order in (frames, frames[::-1], frames[1:4]):
            batch = np.stack([bundle.preprocess(frame) for frame in order])
            logits, features = engine.run(batch)
            np.testing.assert_array_equal(logits, batch.reshape(-1, 4))
            np.testing.assert_array_equal(features, batch.reshape(-1, 4))
            expected = Detector(bundle, scorer="reference").run(order)
            assert [v.decision for v in detector.run(order)] == [v.decision for v in expected]
        library.failing["run"] = True
        if not graph:
            assert not any(v.passes for v in detector.run(frames))
            library.failing["run"] = False
        else:  # a launch that does nothing gives no answer
            sys.modules["inflight_edge.scoring._cuda"].graph_launch = lambda graph, stream: 0  # type: ignore[attr-defined]
            assert not any(v.passes for v in detector.run(frames[1:4]))
    assert not driver.live or all(hasattr(memory, "mapped") for memory in driver.live.values())


def everything(gpu: Install) -> None:
    for memory, graph in (("copied", True), ("mapped", False)):
        exercise(gpu, memory, graph)  # type: ignore[arg-type]
    junk = gpu()
    junk.needed_workspace = 1 << 30
    with pytest.raises(tensorrt.EngineError, match="TensorRT cannot build it"):
        _build(b"", 1 << 20)
    with pytest.raises(tensorrt.EngineError, match="TensorRT cannot read it"):
        _build(b"junk", None)


def _build(model: bytes, workspace: int | None) -> None:
    from inflight_edge.scoring.device import Device

    options = _tensorrt_build.BuildOptions(workspace=workspace)
    device = Device()
    try:
        sys.modules["test_tensorrt"].build_plan(model or tiny_bundle().model, device, options, b"")  # type: ignore[attr-defined]
    finally:
        device.close()


def test_without_a_mistake_everything_passes(gpu: Install) -> None:
    everything(gpu)


@pytest.mark.parametrize("mistake", SESSION)
def test_mistake_in_the_session_is_caught(gpu: Install, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    monkeypatch.setattr(tensorrt, "Session", mutant(_tensorrt_session, *SESSION[mistake]).Session)
    with pytest.raises((AssertionError, Exception)):
        everything(gpu)


@pytest.mark.parametrize("mistake", BUILD)
def test_mistake_in_the_build_is_caught(gpu: Install, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    made = mutant(_tensorrt_build, *BUILD[mistake])
    monkeypatch.setattr("test_tensorrt.build_plan", made.build_plan)
    monkeypatch.setattr("test_tensorrt.BuildOptions", made.BuildOptions)
    with pytest.raises((AssertionError, Exception)):
        everything(gpu)
