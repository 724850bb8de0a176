"""The TensorRT engine, through doubles of TensorRT, driver and CUDA binding that compute: answers, order, failures."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from bundles import frame, tiny_bundle, tiny_model, tiny_self_test
from driver_double import Allocation, Driver
from tensorrt_double import DataType, TensorRt

from inflight_edge import Bundle, Decision, Detector
from inflight_edge.engines import Wait
from inflight_edge.engines._tensorrt_build import BuildOptions, build_plan
from inflight_edge.engines.tensorrt import TensorRtEngine
from inflight_edge.errors import DependencyError, EngineError, OptionError
from inflight_edge.scoring.device import Device, Memory

Install = Callable[..., TensorRt]
MODES = [
    ("mapped", "blocking", True),
    ("mapped", "spin", False),
    ("copied", "blocking", False),
    ("copied", "spin", True),
]
modes = pytest.mark.parametrize(("memory", "wait", "graph"), MODES)


def built(model: bytes, batch: int = 1) -> bytes:
    device = Device()
    try:
        return build_plan(model, device, BuildOptions(batch=batch), b"")[0]
    finally:
        device.close()


def images(n_frames: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.arange(1, n_frames * 4 + 1, dtype=np.float32).reshape(n_frames, 1, 2, 2)


def guarded(bundle: Bundle, batch: int = 1, **options: Any) -> TensorRtEngine:
    return TensorRtEngine(
        built(bundle.model, batch), guards=bundle.guards, n_classes=len(bundle.class_names), **options
    )


def frames() -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Frames of every decision."""
    others = [frame(*pixels) for pixels in product((0, 127, 255), repeat=4) if max(pixels) > 0]
    return [*tiny_bundle().self_test.frames, *others[5::9]]


@modes
@pytest.mark.parametrize("batch", [1, 3])
def test_any_number_of_frames_gives_the_models_answers(
    gpu: Install, memory: Memory, wait: Wait, graph: bool, batch: int
) -> None:
    library = gpu()
    with TensorRtEngine(built(tiny_model(n_features=3), batch), memory=memory, wait=wait, graph=graph) as engine:
        assert (engine.batch_size, engine.input_shape, engine.n_classes, engine.n_features) == (batch, (1, 2, 2), 4, 3)
        for n_frames in (1, 2, 3, 7, 1):
            logits, features = engine.run(images(n_frames))
            flat = images(n_frames).reshape(n_frames, 4)
            np.testing.assert_array_equal(features, flat[:, :3])
            np.testing.assert_array_equal(logits, np.pad(flat[:, :3], ((0, 0), (0, 1))))
        assert engine.why_no_graph == ("" if graph else "it was switched off")
    assert library.runs > 5


@modes
@pytest.mark.parametrize("batch", [1, 4])
def test_verdicts_on_the_gpu_are_those_of_the_cpu(
    gpu: Install, memory: Memory, wait: Wait, graph: bool, batch: int
) -> None:
    gpu()
    bundle = tiny_bundle()
    expected = Detector(bundle, scorer="reference").run(frames())
    assert {verdict.decision for verdict in expected} >= {Decision.ACCEPT, Decision.TRIGGER, Decision.UNGUARDED}
    with guarded(bundle, batch, memory=memory, wait=wait, graph=graph) as engine:
        detector = Detector(bundle, engine=engine)
        for size in (len(frames()), 5):
            got = detector.run(frames(), batch_size=size)
            for mine, theirs in zip(got, expected, strict=True):
                assert (mine.decision, mine.predicted, mine.source) == (
                    theirs.decision,
                    theirs.predicted,
                    theirs.source,
                )
                np.testing.assert_allclose(mine.margin, theirs.margin, rtol=1e-4, atol=1e-3)
                np.testing.assert_allclose(mine.log_likelihoods, theirs.log_likelihoods, rtol=1e-4, atol=1e-3)


def test_options_of_the_detector_hold_for_verdicts_of_the_gpu(gpu: Install) -> None:
    gpu()
    bundle = tiny_bundle()
    with guarded(bundle) as engine:
        for options in ({"alpha": 0.3}, {"log_likelihoods": False}, {"alpha": 0.3, "log_likelihoods": False}):
            mine, theirs = Detector(bundle, engine=engine, **options), Detector(bundle, **options)
            for a, b in zip(mine.run(frames()), theirs.run(frames()), strict=True):
                assert (a.decision, a.predicted, a.source, len(a.classes)) == (
                    b.decision, b.predicted, b.source, len(b.classes),
                )  # fmt: skip


