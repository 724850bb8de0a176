"""One file that says how a bundle does on a machine: what is here, step by step against the workstation, how fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from inflight_edge.bench import bench
from inflight_edge.bundle import Bundle, read_bundle
from inflight_edge.compile import compile_bundle, self_test
from inflight_edge.detector import Detector
from inflight_edge.doctor import examine
from inflight_edge.engines.plans import plan_path
from inflight_edge.environment import describe_environment
from inflight_edge.errors import DependencyError, EngineError, InflightError
from inflight_edge.runtime import ENGINES, close_engine
from inflight_edge.scoring import Backend, available_backends
from inflight_edge.verify import verify

__all__ = ["make_report"]

FORMAT = "inflight-edge-report"


def make_report(path: Path, *, n_frames: int = 500, key: Path | None = None) -> dict[str, Any]:
    """Plain values for JSON.

    key       file of the public key that must have signed the bundle.

    ladder    steps from the workstation's numbers down to the verdict: hashes, each scorer against the reference, each
              engine against torch's logits and features, both together; for each precision.
    latency   of each precision, engine and scorer, batch 1, by `bench`.
    left_out  what is not installed here.

    A plan that TensorRT lacks is compiled first.  Raises BundleError when the bundle cannot be read or the key did not sign it.
    """
    bundle = read_bundle(path, key=key)
    left_out: dict[str, str] = {}
    ladder = [*_plans(path, bundle, left_out, key)]
    ladder += [{"step": check.name, "passed": check.passed, "detail": check.detail} for check in verify(path, key=key)]
    latency = []
    for precision in bundle.precisions:
        for engine, scorer in _paths():
            name = f"{precision}, {engine}, {scorer}"
            try:
                detector = Detector(bundle.at(precision), engine=engine, scorer=scorer)
            except DependencyError as error:
                left_out[name] = str(error)
                continue
            except InflightError as error:
                ladder.append({"step": f"latency: {name}", "passed": False, "detail": str(error)})
                continue
            ladder.append(_step(f"self-test: {name}", partial(_self_test, detector)))
            latency += _latency(name, detector, n_frames, ladder)
            close_engine(detector.engine)
    return {
        "format": FORMAT,
        "format_version": 1,
        "bundle": {"feature_layer": bundle.feature_layer, "precisions": bundle.precisions, "versions": bundle.versions},
        "environment": describe_environment(),
        "parts": [asdict(component) for component in examine()],
        "ladder": ladder,
        "latency": latency,
        "left_out": left_out,
    }


def _paths() -> list[tuple[str, Backend]]:
    """Engines and scorers worth timing: all natives on each."""
    here = available_backends()
    natives: tuple[Backend, ...] = ("cpu", "cuda")
    scorers: list[Backend] = [name for name in natives if name in here] or ["reference"]
    return [(engine, scorer) for engine in ENGINES for scorer in scorers]


def _plans(path: Path, bundle: Bundle, left_out: dict[str, str], key: Path | None) -> list[dict[str, Any]]:
    """Compile what TensorRT has no plan for."""
    rows = []
    for precision in bundle.precisions:
        if not plan_path(bundle.at(precision).model, precision).exists():
            try:
                rows.append(_step(f"compile {precision}", partial(_compile, path, precision, key)))
            except DependencyError as error:
                left_out["tensorrt"] = str(error)
                break
    return rows


def _compile(path: Path, precision: str, key: Path | None) -> str:
    return str(compile_bundle(path, precision=precision, key=key).report)


def _self_test(detector: Detector) -> str:
    report = self_test(detector.bundle, detector.engine)
    if not report.passed:
        raise EngineError(str(report))
    return str(report)


def _step(name: str, work: Callable[[], str]) -> dict[str, Any]:
    """A row of the ladder; what is not installed is the caller's to report."""
    try:
        return {"step": name, "passed": True, "detail": work()}
    except DependencyError:
        raise
    except InflightError as error:
        return {"step": name, "passed": False, "detail": str(error)}


def _latency(name: str, detector: Detector, n_frames: int, ladder: list[dict[str, Any]]) -> list[dict[str, Any]]:
    try:
        figures = bench(detector, n_frames)
    except InflightError as error:  # other verdicts than the workstation's: they are not timed
        ladder.append({"step": f"latency: {name}", "passed": False, "detail": str(error)})
        return []
    row = {"path": name, "frames": n_frames, "stages": figures["stages"]}
    return [row | {"no_graph": getattr(detector.engine, "why_no_graph", None)}]
