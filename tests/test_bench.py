"""`inflight-edge bench`: answers first, then every stage of every frame is counted; no threshold on a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bundles import tiny_bundle, tiny_guard, tiny_self_test, written

from inflight_edge import Detector
from inflight_edge import bench as bench_module
from inflight_edge.bench import STAGES, WARM_UP, Stages, bench
from inflight_edge.cli import main
from inflight_edge.environment import describe_environment
from inflight_edge.errors import BundleError, OptionError


def test_every_stage_is_counted_and_ordered() -> None:
    figures = bench(Detector(tiny_bundle()), 12)
    assert (figures["frames"], figures["warm_up"]) == (12, WARM_UP)
    assert list(figures["stages"]) == list(figures["inside"]) == list(STAGES)
    expected = tiny_bundle().self_test.decisions
    guarded = 2 * sum(decision != "unguarded" for decision in expected)
    assert figures["guarded"] == guarded > 0
    for name, stage in figures["stages"].items():
        assert stage["count"] == (guarded if name in ("scorer", "guard") else 12)
        assert 0 < stage["p50_ns"] <= stage["p99_ns"] <= stage["p999_ns"] <= stage["max_ns"]
    assert json.loads(json.dumps(figures)) == figures


def test_the_engine_is_named_where_it_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Detector(tiny_bundle())
    assert bench_module._scorer(detector).startswith("cpu ")
    detector.judge_inputs = lambda batch: []
    assert bench_module._scorer(detector) == "cuda, in the engine"


def test_stages_give_the_detectors_verdicts() -> None:
    detector = Detector(tiny_bundle())
    frames = detector.bundle.self_test.frames
    staged = [Stages.of(detector)(frame, np.empty_like(frame)) for frame in frames]
    assert staged == detector.run(list(frames))


def test_a_stage_that_never_ran_is_left_out() -> None:
    guards = (tiny_guard(1),)
    test = tiny_self_test(guards)
    chosen = [i for i, decision in enumerate(test.decisions) if decision == "unguarded"]
    only = type(test)(
        test.frames[chosen], test.logits[chosen], test.features[chosen],
        (test.log_likelihoods[0][chosen],), ("unguarded",) * len(chosen), test.sources[chosen],
    )  # fmt: skip
    figures = bench(Detector(tiny_bundle(guards=guards, self_test=only)), 3)
    assert figures["guarded"] == 0
    assert not {"scorer", "guard"} & set(figures["stages"])


def test_a_wrong_answer_is_not_timed() -> None:
    test = tiny_self_test((tiny_guard(3), tiny_guard(0, "shared")))
    changed = {name: getattr(test, name) for name in type(test).__slots__}
    changed["decisions"] = ("trigger", *test.decisions[1:])
    changed["sources"] = np.array([2, *test.sources[1:]], np.int32)
    with pytest.raises(BundleError) as caught:
        bench(Detector(tiny_bundle(self_test=type(test)(**changed))), 3)
    assert str(caught.value) == (
        "self-test frame 0: expected trigger, source 2, got accept, source -1; "
        "a wrong answer is not timed: run `inflight-edge verify`"
    )


def test_no_frames_is_refused() -> None:
    with pytest.raises(OptionError) as caught:
        bench(Detector(tiny_bundle()), 0)
    assert str(caught.value) == "frames: expected at least 1, got 0"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "bundle")
    assert main(["bench", str(path), "--frames", "7", "--json", str(tmp_path / "bench.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "stage"
    assert [line.split()[0] for line in lines[2:9]] == list(STAGES)
    assert "warm-up 50 frames" in lines[-1]
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["frames"] == 7
    assert figures["environment"]["versions"]["numpy"] == np.__version__


def test_environment_has_every_key_and_is_plain() -> None:
    found = describe_environment()
    assert json.loads(json.dumps(found)) == found
    for key in ("cpu", "governor", "instruction_set", "nvpmodel", "jetson_clocks", "versions", "commit", "load"):
        assert key in found
    assert found["versions"]["inflight-edge"]


def test_environment_of_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in (("nvpmodel", "echo NV Power Mode: MAXN"), ("jetson_clocks", "echo denied >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = describe_environment()
    assert found["nvpmodel"] == "NV Power Mode: MAXN"
    assert found["jetson_clocks"] == "failed: denied"
    assert found["commit"] is None
