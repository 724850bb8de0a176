"""The latency benchmark: a quick run has every key and backend, wrong answers stop it, the tables come from its file."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight_edge.bench import STAGES
from inflight_edge.guard import KINDS
from inflight_edge.scoring.reference import log_likelihoods

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = {"capi", "python", "sklearn", "scipy", "numpy", "torch", "torch_compile", "skl2onnx"}


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.latency.{name}")


@pytest.fixture(scope="module")
def result(_importable: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("latency") / "results" / "quick.json"
    assert module("__main__").main(["--quick", "--quiet", "--json", str(path)]) == 0
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_records_have_the_keys_and_plausible_numbers(result: dict[str, Any]) -> None:
    assert {r["group"] for r in result["records"]} == {"roofline", "scorer", "verdict", "scaling", "frame"}
    for record in result["records"]:
        assert tuple(record) == module("timing").KEYS
        assert 0 <= record["p50_ns"] <= record["p99_ns"] <= record["p999_ns"] <= record["max_ns"]
        assert record["max_ns"] > 0
        if record["group"] in ("scorer", "verdict", "scaling"):
            assert record["backend"] in BACKENDS
            assert record["kind"] in KINDS
            assert min(record[k] for k in ("classes", "components", "features", "batch", "bytes", "flops")) > 0
    assert len(result["samples"]) == len(result["records"])
    for histogram in result["histograms"]:
        assert sum(count for _, count in histogram["buckets"]) == result["samples"][histogram["record"]]


def test_every_timed_backend_was_compared_first(result: dict[str, Any]) -> None:
    shape = ("kind", "classes", "components", "features", "batch")
    compared = {(c["backend"], *(c[key] for key in shape)) for c in result["comparisons"]}
    timed = [r for r in result["records"] if r["group"] in ("scorer", "scaling")]
    assert {"capi", "python", "numpy", "torch", "sklearn"} <= {r["backend"] for r in timed}
    for record in timed:
        assert (record["backend"], *(record[key] for key in shape)) in compared
    for record in [r for r in result["records"] if r["group"] == "verdict"]:
        assert (f"{record['backend']} verdict", *(record[key] for key in shape)) in compared
    assert all(0 <= c["error"] <= c["allowed"] for c in result["comparisons"])


def test_frames_have_every_defence_and_stage(result: dict[str, Any]) -> None:
    names = {r["kind"] for r in result["records"] if r["group"] == "frame"}
    stages = {f"lenet5/{loop}/{name}" for loop in ("guard", "alone") for name in STAGES}
    assert names == stages | {f"lenet5/{name}/whole" for name in ("bare", "nc_filter", "b3d", "strip")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["numpy", "torch", "sklearn", "scipy", "skl2onnx", "torch_compile"])
def test_peers_agree_with_the_reference_for_mixtures(name: str, kind: str) -> None:
    cases, peers = module("cases"), module("peers")
    library, make = peers.PEERS[name]
    if peers.missing(library):
        pytest.skip(f"{library} is not installed")
    if name == "torch_compile":
        pytest.skip("compiling takes many seconds; the benchmark compares it before it is timed")
    case = cases.Case(kind, classes=3, components=2, features=20)
    guard = cases.make_guard(case)
    features = cases.make_features(case, guard, 5)
    np.testing.assert_allclose(make(guard)(features), log_likelihoods(guard, features), rtol=2e-5, atol=1e-3)


def test_work_of_a_case_by_hand() -> None:
    cases = module("cases")
    diagonal = cases.Case("diagonal", classes=10, components=2, features=8, batch=3)
    assert diagonal.bytes == 4 * (20 * 8 + 20 * 8 + 20 + 2 * 8 + 3 * (8 + 10))
    assert diagonal.flops == 3 * (2 * 8 + 4 * 20 * 8)
    full = cases.Case("full", classes=2, features=4)
    assert full.bytes == 4 * (2 * 10 + 2 * 4 + 2 + 2 * 4 + 4 + 2)
    assert full.flops == 2 * 4 + 2 * (2 * 10 + 3 * 4)
    shared = cases.Case("shared", classes=2, features=4)
    assert shared.bytes == 4 * (10 + 2 * 4 + 2 + 3 * 4 + 4 + 2)
    assert shared.flops == 2 * 4 + 2 * 10 + 4 + 2 * 3 * 4


def test_percentiles_are_nearest_rank() -> None:
    case = module("cases").Case("diagonal")
    record = module("timing").make_record("scorer", "capi", case, np.arange(1000, 0, -1))
    assert [record[key] for key in ("p50_ns", "p99_ns", "p999_ns", "max_ns")] == [500, 990, 999, 1000]


def test_a_wrong_answer_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    peers, scorer, report = module("peers"), module("scorer"), module("report").Report(quiet=True)

    def wrong(guard: Any) -> Any:
        right = peers.numpy(guard)
        return lambda features: right(features) * np.float32(1.01)

    monkeypatch.setitem(scorer.PEERS, "numpy", ("numpy", wrong))
    with pytest.raises(AssertionError, match=r"numpy .*: error 0\.0.*, allowed 0\.001; not timed"):
        scorer.run_scaling(report, None, quick=True)
    assert "numpy" not in {record["backend"] for record in report.records}


def test_without_compiler_and_library_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    native, scorer, main = module("native"), module("scorer"), module("__main__")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setattr(scorer, "missing", lambda library: library == "torch")
    found = main.run("scaling", quick=True, quiet=True)
    assert {"what": "capi", "reason": "capi needs a C compiler and make; apt install gcc make"} in found["skipped"]
    assert found["clock_ns"] is None
    assert {record["backend"] for record in found["records"]} == {"python", "numpy"}


def test_tables_and_plots_come_from_the_file(result: dict[str, Any], tmp_path: Path) -> None:
    tables = module("tables")
    (tmp_path / "run.json").write_text(json.dumps(result))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- latency:begin -->\nold\n<!-- latency:end -->\nafter\n")
    contents = []
    for _ in range(2):
        assert tables.main([str(tmp_path / "run.json"), "--readme", str(readme)]) == 0
        contents.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == [
        "README.md",
        "latency_frame.svg",
        "latency_scaling.svg",
        "latency_scorer.svg",
        "run.json",
    ]
    text = readme.read_text()
    assert text.startswith("before\n<!-- latency:begin -->\n**A quick run: these figures mean nothing.**")
    assert text.endswith("<!-- latency:end -->\nafter\n")
    assert "old" not in text
    for title in ("Log-likelihoods, diagonal:", "Verdict (`ife_judge`), one frame:", "Roofline, one frame:",
                  "Whole frame, lenet5:", "Stages of the guarded classifier, lenet5, between"):  # fmt: skip
        assert title in text


def test_readme_of_the_benchmark_has_the_markers() -> None:
    text = (ROOT / "benchmarks" / "latency" / "README.md").read_text()
    assert module("tables").fill(text, "x").count("<!-- latency:begin -->\nx\n<!-- latency:end -->") == 1


def test_markers_are_required() -> None:
    with pytest.raises(ValueError, match="README: expected <!-- latency:begin --> and then <!-- latency:end -->, once"):
        module("tables").fill("no markers", "x")


def test_a_missing_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert module("tables").main([str(tmp_path / "none.json")]) == 2
    assert "run `python -m benchmarks.latency --json FILE`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(7, "7 ns"), (370, "370 ns"), (1234, "1.23 us"), (45_600, "45.6 us"), (123_456, "123 us"), (7.7e6, "7.70 ms")],
)
def test_durations(nanoseconds: float, text: str) -> None:
    assert module("tables").duration(nanoseconds) == text
