"""What a bundle holds, and what must be true of it beyond one guard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._layout import PRECISIONS
from inflight_edge._text import is_name
from inflight_edge.errors import BundleError, OptionError
from inflight_edge.guard import FloatArray, Guard, IntArray
from inflight_edge.preprocess import Preprocess
from inflight_edge.verdict import Decision

__all__ = ["DECISIONS", "Bundle", "SelfTest", "Variant", "dump_json"]

# The place in this tuple is the code on disk: append, never reorder.
DECISIONS = (Decision.ACCEPT, Decision.TRIGGER, Decision.UNGUARDED, Decision.INVALID)

MAX_FRAMES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class SelfTest:
    """n >= 1 frames and what the workstation made of them, for any device to compare itself with.

    frames           (n, H, W, channels) uint8, any size: preprocessing is part of the test.
    logits           (n, C) float32.  features: (n, D) float32.  Finite.
    log_likelihoods  one (n, R) float32 per guard, nats, from the float64 reference; no NaN.
    decisions        n values of Decision.  sources: (n,) int32 inferred class of a TRIGGER, else -1.

    Raises BundleError when these do not fit together.
    """

    frames: NDArray[np.uint8]
    logits: FloatArray
    features: FloatArray
    log_likelihoods: tuple[FloatArray, ...]
    decisions: tuple[str, ...]
    sources: IntArray

    def __post_init__(self) -> None:
        _check_array("frames", self.frames, np.uint8, 4)
        n_frames = self.frames.shape[0]
        if 0 in self.frames.shape:
            raise BundleError(
                f"self-test: frames: expected at least one frame and pixel, got shape {self.frames.shape}"
            )
        if n_frames > MAX_FRAMES:
            raise BundleError(f"self-test: frames: expected at most {MAX_FRAMES}, got {n_frames}; calibrate again")
        arrays = {"logits": self.logits, "features": self.features}
        arrays |= {f"log_likelihoods.{i}": array for i, array in enumerate(self.log_likelihoods)}
        for name, array in arrays.items():
            _check_array(name, array, np.float32, 2, n_frames)
            bad = ~np.isfinite(array) if name in ("logits", "features") else np.isnan(array)
            if bad.any():
                count = int(np.count_nonzero(bad))
                raise BundleError(f"self-test: {name}: expected numbers, got {count} NaN or infinite; calibrate again")
        _check_array("sources", self.sources, np.int32, 1, n_frames)
        if len(self.decisions) != n_frames or any(decision not in DECISIONS for decision in self.decisions):
            raise BundleError(
                f"self-test: decisions: expected {n_frames} of {[d.value for d in DECISIONS]}; calibrate again"
            )
        triggers = np.array([decision == Decision.TRIGGER for decision in self.decisions])
        if (self.sources < -1).any() or ((self.sources >= 0) != triggers).any():
            raise BundleError("self-test: sources: expected a class for each trigger and -1 elsewhere; calibrate again")
        self.frames.flags.writeable = self.sources.flags.writeable = False
        for array in arrays.values():
            array.flags.writeable = False


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """The classifier in another precision, with guards and self-test of its own features."""

    model: bytes
    guards: tuple[Guard, ...]
    self_test: SelfTest


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """Classifier, guards and self-test; of further precisions too, where calibrate made them.

    class_names    one per logit.           preprocess  frame to network input.
    feature_layer  name of the layer that the features come from.
    guards         at least one, one per target, all over the same D features.
    model          ONNX file with outputs ``logits`` (N, C) and ``features`` (N, D).
    metrics        calibration metrics and the report of the density choice: JSON values.
    versions       name and version of each tool that took part.
    precision      of model, guards and self_test: one of PRECISIONS.
    variants       the other precisions by name; they guard the same targets.

    Raises BundleError when these do not fit together; what a guard alone must be, Guard checks.
    """

    class_names: tuple[str, ...]
    preprocess: Preprocess
    feature_layer: str
    guards: tuple[Guard, ...]
    model: bytes
    self_test: SelfTest
    metrics: dict[str, Any]
    versions: dict[str, str]
    precision: str = "fp32"
    variants: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def n_features(self) -> int:
        """D, the length of a feature vector."""
        return self.guards[0].n_features

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that ``at`` gives, this one first."""
        return (self.precision, *(name for name in PRECISIONS if name in self.variants))

    def at(self, precision: str) -> Bundle:
        """The bundle of one precision alone.  Raises OptionError when it is not there."""
        if precision == self.precision:
            return replace(self, variants={})
        variant = self.variants.get(precision)
        if variant is None:
            held = ", ".join(self.precisions)
            raise OptionError(
                f"precision: this bundle has {held}, got {precision!r}; choose one of them or calibrate with --precision"
            )
        guards, test = variant.guards, variant.self_test
        return replace(self, model=variant.model, guards=guards, self_test=test, precision=precision, variants={})

    def __post_init__(self) -> None:
        for name in (*self.class_names, self.feature_layer):
            if not is_name(name):
                raise BundleError(f"class names, feature layer: expected printable text, got {name!r}; rename it")
        if not self.model:
            raise BundleError("model: expected an ONNX file, got no bytes; export it again")
        targets = [guard.target for guard in self.guards]
        if not targets or len(set(targets)) != len(targets):
            raise BundleError(
                f"guards: expected at least one and one per target, got targets {targets}; calibrate again"
            )
        n_classes, n_frames = len(self.class_names), self.self_test.frames.shape[0]
        expected = {"logits": (n_frames, n_classes), "features": (n_frames, self.n_features)}
        for name, shape in expected.items():
            if (got := getattr(self.self_test, name).shape) != shape:
                raise BundleError(f"self-test: {name}: expected shape {shape}, got {got}; calibrate again")
        rows = [(n_frames, len(guard.classes)) for guard in self.guards]
        if (shapes := [array.shape for array in self.self_test.log_likelihoods]) != rows:
            raise BundleError(f"self-test: log_likelihoods: expected shapes {rows}, got {shapes}; calibrate again")
        if (self.self_test.sources >= n_classes).any():
            raise BundleError(f"self-test: sources: expected classes below {n_classes}; calibrate again")
        for i, guard in enumerate(self.guards):
            if guard.n_features != self.n_features:
                raise BundleError(
                    f"guard {i}: expected {self.n_features} features, got {guard.n_features}; calibrate again"
                )
            if guard.classes[-1] >= n_classes:
                raise BundleError(
                    f"guard {i}: expected classes below {n_classes}, got {guard.classes[-1]}; calibrate again"
                )
        if not all(isinstance(text, str) for pair in self.versions.items() for text in pair):
            raise BundleError(f"versions: expected names and versions as strings, got {self.versions}")
        if dump_json(self.metrics) is None:
            raise BundleError(
                "metrics: expected an object of JSON values: str, int, finite float, bool, None, list, dict"
            )
        self._check_precisions(targets)

    def _check_precisions(self, targets: list[int]) -> None:
        """Each variant is a bundle of its own, and guards the same targets: none is left open by a choice of speed."""
        known = PRECISIONS if not self.variants else PRECISIONS[:1]
        if self.precision not in known or not set(self.variants) <= set(PRECISIONS[1:]):
            raise BundleError(
                f"precision: expected {known[0]} and any of {', '.join(PRECISIONS[1:])}, got {self.precision} and "
                f"{', '.join(map(str, self.variants)) or 'none'}; calibrate again"
            )
        for name, variant in self.variants.items():
            if (got := [guard.target for guard in variant.guards]) != targets:
                raise BundleError(f"guards of {name}: expected targets {targets}, got {got}; calibrate again")
            try:
                self.at(name)
            except BundleError as error:
                raise BundleError(f"{name}: {error}") from error


def _check_array(name: str, array: object, dtype: type[np.generic], ndim: int, n_frames: int | None = None) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim or not array.flags.c_contiguous:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        wanted = f"a C-contiguous {np.dtype(dtype)} array of {ndim} axes"
        raise BundleError(f"self-test: {name}: expected {wanted}, got {got}; calibrate again")
    if n_frames is not None and array.shape[0] != n_frames:
        raise BundleError(f"self-test: {name}: expected {n_frames} rows, got {array.shape[0]}; calibrate again")


def dump_json(value: dict[str, Any]) -> bytes | None:
    """JSON of an object, or None when it would not come back the same."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1, sort_keys=True)
        return (text + "\n").encode("utf-8") if json.loads(text) == value else None
    except (TypeError, ValueError, RecursionError):
        return None
