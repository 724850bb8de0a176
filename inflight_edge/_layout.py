"""What a bundle's files are called and hold, and how large they may be."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "GUARD_TENSORS",
    "MANIFEST",
    "MAX_FILE_BYTES",
    "MAX_MANIFEST_BYTES",
    "OPTIONAL",
    "PRECISIONS",
    "REQUIRED",
    "SIGNATURE",
    "names_of",
    "payload",
]

FORMAT = "inflight-edge-bundle"
FORMAT_VERSION = 2  # with more than one precision; else 1 is written, which older readers know
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = (1 << 31) - 1  # protocol buffers, hence ONNX, end there

# Of the classifier's arithmetic; the first one is in every bundle.
PRECISIONS = ("fp32", "fp16", "int8")
MANIFEST = "bundle.json"


def names_of(precision: str) -> tuple[str, str, str]:
    """File names of a precision's guards, model and self-test."""
    infix = "" if precision == PRECISIONS[0] else f".{precision}"
    return f"detector{infix}.safetensors", f"model{infix}.onnx", f"selftest{infix}.safetensors"


def payload(precisions: Iterable[str]) -> tuple[str, ...]:
    """Names of all files but the manifest."""
    return tuple(name for precision in precisions for name in names_of(precision))


REQUIRED = frozenset((MANIFEST, *names_of(PRECISIONS[0])))
SIGNATURE = "bundle.sig"
OPTIONAL = frozenset((*payload(PRECISIONS[1:]), SIGNATURE))

# Of each guard, by the names of its attributes.
GUARD_TENSORS: dict[str, type[np.generic]] = {
    "classes": np.int32,
    "offsets": np.int32,
    "mean": np.float32,
    "scale": np.float32,
    "means": np.float32,
    "log_weights": np.float32,
    "whitener": np.float32,
    "clean_margins": np.float32,
}
