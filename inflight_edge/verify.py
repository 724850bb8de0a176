"""Does a bundle give on this machine what it gave on the workstation?  Its own self-test says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from inflight_edge.bundle import Bundle, read_bundle
from inflight_edge.detector import Detector, NoEngine
from inflight_edge.engines import Engine
from inflight_edge.errors import DependencyError, InflightError
from inflight_edge.guard import FloatArray
from inflight_edge.runtime import ENGINES, close_engine, make_engine
from inflight_edge.scoring import Backend, available_backends
from inflight_edge.verdict import Verdict

__all__ = ["ENGINE_TOLERANCES", "SCORER_TOLERANCE", "Check", "verify"]

# Allowed |got - expected| / (1 + |expected|): float32 kernels sum in different orders; so do those of float16, and round
# each layer's values to 11 bits; a value at the edge between two of int8's 255 steps may fall on either.
ENGINE_TOLERANCES = {"fp32": 1e-3, "fp16": 3e-2, "int8": 5e-1}
SCORER_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what was checked, whether it passed, and the numbers or the error."""

    name: str
    passed: bool
    detail: str


def verify(path: str | os.PathLike[str], *, key: str | os.PathLike[str] | None = None) -> list[Check]:
    """Check the bundle folder ``path``: files and invariants, then its self-tests on all that this machine has.

    Each precision is checked on each engine; TensorRT takes part where a plan was compiled.

    key: file of the public key that must have signed the bundle.

    A check that fails, or cannot be made, is reported as failed and the others still run; only a bundle that
    cannot be read ends the list.  Never raises InflightError.
    """
    try:
        bundle = read_bundle(path, key=key)
    except InflightError as error:
        return [Check("bundle", False, str(error))]
    n_frames, n_guards = bundle.self_test.frames.shape[0], len(bundle.guards)
    signed = "no key given: signature not checked" if key is None else f"signed by {key}"
    held = "" if not bundle.variants else f", precisions {', '.join(bundle.precisions)}"
    detail = f"hashes and invariants hold; {signed}; guards {n_guards}, self-test frames {n_frames}{held}"
    checks = [Check("bundle", True, detail)]
    for precision in bundle.precisions:
        prefix = f"{precision}: " if bundle.variants else ""
        checks += [replace(check, name=prefix + check.name) for check in _check_precision(bundle.at(precision))]
    return checks


def _check_precision(bundle: Bundle) -> list[Check]:
    checks: list[Check] = []
    backends = cast(tuple[Backend, ...], available_backends())
    for backend in backends:
        checks += _check_scorer(bundle, backend)
    engines = [_make_engine(bundle, name) for name in ENGINES]
    for engine in engines:
        if isinstance(engine, Check):
            checks.append(engine)
        elif engine is not None:
            checks += _check_engine(bundle, engine)
            checks += [_check_path(bundle, engine, backend) for backend in backends]
            close_engine(engine)
    if not any(engines):
        remedy = "pip install 'inflight-edge[onnxruntime]'"
        checks.append(Check("engine", False, f"expected an engine ({', '.join(ENGINES)}), got none here; {remedy}"))
    return checks


def _make_engine(bundle: Bundle, name: str) -> Engine | Check | None:
    """The engine, None when it is not installed, or the failed check when it cannot run this model."""
    try:
        return make_engine(bundle, name)
    except DependencyError:
        return None  # the caller reports it when no other engine is there
    except InflightError as error:
        return Check(f"engine {name}", False, str(error))


def _check_engine(bundle: Bundle, engine: Engine) -> Iterator[Check]:
    """Logits and features of the self-test's frames."""
    test, tolerance = bundle.self_test, ENGINE_TOLERANCES[bundle.precision]
    try:
        outputs = [engine.run(bundle.preprocess(frame)[None]) for frame in test.frames]
        logits, features = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
    except (InflightError, ValueError) as error:  # the latter where a frame has more features than another
        yield Check(f"engine {engine.name}", False, str(error))
        return
    yield _compare(f"engine {engine.name}: logits", logits, test.logits, tolerance)
    yield _compare(f"engine {engine.name}: features", features, test.features, tolerance)


def _check_scorer(bundle: Bundle, backend: Backend) -> Iterator[Check]:
    """Log-likelihoods of the stored features under every guard, and the verdicts on stored logits and features."""
    test = bundle.self_test
    try:
        detector = Detector(bundle, engine=NoEngine(), scorer=backend)
        for guard, expected in zip(bundle.guards, test.log_likelihoods, strict=True):
            got = detector.guards[guard.target].score_batch(test.features)
            yield _compare(f"scorer {backend}: log-likelihoods, target {guard.target}", got, expected, SCORER_TOLERANCE)
    except InflightError as error:
        yield Check(f"scorer {backend}", False, str(error))
        return
    verdicts = [detector.score(*pair) for pair in zip(test.features, test.logits, strict=True)]
    yield _compare_verdicts(f"scorer {backend}: verdicts", bundle, verdicts)


def _check_path(bundle: Bundle, engine: Engine, backend: Backend) -> Check:
    """The verdicts from frames alone, as in flight."""
    name = f"frames to verdicts: {engine.name}, {backend}"
    try:
        detector = Detector(bundle, engine=engine, scorer=backend)
    except InflightError as error:
        return Check(name, False, str(error))
    return _compare_verdicts(name, bundle, detector.run(list(bundle.self_test.frames)))


def _compare(name: str, got: FloatArray, expected: FloatArray, tolerance: float) -> Check:
    if got.shape != expected.shape:
        return Check(name, False, f"expected shape {expected.shape}, got {got.shape}")
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(got.astype(np.float64) - expected) / (1.0 + np.abs(expected.astype(np.float64)))
    errors[got == expected] = 0.0  # equal infinities
    errors[np.isnan(errors)] = np.inf
    worst = np.unravel_index(int(np.argmax(errors)), errors.shape)
    passed = bool(errors[worst] <= tolerance)
    detail = f"largest relative difference {errors[worst]:.2g}, allowed {tolerance:g}"
    if not passed:
        detail += f"; at {tuple(map(int, worst))} expected {expected[worst]:.6g}, got {got[worst]:.6g}"
    return Check(name, passed, detail)


def _compare_verdicts(name: str, bundle: Bundle, verdicts: list[Verdict]) -> Check:
    test = bundle.self_test
    wrong = []
    for i, (verdict, decision, source) in enumerate(zip(verdicts, test.decisions, test.sources, strict=True)):
        got = -1 if verdict.source is None else verdict.source
        if (verdict.decision, got) != (decision, source):
            reason = f" ({verdict.reason})" if verdict.reason else ""
            wrong.append(
                f"frame {i}: expected {_say(bundle, decision, int(source))}, "
                f"got {_say(bundle, verdict.decision.value, got)}{reason}"
            )
    if wrong:
        return Check(name, False, f"{len(wrong)} of {len(verdicts)} differ; {wrong[0]}")
    return Check(name, True, f"all {len(verdicts)} equal")


def _say(bundle: Bundle, decision: str, source: int) -> str:
    return decision + (f" from {bundle.class_names[source]}" if source >= 0 else "")
