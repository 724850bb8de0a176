"""Frame to verdict: preprocess, engine, scorer, decision.  Whatever goes wrong on a frame makes it INVALID."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from inflight_edge.bundle import Bundle, read_bundle
from inflight_edge.engines import Engine
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.errors import BundleError, EngineError, InflightError, OptionError
from inflight_edge.guarantee import margin_limit
from inflight_edge.guard import Guard
from inflight_edge.scoring import Backend, Scorer, predictor
from inflight_edge.verdict import Decision, Verdict

__all__ = ["ENGINES", "Detector", "make_engine"]

FloatArray = NDArray[np.float32]
ENGINES = ("onnxruntime",)
_NO_ROWS = (np.empty(0, np.float32), np.empty(0, np.int32))


class Detector:
    """Judges frames with the classifier and the guards of a bundle; fails closed.

    engine   ``onnxruntime``, or an Engine made by the caller.
    scorer   backend of the scorers: ``auto``, ``cpu`` or ``reference``.
    threads  threads of the engine per call; None leaves the choice to the engine.
    log_likelihoods  False leaves them out of the verdicts: with many classes the verdict itself reads far less.
    alpha    None: the rule without a threshold, see verdict.decide.  Else a frame is a trigger when its margin exceeds
             those of clean frames, with a false-alarm rate of at most alpha, see guarantee.margin_limit.

    bundle, engine, class_names; guards: Scorer by target class.
    Raises OptionError, EngineError, DependencyError, and BundleError for a model that does not fit the bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        engine: str | Engine = "onnxruntime",
        scorer: Backend = "auto",
        threads: int | None = None,
        log_likelihoods: bool = True,
        alpha: float | None = None,
    ) -> None:
        self.bundle = bundle
        self.class_names = bundle.class_names
        self.log_likelihoods = log_likelihoods
        self.predict = predictor()
        self._limits = {} if alpha is None else {guard.target: _limit(guard, alpha) for guard in bundle.guards}
        self.engine: Engine = make_engine(bundle, engine, threads=threads) if isinstance(engine, str) else engine
        self.guards: Mapping[int, Scorer] = MappingProxyType(
            {guard.target: Scorer(guard, backend=scorer) for guard in bundle.guards}
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        engine: str = "onnxruntime",
        scorer: Backend = "auto",
        threads: int | None = None,
        log_likelihoods: bool = True,
        alpha: float | None = None,
    ) -> Detector:
        """Detector from the bundle folder ``path``.  Raises BundleError too, see read_bundle."""
        bundle = read_bundle(path)
        return cls(bundle, engine=engine, scorer=scorer, threads=threads, log_likelihoods=log_likelihoods, alpha=alpha)

    def __call__(self, frame: NDArray[np.uint8]) -> Verdict:
        """Verdict on one frame: (H, W) or (H, W, channels) uint8, see Preprocess.  INVALID instead of an exception."""
        return self.run([frame])[0]

    def run(self, frames: Iterable[NDArray[np.uint8]], *, batch_size: int = 64) -> list[Verdict]:
        """Verdicts on frames, which may differ in size; the engine gets up to ``batch_size`` of them at a time.

        A frame that cannot be preprocessed is INVALID alone; an engine failure makes its whole batch INVALID.
        Raises OptionError for a batch size below 1.
        """
        if batch_size < 1:
            raise OptionError(f"batch size: expected at least 1, got {batch_size}")
        frames = list(frames)
        verdicts: list[Verdict] = []
        for start in range(0, len(frames), batch_size):
            verdicts += self._run_batch(frames[start : start + batch_size])
        return verdicts

    def _run_batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Verdict]:
        prepared = [self._prepare(frame) for frame in frames]
        inputs = {i: item for i, item in enumerate(prepared) if not isinstance(item, Verdict)}
        verdicts = {i: item for i, item in enumerate(prepared) if isinstance(item, Verdict)}
        if inputs:
            try:
                logits, features = self.engine.run(np.stack(list(inputs.values())))
                for name, array in (("logits", logits), ("features", features)):
                    if array.ndim != 2 or array.shape[0] != len(inputs):
                        raise EngineError(f"{name}: expected {len(inputs)} rows, got shape {array.shape}")
                verdicts |= {i: self.score(features[row], logits[row]) for row, i in enumerate(inputs)}
            except Exception as error:  # noqa: BLE001 - whatever an engine raises, no frame of its batch may pass
                reason = f"engine {getattr(self.engine, 'name', '')}: {_text(error)}"
                verdicts |= dict.fromkeys(inputs, _invalid(reason))
        return [verdicts[i] for i in range(len(frames))]

    def _prepare(self, frame: NDArray[np.uint8]) -> FloatArray | Verdict:
        """Network input of a frame, or the INVALID verdict when it has none."""
        try:
            return self.bundle.preprocess(frame)
        except (InflightError, MemoryError) as error:
            return _invalid(_text(error))

    def score(self, features: FloatArray, logits: FloatArray) -> Verdict:
        """Verdict from what an engine returned.  features: (D,) float32.  logits: (C,) float32.

        The prediction is the largest logit, the lowest index among equals.  INVALID instead of an exception.
        """
        predicted = self.predict(logits, len(self.class_names))
        if predicted < 0:
            if problem := _problem("logits", logits, len(self.class_names)):
                return _invalid(problem)
            predicted = int(np.argmax(logits))  # not contiguous
        scorer = self.guards.get(predicted)
        if scorer is None:
            problem = _problem("features", features, self.bundle.n_features)
            return _invalid(problem, predicted) if problem else Verdict(Decision.UNGUARDED, predicted)
        try:
            vector = np.ascontiguousarray(features)
            return self.judge(predicted, scorer, vector)
        except InflightError as error:
            problem = _problem("features", features, self.bundle.n_features)
            return _invalid(problem or f"scorer {scorer.backend}: {error}", predicted)

    def judge(self, predicted: int, scorer: Scorer, features: FloatArray) -> Verdict:
        """Verdict of the guard of class ``predicted`` on (D,) float32 C-contiguous features.  Raises ScoreError."""
        rows, classes = _NO_ROWS
        if self.log_likelihoods:
            decision, source, margin, rows = scorer.explain(features)
            classes = scorer.guard.classes
        else:
            decision, source, margin = scorer.judge(features)
        if decision is Decision.INVALID:
            problem = _problem("features", features, self.bundle.n_features)
            return _invalid(
                problem or "no class explains the features: a log-likelihood is NaN or all are -inf", predicted
            )
        if self._limits:
            decision, source = _by_limit(scorer, features, margin, self._limits[predicted])
        return Verdict(decision, predicted, None if source < 0 else source, margin, rows, classes)


