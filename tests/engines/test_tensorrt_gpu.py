"""TensorRT on a GPU: compile, parity of every mode, verdicts.  It has not been run on a device yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import poisoned
import pytest

from inflight_edge import Detector, write_bundle
from inflight_edge.compile import compile_bundle
from inflight_edge.engines import EngineOptions
from inflight_edge.engines._tensorrt_library import load_tensorrt
from inflight_edge.engines.tensorrt import TensorRtEngine
from inflight_edge.errors import DependencyError
from inflight_edge.scoring.device import capability

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips with the reason where TensorRT, pycuda or the GPU is missing; plans lie in a folder of the test."""
    try:
        load_tensorrt()
        capability()
    except DependencyError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("INFLIGHT_EDGE_PLANS", str(tmp_path_factory.mktemp("plans")))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_plan_passes_the_self_test_and_gives_the_cpus_verdicts(tmp_path: Path, precision: str) -> None:
    write_bundle(poisoned.bundle_of_precisions(), tmp_path / "bundle")
    compiled = compile_bundle(tmp_path / "bundle", precision=precision)
    print(f"{precision}: {compiled.report}, {compiled.seconds:.1f} s")
    frames = [
        *np.asarray(poisoned.poisoned().test.images)[:200],
        *np.asarray(poisoned.poisoned().triggered.images)[:200],
    ]
    expected = Detector(poisoned.bundle_of_precisions().at(precision)).run(frames)
    for scorer in ("cpu", "cuda"):
        got = Detector.load(tmp_path / "bundle", engine="tensorrt", precision=precision, scorer=scorer).run(frames)
        same = np.mean([a.decision is b.decision for a, b in zip(got, expected, strict=True)])
        assert same >= {"fp32": 1.0, "fp16": 0.995, "int8": 0.98}[precision]


@pytest.mark.parametrize("memory", ["mapped", "copied"])
@pytest.mark.parametrize("wait", ["blocking", "spin"])
@pytest.mark.parametrize("graph", [True, False])
def test_every_mode_gives_the_same_answers(tmp_path: Path, memory: Any, wait: Any, graph: bool) -> None:
    write_bundle(poisoned.bundle_of_precisions(), tmp_path / "bundle")
    compile_bundle(tmp_path / "bundle")
    options = EngineOptions(memory=memory, wait=wait, graph=graph)
    detector = Detector.load(tmp_path / "bundle", engine="tensorrt", options=options)
    assert isinstance(detector.engine, TensorRtEngine)
    assert detector.engine.why_no_graph == ("" if graph else "it was switched off")
    test = detector.bundle.self_test
    for _ in range(20):
        for frame, features in zip(test.frames, test.features, strict=True):
            got = detector.engine.run(detector.bundle.preprocess(frame)[None])[1][0]
            np.testing.assert_allclose(got, features, rtol=1e-3, atol=1e-3)
    detector.engine.close()
