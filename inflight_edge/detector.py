"""Frame to verdict: preprocess, engine, scorer, decision.  Whatever goes wrong on a frame makes it INVALID."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from inflight_edge.bundle import Bundle, read_bundle
from inflight_edge.colour import Colour
from inflight_edge.engines import Engine, EngineOptions
from inflight_edge.engines.tensorrt import TensorRtEngine
from inflight_edge.errors import EngineError, InflightError, OptionError
from inflight_edge.guarantee import margin_limit
from inflight_edge.guard import Guard
from inflight_edge.runtime import ENGINES, make_engine
from inflight_edge.scoring import Backend, Scorer, available_backends, predictor
from inflight_edge.verdict import Decision, Verdict

__all__ = ["ENGINES", "Detector", "NoEngine", "make_engine"]

FloatArray = NDArray[np.float32]
_NO_ROWS = (np.empty(0, np.float32), np.empty(0, np.int32))


class Detector:
    """Judges frames with the classifier and the guards of a bundle; fails closed.

    bundle   with several precisions: the first one is used, or that of ``bundle.at(precision)``.
    engine   one of ENGINES, or an Engine made by the caller.
    scorer   backend of the scorers: ``auto``, ``cpu``, ``cuda``, ``triton`` or ``reference``.  Behind TensorRT ``cuda``
             judges on the GPU, in one launch with the classifier; ``auto`` does so where it can.
    threads  threads of the engine per call; None leaves the choice to the engine.
    options  what only one engine has, see EngineOptions.
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
        options: EngineOptions | None = None,
        log_likelihoods: bool = True,
        alpha: float | None = None,
    ) -> None:
        self.bundle = bundle
        self.class_names = bundle.class_names
        self.log_likelihoods = log_likelihoods
        self.predict = predictor()
        self._limits = {} if alpha is None else {guard.target: _limit(guard, alpha) for guard in bundle.guards}
        if isinstance(engine, str):
            judging = engine == "tensorrt" and (
                scorer == "cuda" or (scorer == "auto" and "cuda" in available_backends())
            )
            engine = make_engine(bundle, engine, threads=threads, options=options, judging=judging)
        if isinstance(engine, TensorRtEngine) and engine.guards and not _same(engine.guards, bundle.guards):
            raise OptionError("engine: expected one that was made with this bundle's guards, got others; make it anew")
        self.engine: Engine = engine
        self.judge_inputs: Callable[[FloatArray], list[Verdict]] | None = (
            engine.judge if isinstance(engine, TensorRtEngine) and engine.guards else None
        )
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
        options: EngineOptions | None = None,
        precision: str = "fp32",
        log_likelihoods: bool = True,
        alpha: float | None = None,
        key: str | os.PathLike[str] | None = None,
    ) -> Detector:
        """Detector from the bundle folder ``path``, signed by ``key`` if one is given.  Raises as read_bundle, too."""
        return cls(
            read_bundle(path, key=key).at(precision),
            engine=engine,
            scorer=scorer,
            threads=threads,
            options=options,
            log_likelihoods=log_likelihoods,
            alpha=alpha,
        )

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
            verdicts += self.judge(frames[start : start + batch_size])
        return verdicts

    def judge(
        self,
        frames: Sequence[NDArray[np.uint8]],
        colours: Sequence[Colour] | None = None,
        stages: Sequence[dict[str, int]] | None = None,
    ) -> list[Verdict]:
        """Verdicts on one batch, as ``run`` gives them.

        colours  what the bytes of each frame mean, rgb unless given.
        stages   a dictionary per frame, to be filled with nanoseconds: ``preprocess`` and ``guard`` of the frame,
                 ``engine`` of the batch.  A stage that a frame did not reach is left out.
        """
        clock = time.monotonic_ns
        inputs: dict[int, FloatArray] = {}
        verdicts: dict[int, Verdict] = {}
        for i, frame in enumerate(frames):
            start = clock()
            item = self._prepare(frame, colours[i] if colours else "rgb")
            if isinstance(item, Verdict):
                verdicts[i] = item
            else:
                inputs[i] = item
            if stages:
                stages[i]["preprocess"] = clock() - start
        if inputs:
            start = clock()
            try:
                batch = np.stack(list(inputs.values()))
                if self.judge_inputs is not None:
                    verdicts |= dict(zip(inputs, map(self.as_asked, self.judge_inputs(batch)), strict=True))
                    if stages:
                        for i in inputs:
                            stages[i]["engine"] = clock() - start  # the guard is inside
                    return [verdicts[i] for i in range(len(frames))]
                logits, features = self.engine.run(batch)
                for name, array in (("logits", logits), ("features", features)):
                    if array.ndim != 2 or array.shape[0] != len(inputs):
                        raise EngineError(f"{name}: expected {len(inputs)} rows, got shape {array.shape}")
                inferred = clock()
                for row, i in enumerate(inputs):
                    scoring = clock()
                    verdicts[i] = self.score(features[row], logits[row])
                    if stages:
                        stages[i] |= {"engine": inferred - start, "guard": clock() - scoring}
            except Exception as error:  # noqa: BLE001 - whatever an engine raises, no frame of its batch may pass
                reason = f"engine {getattr(self.engine, 'name', '')}: {_text(error)}"
                verdicts |= dict.fromkeys(inputs, _invalid(reason))
        return [verdicts[i] for i in range(len(frames))]

    def _prepare(self, frame: NDArray[np.uint8], colour: Colour) -> FloatArray | Verdict:
        """Network input of a frame, or the INVALID verdict when it has none."""
        try:
            return self.bundle.preprocess(frame, colour)
        except (InflightError, MemoryError) as error:
            return _invalid(_text(error))

    def as_asked(self, verdict: Verdict) -> Verdict:
        """A verdict with its log-likelihoods, by the limit and with what was asked for."""
        if verdict.decision in (Decision.ACCEPT, Decision.TRIGGER) and verdict.predicted is not None:
            guard = self.guards[verdict.predicted].guard
            if self._limits:
                limit = self._limits[verdict.predicted]
                decision, source = _by_limit(guard, verdict.log_likelihoods, verdict.margin, limit)
                verdict = replace(verdict, decision=decision, source=None if source < 0 else source)
            if not self.log_likelihoods:
                verdict = replace(verdict, log_likelihoods=_NO_ROWS[0], classes=_NO_ROWS[1])
        return verdict

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
            return self.judge_features(predicted, scorer, vector)
        except InflightError as error:
            problem = _problem("features", features, self.bundle.n_features)
            return _invalid(problem or f"scorer {scorer.backend}: {error}", predicted)

    def judge_features(self, predicted: int, scorer: Scorer, features: FloatArray) -> Verdict:
        """Verdict of the guard of class ``predicted`` on (D,) float32 C-contiguous features.  Raises ScoreError."""
        verdict = scorer.verdict(features, log_likelihoods=self.log_likelihoods or bool(self._limits))
        if verdict.decision is Decision.INVALID:
            return _invalid(_problem("features", features, self.bundle.n_features) or verdict.reason, predicted)
        return self.as_asked(verdict) if self._limits else verdict


class NoEngine:
    """Stands where no frame is classified: only logits and features are judged."""

    name = "none"

    def run(self, batch: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Always raises EngineError."""
        raise EngineError("this detector was made without an engine; give it logits and features")


def _limit(guard: Guard, alpha: float) -> float:
    try:
        return margin_limit(guard.clean_margins, alpha)
    except OptionError as error:
        raise OptionError(f"guard of class {guard.target}: {error}") from None


def _by_limit(guard: Guard, scores: FloatArray, margin: float, limit: float) -> tuple[Decision, int]:
    """Decision and source (-1 for none) when a trigger is a margin above the limit.  scores: (R,) nats."""
    if margin <= limit:
        return Decision.ACCEPT, -1
    others = scores.copy()
    others[guard.target_row] = -np.inf
    return Decision.TRIGGER, int(guard.classes[np.argmax(others)])


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


def _same(some: Sequence[Guard], others: Sequence[Guard]) -> bool:
    """Whether these are the same guards, in their order."""
    if len(some) != len(others):
        return False
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for one, other in zip(some, others, strict=True)
        if one is not other
        for field in fields(one)
    )