def make_engine(bundle: Bundle, name: str, *, threads: int | None = None) -> Engine:
    """Engine ``name`` for the model of a bundle.

    Raises OptionError for an unknown name, DependencyError, EngineError, and BundleError where the model's
    declared shapes contradict the bundle.
    """
    if name not in ENGINES:
        raise OptionError(f"engine: expected one of {', '.join(ENGINES)}, got {name!r}")
    engine = OnnxRuntimeEngine(bundle.model, threads=threads)
    declared = {
        "logits": (engine.n_classes, len(bundle.class_names)),
        "features": (engine.n_features, bundle.n_features),
        **{
            f"input {axis}": sizes
            for axis, *sizes in zip(
                ("channels", "height", "width"), engine.input_shape, bundle.preprocess.input_shape, strict=True
            )
        },
    }
    for what, (got, expected) in declared.items():
        if got is not None and got != expected:
            raise BundleError(f"model.onnx: {what}: expected {expected} as in the bundle, got {got}; calibrate again")
    return engine


def _limit(guard: Guard, alpha: float) -> float:
    try:
        return margin_limit(guard.clean_margins, alpha)
    except OptionError as error:
        raise OptionError(f"guard of class {guard.target}: {error}") from None


def _by_limit(scorer: Scorer, features: FloatArray, margin: float, limit: float) -> tuple[Decision, int]:
    """Decision and source (-1 for none) when a trigger is a margin above the limit."""
    if margin <= limit:
        return Decision.ACCEPT, -1
    others = scorer.score(features)
    others[scorer.guard.target_row] = -np.inf
    return Decision.TRIGGER, int(scorer.guard.classes[np.argmax(others)])


def _problem(name: str, array: object, length: int) -> str:
    """Why ``array`` is not a finite (length,) float32 vector, or ""."""
    if not isinstance(array, np.ndarray):
        return f"{name}: expected a float32 array ({length},), got {type(array).__name__}"
    if array.dtype != np.float32 or array.shape != (length,):
        return f"{name}: expected a float32 array ({length},), got {array.dtype} {array.shape}"
    finite = np.isfinite(array)
    if not finite.all():
        return f"{name}: expected finite numbers, got {int(np.count_nonzero(~finite))} NaN or infinite of {length}"
    return ""


def _text(error: Exception) -> str:
    """An error's message, behind its type where it is none of this package's."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, InflightError) else f"{type(error).__name__}: {text}"


def _invalid(reason: str, predicted: int | None = None) -> Verdict:
    return Verdict(Decision.INVALID, predicted, reason=reason)
