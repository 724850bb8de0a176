"""Verify: every part that differs from the workstation is named with numbers, and the others are still checked."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import tiny_bundle, tiny_guard, tiny_model, tiny_self_test, written

from inflight_edge import SelfTest, write_bundle
from inflight_edge.bundle import Variant
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.verify import Check, verify

ENGINES_HERE = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]
GUARDS = (tiny_guard(3), tiny_guard(0, "shared"))


def self_test(**changes: Any) -> SelfTest:
    test = tiny_self_test(GUARDS)
    return SelfTest(**({name: getattr(test, name) for name in SelfTest.__slots__} | changes))


def failed(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.passed}


def test_good_bundle_passes_on_every_engine_and_scorer(tmp_path: Path) -> None:
    checks = verify(written(tmp_path / "bundle"))
    assert failed(checks) == {}
    assert [check.name for check in checks] == [
        "bundle",
        "scorer cpu: log-likelihoods, target 3",
        "scorer cpu: log-likelihoods, target 0",
        "scorer cpu: verdicts",
        "scorer reference: log-likelihoods, target 3",
        "scorer reference: log-likelihoods, target 0",
        "scorer reference: verdicts",
    ] + [
        name.format(engine)
        for engine in ENGINES_HERE
        for name in (
            "engine {}: logits",
            "engine {}: features",
            "frames to verdicts: {}, cpu",
            "frames to verdicts: {}, reference",
        )
    ]
    assert checks[0].detail == (
        "hashes and invariants hold; no key given: signature not checked; guards 2, self-test frames 6"
    )
    assert checks[3].detail == "all 6 equal"
    assert "largest relative difference" in checks[1].detail


def test_unreadable_bundle_ends_the_list(tmp_path: Path) -> None:
    path = written(tmp_path / "bundle")
    (path / "model.onnx").write_bytes(b"other")
    (check,) = verify(path)
    assert (check.name, check.passed) == ("bundle", False)
    assert "model.onnx: expected" in check.detail
    assert "none: expected a bundle folder" in verify(tmp_path / "none")[0].detail


def test_differing_features_fail_alone(tmp_path: Path) -> None:
    features = self_test().features.copy()
    features[1, 2] += np.float32(0.01)
    path = written(tmp_path / "bundle", self_test=self_test(features=features))
    found = failed(verify(path))
    assert found["engine onnxruntime: features"].startswith(
        "largest relative difference 0.0099, allowed 0.001; at (1, 2) expected 0.01, got 0"
    )
    assert "engine onnxruntime: logits" not in found
    # The expected log-likelihoods belong to the true features.
    assert "scorer cpu: log-likelihoods, target 3" in found


def test_difference_within_the_tolerance_passes(tmp_path: Path) -> None:
    logits = self_test().logits + np.float32(9e-4)
    assert failed(verify(written(tmp_path / "bundle", self_test=self_test(logits=logits)))) == {}


def test_differing_log_likelihoods_fail_alone(tmp_path: Path) -> None:
    rows = self_test().log_likelihoods
    wrong = rows[1].copy()
    wrong[5, 0] *= np.float32(1.01)
    path = written(tmp_path / "bundle", self_test=self_test(log_likelihoods=(rows[0], wrong)))
    found = failed(verify(path))
    assert sorted(found) == ["scorer cpu: log-likelihoods, target 0", "scorer reference: log-likelihoods, target 0"]
    assert "allowed 0.0001; at (5, 0) expected" in found["scorer cpu: log-likelihoods, target 0"]


def test_expected_minus_infinity_equals_only_itself(tmp_path: Path) -> None:
    rows = self_test().log_likelihoods
    wrong = rows[0].copy()
    wrong[0, 0] = -np.inf
    found = failed(verify(written(tmp_path / "bundle", self_test=self_test(log_likelihoods=(wrong, rows[1])))))
    assert "largest relative difference inf" in found["scorer cpu: log-likelihoods, target 3"]


def test_differing_verdicts_are_described_by_class_name(tmp_path: Path) -> None:
    test = self_test()
    path = written(
        tmp_path / "bundle",
        self_test=self_test(
            decisions=("trigger", *test.decisions[1:]), sources=np.array([2, 1, 2, -1, -1, 2], np.int32)
        ),
    )
    found = failed(verify(path))
    detail = "2 of 6 differ; frame 0: expected trigger from south, got accept"
    assert found == dict.fromkeys(
        (
            "scorer cpu: verdicts",
            "scorer reference: verdicts",
            *(f"frames to verdicts: {name}, {scorer}" for name in ENGINES_HERE for scorer in ("cpu", "reference")),
        ),
        detail,
    )


def test_model_that_does_not_load_is_reported_and_scorers_are_still_checked(tmp_path: Path) -> None:
    checks = verify(written(tmp_path / "bundle", model=b"junk"))
    assert list(failed(checks)) == [f"engine {name}" for name in ENGINES_HERE]
    assert failed(checks)["engine onnxruntime"].startswith("model: expected an ONNX file, got")
    assert sum(check.name.startswith("scorer") for check in checks) == 6


def test_model_that_computes_something_else_fails(tmp_path: Path) -> None:
    model = tiny_model().replace(np.float32(1.0).tobytes(), np.float32(0.5).tobytes())
    found = failed(verify(written(tmp_path / "bundle", model=model)))
    assert {"engine onnxruntime: logits", "engine onnxruntime: features"} <= set(found)
    assert any(name.startswith("frames to verdicts") for name in found)


def test_features_whose_number_differs_from_frame_to_frame_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, widths = OnnxRuntimeEngine.run, cycle((1, 2))

    def run(self: OnnxRuntimeEngine, batch: Any) -> Any:
        logits, features = real(self, batch)
        return logits, features[:, : next(widths)]

    monkeypatch.setattr(OnnxRuntimeEngine, "run", run)
    found = failed(verify(written(tmp_path / "bundle")))
    assert "array dimensions" in found["engine onnxruntime"]


def test_frames_that_do_not_fit_the_model_are_reported(tmp_path: Path) -> None:
    frames = np.zeros((6, 2, 2, 2), np.uint8)
    found = failed(verify(written(tmp_path / "bundle", self_test=self_test(frames=frames))))
    assert "frame: expected 1 channels, got shape (2, 2, 2)" in found["engine onnxruntime"]
    assert "got invalid (frame: expected 1 channels" in found["frames to verdicts: onnxruntime, cpu"]


def test_without_any_engine_it_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENGINES_HERE:
        monkeypatch.setitem(sys.modules, name, None)
    checks = verify(written(tmp_path / "bundle"))
    assert failed(checks) == {
        "engine": "expected an engine (onnxruntime, openvino, tensorrt), got none here; pip install 'inflight-edge[onnxruntime]'"
    }


def test_every_precision_is_checked(tmp_path: Path) -> None:
    half = self_test(logits=self_test().logits + np.float32(0.02))
    bundle = replace(tiny_bundle(), variants={"fp16": Variant(tiny_model(), GUARDS, half)})
    write_bundle(bundle, tmp_path / "bundle")
    checks = verify(tmp_path / "bundle")
    assert failed(checks) == {}
    names = [check.name for check in checks]
    assert checks[0].detail.endswith("self-test frames 6, precisions fp32, fp16")
    for name in (*(f"engine {engine}: logits" for engine in ENGINES_HERE), "scorer cpu: verdicts"):
        assert names.count(f"fp32: {name}") == names.count(f"fp16: {name}") == 1
    broken = self_test(logits=self_test().logits + np.float32(0.2))
    write_bundle(replace(bundle, variants={"fp16": Variant(tiny_model(), GUARDS, broken)}), tmp_path / "broken")
    found = failed(verify(tmp_path / "broken"))
    assert set(found) == {f"fp16: engine {engine}: logits" for engine in ENGINES_HERE}
    assert "allowed 0.03" in next(iter(found.values()))
