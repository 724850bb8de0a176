"""Bundle to TensorRT plan, on the device; the bundle's self-test decides whether the plan may be used."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inflight_edge.bundle import Bundle, read_bundle
from inflight_edge.detector import Detector
from inflight_edge.engines import Engine
from inflight_edge.engines._tensorrt_build import BuildOptions, build_plan
from inflight_edge.engines.plans import (
    Identity,
    identity_here,
    plan_path,
    read_timing_cache,
    refuse_shared,
    timing_cache_path,
    write_plan,
    write_timing_cache,
)
from inflight_edge.engines.tensorrt import TensorRtEngine
from inflight_edge.errors import EngineError
from inflight_edge.scoring.device import Device
from inflight_edge.verdict import Decision
from inflight_edge.verify import ENGINE_TOLERANCES

__all__ = ["Compiled", "SelfTestReport", "compile_bundle", "self_test"]


@dataclass(frozen=True, slots=True)
class SelfTestReport:
    """What an engine makes of the bundle's self-test, against what the workstation made of it.

    n_frames, n_equal  frames, and those with the expected decision and source.
    feature_error, logit_error  largest |got - expected| / (1 + |expected|).
    margin_shift       largest |got - expected| of a margin, nats; None where no frame is guarded.
    smallest_margin    smallest expected |margin|, nats: what the shift has to stay below; None likewise.
    allowed            largest feature_error.
    """

    n_frames: int
    n_equal: int
    feature_error: float
    logit_error: float
    margin_shift: float | None
    smallest_margin: float | None
    allowed: float

    @property
    def passed(self) -> bool:
        """Every verdict as expected, and features and logits within the tolerance; NaN does not pass."""
        close = self.feature_error <= self.allowed and self.logit_error <= self.allowed
        return self.n_equal == self.n_frames and close

    def __str__(self) -> str:
        text = (
            f"verdicts equal {self.n_equal} of {self.n_frames}, feature error {self.feature_error:.2g}, "
            f"logit error {self.logit_error:.2g} (allowed {self.allowed:g})"
        )
        if self.margin_shift is None:
            return text
        return f"{text}, margin shift {self.margin_shift:.3g} nats, smallest margin {self.smallest_margin:.4g}"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A plan that passed: where it lies, for what it is, how long it took."""

    path: Path
    identity: Identity
    options: BuildOptions
    report: SelfTestReport
    seconds: float
    n_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "plan": str(self.path),
            "identity": asdict(self.identity),
            "options": asdict(self.options),
            "self_test": asdict(self.report),
            "seconds": round(self.seconds, 3),
            "bytes": self.n_bytes,
        }


def compile_bundle(
    path: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    options: BuildOptions | None = None,
    index: int = 0,
    out: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
) -> Compiled:
    """Build the plan of one precision of the bundle at ``path``, check it with the self-test, and keep it if it passes.

    out  file of the plan; None puts it among this user's plans, where the engine looks.
    key  file of the public key that must have signed the bundle.
    Raises BundleError, OptionError, DependencyError without TensorRT or GPU, and EngineError when the build fails or the
    plan does not pass: nothing is kept then, and a plan that was there before stays.
    """
    bundle = read_bundle(path, key=key).at(precision)
    options = options or BuildOptions()
    target = plan_path(bundle.model, precision) if out is None else Path(out)
    if target.parent.is_dir():  # first: the build takes minutes
        refuse_shared(target.parent)
    started = time.perf_counter()
    device = Device(index)
    try:
        identity = identity_here(bundle.model, precision, device)
        cache = timing_cache_path(identity)
        plan, timing = build_plan(bundle.model, device, options, read_timing_cache(cache))
    finally:
        device.close()
    try:
        write_timing_cache(cache, timing)
    except OSError as error:  # the next build is slower, this one is good
        warnings.warn(f"tensorrt: {cache}: not kept for the next build: {error.strerror or error}", stacklevel=2)
    with TensorRtEngine(plan, index=index) as engine:
        report = self_test(bundle, engine)
    if not report.passed:
        raise EngineError(
            f"{path}: the {precision} plan fails the bundle's self-test and is not kept: {report}; "
            "compile another --precision"
        )
    write_plan(target, plan, identity, asdict(options), asdict(report))
    return Compiled(target, identity, options, report, time.perf_counter() - started, len(plan))


def self_test(bundle: Bundle, engine: Engine) -> SelfTestReport:
    """Run the self-test's frames on an engine, verdicts by the fastest scorer here.  Raises EngineError."""
    test = bundle.self_test
    outputs = [engine.run(bundle.preprocess(frame)[None]) for frame in test.frames]
    logits, features = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
    detector = Detector(bundle, engine=engine)
    verdicts = [detector.score(*pair) for pair in zip(features, logits, strict=True)]
    expected = _margins(bundle)
    shifts = [
        abs(v.margin - want)
        for v, want in zip(verdicts, expected, strict=True)
        if v.decision is not Decision.UNGUARDED and np.isfinite(want)
    ]
    got = [(v.decision.value, -1 if v.source is None else v.source) for v in verdicts]
    wanted = list(zip(test.decisions, map(int, test.sources), strict=True))
    return SelfTestReport(
        n_frames=len(got),
        n_equal=sum(a == b for a, b in zip(got, wanted, strict=True)),
        feature_error=_error(features, test.features),
        logit_error=_error(logits, test.logits),
        margin_shift=float(np.max(shifts)) if shifts else None,
        smallest_margin=min((abs(margin) for margin in expected if np.isfinite(margin)), default=None),
        allowed=ENGINE_TOLERANCES[bundle.precision],
    )


def _margins(bundle: Bundle) -> list[float]:
    """Margin of each self-test frame, NaN where its prediction has no guard."""
    test, margins = bundle.self_test, []
    rows = {guard.target: (guard, scores) for guard, scores in zip(bundle.guards, test.log_likelihoods, strict=True)}
    for i, predicted in enumerate(test.logits.argmax(1)):
        margin = np.nan
        if int(predicted) in rows:
            guard, scores = rows[int(predicted)]
            margin = float(np.delete(scores[i], guard.target_row).max() - scores[i, guard.target_row])
        margins.append(margin)
    return margins


def _error(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Largest relative difference; NaN when one is NaN, infinite for another shape."""
    if got.shape != expected.shape:
        return float("inf")
    return float((np.abs(got - expected) / (1.0 + np.abs(expected))).max())