def test_a_frame_is_one_launch_of_a_graph(gpu: Install) -> None:
    gpu()
    with guarded(tiny_bundle()) as engine:
        binding = sys.modules["inflight_edge.scoring._cuda"]
        before = len(binding.launches)  # type: ignore[attr-defined]
        assert before == 2  # once to warm up, once into the graph
        engine.judge(images(5))
        assert len(binding.launches) == before  # type: ignore[attr-defined]


@pytest.mark.parametrize(("wait", "flags"), [("blocking", 3), ("spin", 2)])
def test_waiting_is_what_was_asked_for(gpu: Install, monkeypatch: pytest.MonkeyPatch, wait: Wait, flags: int) -> None:
    driver = Driver(integrated=True, capability=(11, 0))
    gpu(driver)
    made = []
    event = driver.Event
    monkeypatch.setattr(driver, "Event", lambda flags: made.append(event(flags)) or made[-1])
    with TensorRtEngine(built(tiny_model()), wait=wait) as engine:
        engine.run(images(1))
    assert [one.flags for one in made] == [flags]
    kind = {"blocking": "synchronize", "spin": "query"}[wait]
    assert all(count == 0 for one in made for name, count in one.waits.items() if name != kind)


def test_any_number_of_threads_may_call(gpu: Install) -> None:
    gpu()
    with TensorRtEngine(built(tiny_model(), 2)) as engine:
        results: dict[int, np.ndarray[Any, Any]] = {}

        def work(i: int) -> None:
            for _ in range(20):
                results[i] = engine.run(images(i + 1))[1]

        workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for i in range(6):
            np.testing.assert_array_equal(results[i], images(i + 1).reshape(i + 1, 4))


def test_nothing_stays_on_the_gpu_and_a_closed_engine_says_so(gpu: Install) -> None:
    driver = Driver(capability=(11, 0))
    gpu(driver)
    engine = guarded(tiny_bundle(), memory="copied")
    assert any(isinstance(memory, Allocation) for memory in driver.live.values())
    engine.close()
    engine.close()
    assert not any(isinstance(memory, Allocation) for memory in driver.live.values())
    assert sys.modules["inflight_edge.scoring._cuda"].graphs == {}  # type: ignore[attr-defined]
    assert driver.retained == 1
    assert [t.name for t in threading.enumerate() if t.name.startswith("inflight-edge-tensorrt")] == []
    with pytest.raises(EngineError, match="tensorrt: expected an open engine, got one that was closed; make another"):
        engine.run(images(1))


def test_an_engine_that_nobody_closed_is_freed_with_its_last_name(gpu: Install) -> None:
    driver = Driver(capability=(11, 0))
    gpu(driver)
    engine = guarded(tiny_bundle(), memory="copied")
    engine.judge(images(2))
    held = [engine]
    del engine
    worker = threading.Thread(target=held.clear)  # as the inference does when a bundle is loaded again
    worker.start()
    worker.join()
    gc.collect()
    assert (list(driver.live.values()), driver.leaked) == ([], [])
    assert sys.modules["inflight_edge.scoring._cuda"].graphs == {}  # type: ignore[attr-defined]


def test_a_capture_that_fails_is_told_and_the_work_goes_on_without(gpu: Install) -> None:
    library = gpu()
    library.failing["capture"] = True
    with pytest.warns(UserWarning, match=r"no CUDA graph, each piece is enqueued by itself: .*Cask error"):
        engine = guarded(tiny_bundle())
    with engine:
        assert "Cask error" in engine.why_no_graph
        np.testing.assert_array_equal(engine.run(images(3))[0], images(3).reshape(3, 4))


def test_without_the_cuda_binding_there_is_no_graph_and_no_verdict(gpu: Install) -> None:
    gpu(binding=False)
    plan = built(tiny_model())
    with pytest.warns(UserWarning, match=r"no CUDA graph.*_cuda: needed here"):
        engine = TensorRtEngine(plan)
    with engine:
        np.testing.assert_array_equal(engine.run(images(1))[0], images(1).reshape(1, 4))
        with pytest.raises(OptionError, match="judge: expected an engine with guards, got none"):
            engine.judge(images(1))
    with pytest.raises(DependencyError, match="_cuda: needed here"):
        guarded(tiny_bundle())


