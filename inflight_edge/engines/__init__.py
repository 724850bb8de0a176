"""Inference engines: one protocol, one module per engine, imported on demand."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from inflight_edge.errors import OptionError

__all__ = ["MAX_THREADS", "Engine", "EngineOptions", "Optimisation", "Wait", "check_threads"]

Optimisation = Literal["all", "extended", "basic", "off"]
Wait = Literal["blocking", "spin"]
MAX_THREADS = 1024
_BELONGS_TO = {
    "arena": "onnxruntime",
    "optimisation": "onnxruntime",
    "memory": "tensorrt",
    "wait": "tensorrt",
    "graph": "tensorrt",
    "plan": "tensorrt",
}


class Engine(Protocol):
    """A classifier that also returns its features.

    name  short name such as ``onnxruntime``.
    """

    name: str

    def run(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits (N, classes) float32 and features (N, D) float32 of a batch (N, channels, height, width) float32.

        Any N >= 1 is accepted.  Raises EngineError when the engine fails or the batch does not fit.
        """


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What only one engine has; the defaults are right nearly always.

    onnxruntime:
    arena         keeps the memory of one call for the next: faster, larger.
    optimisation  of the graph: ``all``, ``extended``, ``basic`` or ``off``.

    tensorrt:
    memory  of inputs and outputs: ``mapped``, ``copied`` or ``auto``, see scoring.device.Device.
    wait    ``blocking`` gives the processor away while the GPU works, ``spin`` keeps it and answers sooner.
    graph   one CUDA graph for a frame's work; False enqueues it piece by piece.
    plan    file that `compile` wrote with --out; None takes the one among the plans of this user.
    """

    arena: bool = True
    optimisation: Optimisation = "all"
    memory: Literal["auto", "mapped", "copied"] = "auto"
    wait: Wait = "blocking"
    graph: bool = True
    plan: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        choices = {
            "optimisation": get_args(Optimisation),
            "memory": ("auto", "mapped", "copied"),
            "wait": get_args(Wait),
        }
        for name, allowed in choices.items():
            if (got := getattr(self, name)) not in allowed:
                raise OptionError(f"{name}: expected one of {', '.join(allowed)}, got {got!r}")

    def check(self, engine: str) -> None:
        """Raise OptionError when an option was set that another engine has."""
        for field in fields(self):
            owner = _BELONGS_TO[field.name]
            if owner != engine and getattr(self, field.name) != field.default:
                raise OptionError(f"{field.name}: only {owner} has this option, got it for {engine}; leave it out")


def check_threads(threads: object) -> None:
    """Raise OptionError for a number of threads that is none."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise OptionError(f"threads: expected an integer of at least 1 or None, got {threads!r}")
    if threads is not None and threads > MAX_THREADS:
        raise OptionError(f"threads: expected at most {MAX_THREADS}, got {threads}")
