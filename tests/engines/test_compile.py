"""Bundle to plan, through the double of TensorRT: what is built, what decides, what is kept, and who may use it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import tiny_bundle, tiny_model, written
from driver_double import Driver
from tensorrt_double import BuilderFlag, TensorRt

from inflight_edge import Decision, Detector, read_bundle, write_bundle
from inflight_edge.cli import main
from inflight_edge.compile import compile_bundle
from inflight_edge.engines import EngineOptions
from inflight_edge.engines._tensorrt_build import BuildOptions
from inflight_edge.engines.plans import plan_path, plans_folder
from inflight_edge.errors import DependencyError, EngineError, OptionError
from inflight_edge.verify import verify

Install = Callable[..., TensorRt]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "bundle")


def load(path: Path, **options: Any) -> Detector:
    return Detector.load(path, engine="tensorrt", **options)


def test_plan_is_built_checked_kept_and_found(gpu: Install, path: Path) -> None:
    library = gpu()
    compiled = compile_bundle(path)
    assert compiled.path == plan_path(read_bundle(path).model, "fp32")
    assert (compiled.report.n_equal, compiled.report.n_frames, compiled.report.passed) == (6, 6, True)
    assert compiled.report.feature_error < 1e-6
    (config,) = library.configs
    assert BuilderFlag.TF32 not in config.flags
    for scorer in ("auto", "cpu", "cuda"):
        detector = load(path, scorer=scorer)
        assert (detector.judge_inputs is not None) == (scorer != "cpu")
        verdicts = detector.run(list(detector.bundle.self_test.frames))
        assert [v.decision.value for v in verdicts] == list(detector.bundle.self_test.decisions)
    assert not any("plan" in name.name for name in path.iterdir())


def test_description_says_what_the_plan_is_for(gpu: Install, path: Path) -> None:
    gpu()
    compiled = compile_bundle(path, options=BuildOptions(batch=2, workspace=1 << 24))
    described = json.loads(compiled.path.with_name(compiled.path.name + ".json").read_text())
    assert described["identity"] == {
        "onnx_sha256": described["identity"]["onnx_sha256"],
        "precision": "fp32",
        "tensorrt": "10.3.0",
        "gpu": "Double of a GPU",
        "compute_capability": "11.0",
    }
    assert described["options"] == {"batch": 2, "workspace": 1 << 24, "level": 3}
    assert described["self_test"]["n_equal"] == 6


def test_timing_cache_is_kept_for_the_next_build_and_a_foreign_one_replaced(gpu: Install, path: Path) -> None:
    library = gpu()
    compile_bundle(path)
    assert library.timing_hits == 0
    compile_bundle(path)
    assert library.timing_hits == 1
    (cache,) = plans_folder().glob("timing-*.cache")
    for data in (b"of another GPU", b"damaged"):
        cache.write_bytes(data)
        compile_bundle(path)
        assert library.timing_hits == 1
        assert cache.read_bytes().startswith(b"cache 10.3.0")


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"version": "10.13.3"}, "made for tensorrt 10.3.0, but here it is 10.13.3; run `inflight-edge compile BUNDLE"),
        ({"name": "Thor"}, "made for gpu Double of a GPU, but here it is Thor; run"),
        ({"capability": (8, 7)}, r"made for compute_capability 11.0, but here it is 8.7; run"),
    ],
)
def test_stale_or_foreign_plan_is_an_error_that_names_both_values(
    gpu: Install, path: Path, machine: dict[str, Any], message: str
) -> None:
    gpu()
    compile_bundle(path)
    driver = Driver(integrated=True, capability=machine.get("capability", (11, 0)))
    driver.name = machine.get("name", driver.name)
    gpu(driver, version=machine.get("version", "10.3.0"))
    with pytest.raises(EngineError, match=message):
        load(path)
    assert any(not check.passed and check.name == "engine tensorrt" for check in verify(path))
    compile_bundle(path)
    assert load(path)(read_bundle(path).self_test.frames[0]).decision is Decision.ACCEPT


def test_plan_of_another_model_is_refused(gpu: Install, path: Path, tmp_path: Path) -> None:
    gpu()
    out = tmp_path / "here.plan"
    compile_bundle(path, out=out)
    assert load(path, options=EngineOptions(plan=out)).engine.name == "tensorrt"
    other = written(tmp_path / "other", model=tiny_model(batch=1))
    with pytest.raises(EngineError, match=r"here.plan: made for onnx_sha256 [0-9a-f]{64}, but here it is [0-9a-f]{64}"):
        load(other, options=EngineOptions(plan=out))


def test_damaged_plan_or_description_is_refused(gpu: Install, path: Path) -> None:
    gpu()
    compiled = compile_bundle(path)
    described = compiled.path.with_name(compiled.path.name + ".json")
    good = compiled.path.read_bytes(), described.read_bytes()
    compiled.path.write_bytes(good[0][:-1])
    with pytest.raises(EngineError, match=r"expected SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}: it is damaged; run"):
        load(path)
    compiled.path.write_bytes(good[0])
    for broken in (b"{", b"[]", b"{}", good[1].replace(b'"format": 2', b'"format": 1')):
        described.write_bytes(broken)
        with pytest.raises(EngineError, match="compile BUNDLE --precision fp32"):
            load(path)
    described.unlink()
    with pytest.raises(DependencyError, match="expected a plan for TensorRT with its description, got none; run"):
        load(path)


@pytest.mark.parametrize("place", ["plan", "description", "folder"])
def test_plan_that_others_can_change_is_refused(gpu: Install, path: Path, place: str) -> None:
    """It takes the place of the classifier, and nothing signs it."""
    gpu()
    previous = os.umask(0)
    try:
        compiled = compile_bundle(path)
    finally:
        os.umask(previous)
    load(path)  # written for its owner alone, whatever the umask
    plan = compiled.path
    changed = {"plan": plan, "description": plan.with_name(plan.name + ".json"), "folder": plan.parent}[place]
    mode = changed.stat().st_mode
    for bit in (0o020, 0o002):
        changed.chmod(mode | bit)
        with pytest.raises(EngineError, match=f"{changed}: expected what its owner alone can change, .*chmod go-w"):
            load(path)
    changed.chmod(mode)
    load(path)


def test_folder_that_others_can_change_is_refused_before_the_build(gpu: Install, path: Path, tmp_path: Path) -> None:
    library = gpu()
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o775)
    with pytest.raises(EngineError, match=f"{shared}: expected what its owner alone can change"):
        compile_bundle(path, out=shared / "a.plan")
    assert library.configs == []
    shared.chmod(0o1777)  # as /tmp: there others cannot exchange the file
    out = compile_bundle(path, out=shared / "a.plan").path
    load(path, options=EngineOptions(plan=out))


def test_plan_in_a_folder_of_somebody_else_says_so(gpu: Install, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()
    compile_bundle(path)

    def refused(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(EngineError, match="cannot be read as this user: Permission denied; let it read the folder"):
        load(path)


def test_timing_cache_that_cannot_be_kept_costs_no_plan(
    gpu: Install, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu()
    (tmp_path / "file").touch()
    monkeypatch.setenv("INFLIGHT_EDGE_PLANS", str(tmp_path / "file" / "plans"))
    with pytest.warns(UserWarning, match="timing-.*: not kept for the next build: Not a directory"):
        compiled = compile_bundle(path, out=tmp_path / "a.plan")
    assert compiled.path.is_file()


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """Other weights than the bundle's."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    weights = onnx.numpy_helper.to_array(changed.graph.initializer[0]) * np.float32(0.5)
    changed.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "to_features"))
    return changed


