"""Names of a bundle's files."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["MANIFEST", "OPTIONAL", "PRECISIONS", "REQUIRED", "SIGNATURE", "names_of", "payload"]

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
