"""A detector that has shown on this machine that it answers as its bundle says."""

from __future__ import annotations

import os

from inflight_edge.bench import check_verdicts
from inflight_edge.detector import Detector
from inflight_edge.engines import EngineOptions
from inflight_edge.scoring import Backend

__all__ = ["load_verified"]


def load_verified(
    path: str | os.PathLike[str],
    *,
    engine: str = "onnxruntime",
    scorer: Backend = "auto",
    threads: int | None = None,
    options: EngineOptions | None = None,
    precision: str = "fp32",
    key: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
) -> Detector:
    """The detector of a bundle folder, once the bundle's self-test gave the expected verdicts.

    The self-test is of the rule without a threshold, so it is run before ``alpha`` is applied; the engine is made
    once.  Raises BundleError when a verdict differs, and what Detector.load raises.
    """
    plain = Detector.load(
        path, engine=engine, scorer=scorer, threads=threads, options=options, precision=precision, key=key
    )
    check_verdicts(plain, plain.run(list(plain.bundle.self_test.frames)))
    if alpha is None:
        return plain
    return Detector(plain.bundle, engine=plain.engine, scorer=scorer, alpha=alpha)