def test_plan_that_fails_the_self_test_is_not_kept_and_an_older_one_stays(gpu: Install, path: Path) -> None:
    library = gpu()
    library.change = halved
    with pytest.raises(EngineError, match="the fp32 plan fails the bundle's self-test and is not kept: verdicts equal"):
        compile_bundle(path)
    assert list(plans_folder().glob("*.plan*")) == []
    library.change = None
    compiled = compile_bundle(path)
    before = compiled.path.read_bytes()
    library.change = halved
    with pytest.raises(EngineError, match=r"feature error 0\.\d+, logit error 0\.\d+ \(allowed 0.001\), margin shift"):
        compile_bundle(path)
    assert compiled.path.read_bytes() == before
    assert load(path)(read_bundle(path).self_test.frames[0]).decision is Decision.ACCEPT


def test_model_that_tensorrt_cannot_read(gpu: Install, tmp_path: Path) -> None:
    gpu()
    path = written(tmp_path / "bundle", model=b"junk")
    with pytest.raises(EngineError, match=r"model: TensorRT cannot read it: Failed to parse .*; choose another engine"):
        compile_bundle(path)
    assert not plans_folder().exists()


def test_build_without_enough_workspace(gpu: Install, path: Path) -> None:
    library = gpu()
    library.needed_workspace = 1 << 30
    with pytest.raises(
        EngineError, match=r"TensorRT cannot build it: .*workspace of 1048576 bytes; out of memory: give"
    ):
        compile_bundle(path, options=BuildOptions(workspace=1 << 20))
    assert not list(plans_folder().glob("*.plan*")) if plans_folder().exists() else True