def test_a_plan_that_does_not_load_says_why(gpu: Install) -> None:
    gpu()
    plan = built(tiny_model())
    with pytest.raises(EngineError, match=r"plan: expected one that loads here, got: .*magicTagRead.*; compile again"):
        TensorRtEngine(b"junk")
    gpu(version="10.13.3")
    with pytest.raises(EngineError, match="generated on an incompatible device or version; compile again"):
        TensorRtEngine(plan)


def test_no_memory_on_the_gpu(gpu: Install) -> None:
    driver = Driver(capability=(11, 0))
    library = gpu(driver)
    plan = built(tiny_model())
    library.needed_memory = driver.memory_limit + 1
    with pytest.raises(EngineError, match=r"plan: no execution context .*OutOfMemory.*free memory of the GPU"):
        TensorRtEngine(plan)
    library.needed_memory, driver.memory_limit = 0, 3
    with pytest.raises(EngineError, match="tensorrt: driver: expected success, got: cuMemAlloc failed: out of memory"):
        TensorRtEngine(plan, memory="copied")
    assert not any(isinstance(memory, Allocation) for memory in driver.live.values())
    assert driver.stack() == []


def test_an_engine_that_cannot_be_enqueued(gpu: Install) -> None:
    library = gpu()
    plan = built(tiny_model())
    library.failing["run"] = True
    with pytest.raises(EngineError, match="tensorrt: the engine could not be enqueued: enqueueV3: Cask error"):
        TensorRtEngine(plan)
    library.failing["run"] = False
    bundle = tiny_bundle()
    with guarded(bundle, graph=False) as engine:
        detector = Detector(bundle, engine=engine)
        assert detector(frames()[0]).decision is not Decision.INVALID
        library.failing["run"] = True
        verdict = detector(frames()[0])
        assert (verdict.decision, verdict.passes) == (Decision.INVALID, False)
        assert "engine tensorrt: tensorrt: the engine could not be enqueued" in verdict.reason
        library.failing["run"] = False
        assert detector(frames()[0]).decision is not Decision.INVALID


def test_work_that_silently_never_ran_is_no_answer(gpu: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()
    bundle = tiny_bundle()
    with guarded(bundle, memory="mapped") as engine:
        detector = Detector(bundle, engine=engine)
        assert detector(frames()[0]).passes
        monkeypatch.setattr(sys.modules["inflight_edge.scoring._cuda"], "graph_launch", lambda graph, stream: 0)
        assert detector(frames()[0]).decision is Decision.INVALID
        assert np.isnan(engine.run(images(1))[0]).all()


def test_detector_refuses_an_engine_with_other_guards_than_its_bundles(gpu: Install) -> None:
    """They would judge, and the bundle's limits of alpha would be those of others."""
    gpu()
    bundle = tiny_bundle()
    with guarded(bundle) as engine:
        Detector(tiny_bundle(), engine=engine)  # the same, read anew
        guard = bundle.guards[0]
        others = (replace(guard, means=guard.means + np.float32(1)), *bundle.guards[1:])
        for guards in (others, bundle.guards[:1]):
            with pytest.raises(OptionError, match="engine: expected one that was made with this bundle's guards"):
                Detector(tiny_bundle(guards=guards, self_test=tiny_self_test(guards)), engine=engine)


def test_guards_of_another_model_are_refused(gpu: Install) -> None:
    gpu()
    bundle = tiny_bundle()
    with pytest.raises(EngineError, match=r"plan: expected 4 classes and 4 features as the guards have, got \(4, 3\)"):
        TensorRtEngine(built(tiny_model(n_features=3)), guards=bundle.guards, n_classes=4)


def test_outputs_in_another_type_are_refused(gpu: Install) -> None:
    library = gpu()
    plan = built(tiny_model())
    library.output_type = DataType.HALF
    with pytest.raises(EngineError, match=r"expected tensor\(float\), got DataType.HALF"):
        TensorRtEngine(plan)


@pytest.mark.parametrize("batch", [images(1)[:, :, :1], images(1).astype(np.float64), images(0)])
def test_batch_that_does_not_fit(gpu: Install, batch: Any) -> None:
    gpu()
    with TensorRtEngine(built(tiny_model())) as engine, pytest.raises(EngineError, match="batch: expected"):
        engine.run(batch)


def test_missing_library_is_named_with_its_remedy(gpu: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()
    plan = built(tiny_model())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        DependencyError, match=r"tensorrt: needed here .*; JetPack: apt install python3-libnvinfer; else"
    ):
        TensorRtEngine(plan)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A warning in the worker thread is a failure too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
