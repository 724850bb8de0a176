"""In-flight detection of backdoor triggers: a verdict per frame, on top of the classifier.

    detector = Detector.load("bundle")
    verdict = detector(frame)           # (H, W, channels) uint8
    if not verdict.passes: ...

Needs NumPy alone to import; reading a bundle needs safetensors, running its classifier an engine.
Workstation side: ``inflight_edge.calibration``.
"""

from importlib.metadata import version

from inflight_edge.bundle import Bundle, SelfTest, read_bundle, sign_bundle, write_bundle
from inflight_edge.detector import Detector
from inflight_edge.engines import Engine
from inflight_edge.errors import (
    BundleError,
    DataError,
    DependencyError,
    EngineError,
    GuardError,
    InflightError,
    ModelError,
    OptionError,
    ScoreError,
    SinkError,
    SourceError,
)
from inflight_edge.events import Frame, Outcome
from inflight_edge.guard import Guard
from inflight_edge.pipeline import Pipeline
from inflight_edge.preprocess import Preprocess
from inflight_edge.scoring import Scorer
from inflight_edge.verdict import Decision, Verdict, decide

__all__ = [
    "Bundle",
    "BundleError",
    "DataError",
    "Decision",
    "DependencyError",
    "Detector",
    "Engine",
    "EngineError",
    "Frame",
    "Guard",
    "GuardError",
    "InflightError",
    "ModelError",
    "OptionError",
    "Outcome",
    "Pipeline",
    "Preprocess",
    "ScoreError",
    "Scorer",
    "SelfTest",
    "SinkError",
    "SourceError",
    "Verdict",
    "decide",
    "read_bundle",
    "sign_bundle",
    "write_bundle",
]

__version__ = version("inflight-edge")