def test_fixed_batch_of_the_model_is_the_plans(gpu: Install, tmp_path: Path) -> None:
    gpu()
    path = written(tmp_path / "bundle", model=tiny_model(batch=3))
    with pytest.raises(
        EngineError, match=r"expected a batch of 1 and fixed sizes, got \[3, 1, 2, 2\]; compile with --batch 3"
    ):
        compile_bundle(path)
    compile_bundle(path, options=BuildOptions(batch=3))
    assert load(path).run(list(read_bundle(path).self_test.frames))[0].decision is Decision.ACCEPT
    free = written(tmp_path / "free", model=tiny_model(shape=(1, "H", "W")))
    with pytest.raises(EngineError, match="export it with fixed sizes"):
        compile_bundle(free)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: expected an integer from 1 to 1024, got 0"),
        ({"batch": True}, "batch: expected an integer from 1 to 1024, got True"),
        ({"workspace": 100}, "workspace: expected an integer from 1048576 to"),
        ({"level": 6}, "level: expected an integer from 0 to 5, got 6"),
    ],
)
def test_wrong_build_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BuildOptions(**options)


def test_options_of_another_engine_are_refused(gpu: Install, path: Path) -> None:
    gpu()
    compile_bundle(path)
    with pytest.raises(OptionError, match="wait: only tensorrt has this option, got it for onnxruntime; leave it out"):
        Detector.load(path, options=EngineOptions(wait="spin"))
    with pytest.raises(OptionError, match="arena: only onnxruntime has this option, got it for tensorrt"):
        load(path, options=EngineOptions(arena=False))
    with pytest.raises(OptionError, match="threads: expected none for tensorrt, which runs on the GPU, got 2"):
        load(path, threads=2)
    with pytest.raises(OptionError, match="wait: expected one of blocking, spin, got 'busy'"):
        EngineOptions(wait="busy")  # type: ignore[arg-type]


def test_without_gpu_or_library_verify_leaves_tensorrt_out(gpu: Install, path: Path) -> None:
    gpu(Driver(devices=0))
    with pytest.raises(DependencyError, match="expected an NVIDIA GPU with index 0"):
        compile_bundle(path)
    assert not any("tensorrt" in check.name for check in verify(path))
    gpu()
    assert not any("tensorrt" in check.name for check in verify(path))  # no plan yet
    compile_bundle(path)
    checks = [check for check in verify(path) if "tensorrt" in check.name]
    assert {check.name for check in checks} >= {"engine tensorrt: features", "frames to verdicts: tensorrt, cuda"}
    assert all(check.passed for check in checks)


def test_every_precision_of_a_trained_classifier_compiles(gpu: Install, tmp_path: Path) -> None:
    """The double holds quantised networks to what TensorRT takes: int8 zero points of 0, no int32 bias."""
    import poisoned  # trains a classifier with torch, which the device's tests do without

    bundle = poisoned.bundle_of_precisions()
    gpu()
    write_bundle(bundle, tmp_path / "bundle")
    frames = [*np.asarray(poisoned.poisoned().test.images)[:5], *np.asarray(poisoned.poisoned().triggered.images)[:5]]
    for precision in bundle.precisions:
        compiled = compile_bundle(tmp_path / "bundle", precision=precision)
        assert compiled.identity.precision == precision
        detector = load(tmp_path / "bundle", precision=precision)
        expected = Detector(bundle.at(precision)).run(frames)
        assert [v.decision for v in detector.run(frames)] == [v.decision for v in expected]
    assert len(list(plans_folder().glob("*.plan"))) == 3


def test_asymmetric_int8_is_refused_in_one_line(gpu: Install, tmp_path: Path) -> None:
    import poisoned

    bundle = poisoned.bundle_of_precisions()
    gpu()
    proto = onnx.load_from_string(bundle.at("int8").model)
    zero = next(t for t in proto.graph.initializer if t.name == "input_zero_point")
    zero.CopyFrom(onnx.numpy_helper.from_array(np.int8(3), zero.name))
    broken = replace(bundle.variants["int8"], model=proto.SerializeToString())
    write_bundle(replace(bundle, variants={"int8": broken}), tmp_path / "bundle")
    with pytest.raises(EngineError, match=r"TensorRT cannot read it: .*zero point of QuantizeLinear must be 0 in int8"):
        compile_bundle(tmp_path / "bundle", precision="int8")


def test_command_compiles_and_scores(
    gpu: Install, path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gpu()
    assert main(["compile", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "TensorRT 10.3.0, Double of a GPU (compute capability 11.0)" in shown
    assert "self-test passed: verdicts equal 6 of 6" in shown
    assert main(["compile", str(path), "--json", "--batch", "2", "--out", str(tmp_path / "a.plan")]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["batch"] == 2
    np.savez(tmp_path / "frames.npz", images=read_bundle(path).self_test.frames)
    arguments = ["--engine", "tensorrt", "--plan", str(tmp_path / "a.plan"), "--wait", "spin", "--memory", "copied"]
    assert main(["score", str(path), str(tmp_path / "frames.npz"), "--json", *arguments]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["decision"] for record in records] == list(tiny_bundle().self_test.decisions)
    assert main(["compile", str(path), "--out", str(tmp_path / "new" / "folder" / "a.plan")]) == 0
    assert (tmp_path / "new" / "folder" / "a.plan").is_file()
    assert main(["compile", str(path), "--precision", "fp16"]) == 2
    assert "precision: this bundle has fp32, got 'fp16'" in capsys.readouterr().err


def test_report_compiles_checks_and_times(
    gpu: Install, path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gpu()
    assert main(["doctor", "--run", str(path), "--report", str(tmp_path / "report.json"), "--frames", "9"]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["format"] == "inflight-edge-report"
    steps = {row["step"]: row["passed"] for row in report["ladder"]}
    assert all(steps.values())
    assert {"compile fp32", "bundle", "engine onnxruntime: features", "self-test: fp32, tensorrt, cuda"} <= set(steps)
    timed = {row["path"]: row for row in report["latency"]}
    assert {"fp32, onnxruntime, cpu", "fp32, tensorrt, cpu", "fp32, tensorrt, cuda"} <= set(timed)
    assert set(timed["fp32, tensorrt, cuda"]["stages"]) == {"capture", "preprocess", "engine", "whole"}
    assert timed["fp32, tensorrt, cuda"]["no_graph"] == ""
    assert "fp32, tensorrt, cuda" in shown
    assert {part["name"] for part in report["parts"]} >= {"CPU", "TensorRT", "pycuda"}
    assert report["environment"]["python"]


def test_report_of_a_machine_that_differs_fails(
    gpu: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = gpu()
    library.change = halved
    path = written(tmp_path / "bundle")
    assert (
        main(["doctor", "--run", str(path), "--report", str(tmp_path / "report.json"), "--json", "--frames", "9"]) == 1
    )
    report = json.loads(capsys.readouterr().out)
    failed = [row["step"] for row in report["ladder"] if not row["passed"]]
    assert failed == ["compile fp32"]
    assert "fp32, tensorrt, cpu" in report["left_out"]
    assert main(["doctor", "--run", str(path), "--report", str(tmp_path)]) == 2
    assert "--report: expected a file that can be written" in capsys.readouterr().err
