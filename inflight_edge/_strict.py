"""Strict readers of JSON and safetensors: what is ambiguous or unknown is refused, not guessed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._optional import require
from inflight_edge.errors import BundleError

__all__ = [
    "MAX_HEADER_BYTES",
    "REMEDY",
    "brief",
    "dump_tensors",
    "expect_integer",
    "expect_list",
    "expect_number",
    "expect_object",
    "expect_text",
    "parse_json",
    "parse_tensors",
]

MAX_HEADER_BYTES = 1 << 20
REMEDY = "copy the bundle again or calibrate again"
_DTYPES = {"F32": np.float32, "I32": np.int32, "U8": np.uint8}


def parse_json(data: bytes, where: str) -> Any:
    """Value of a JSON text in UTF-8.  Duplicate keys, NaN, infinities and lone surrogates raise BundleError."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # UnicodeError and JSONDecodeError are ValueErrors
        raise BundleError(f"{where}: expected plain JSON, got {str(error)[:200]}; {REMEDY}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {str(key)[:80]!r} twice")
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} for a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} for a number: it does not fit a float")
    return value


def expect_object(value: Any, keys: Collection[str] | None, where: str) -> dict[str, Any]:
    """``value`` as an object with exactly ``keys``, or with any when None.  Raises BundleError."""
    if not isinstance(value, dict):
        raise BundleError(f"{where}: expected an object, got {brief(value)}; {REMEDY}")
    if keys is None:
        return value
    if missing := [key for key in keys if key not in value]:
        raise BundleError(f"{where}: expected the key {missing[0]!r}, got none; {REMEDY}")
    if unknown := [key for key in value if key not in keys]:
        known = ", ".join(keys) if len(keys) < 10 else f"{len(keys)} known keys"
        raise BundleError(f"{where}: expected {known}, got {brief(unknown[0])} too; {REMEDY}")
    return value


def expect_list(value: Any, where: str) -> list[Any]:
    """``value`` as a list.  Raises BundleError."""
    if not isinstance(value, list):
        raise BundleError(f"{where}: expected a list, got {brief(value)}; {REMEDY}")
    return value


def expect_text(value: Any, where: str) -> str:
    """``value`` as a string.  Raises BundleError."""
    if not isinstance(value, str):
        raise BundleError(f"{where}: expected a string, got {brief(value)}; {REMEDY}")
    return value


def expect_integer(value: Any, where: str) -> int:
    """``value`` as an integer (a boolean is none).  Raises BundleError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise BundleError(f"{where}: expected an integer, got {brief(value)}; {REMEDY}")
    return value


def expect_number(value: Any, where: str) -> float:
    """``value`` as a float (a boolean is none).  Raises BundleError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BundleError(f"{where}: expected a number, got {brief(value)}; {REMEDY}")
    try:
        return float(value)
    except OverflowError as error:
        raise BundleError(f"{where}: expected a number that fits a float, got a larger one; {REMEDY}") from error


def brief(value: Any) -> str:
    """Type and value, cut to a readable length and without control characters."""
    return f"{type(value).__name__} {value!r}"[:80]


def parse_tensors(data: bytes, names: dict[str, type[np.generic]], where: str) -> dict[str, NDArray[Any]]:
    """Tensors of a safetensors file that must hold exactly ``names``, each of the given dtype.

    The header is read strictly first (its size, names, duplicates and dtypes), then safetensors, which checks the
    offsets, gives the arrays.  They are little-endian on disk and native in memory.  Raises BundleError.
    """
    safetensors = require("safetensors", "pip install safetensors")
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise BundleError(f"{where}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {size}; {REMEDY}")
    if len(data) < 8 + size:
        raise BundleError(f"{where}: expected {8 + size} bytes or more, got {len(data)}; {REMEDY}")
    header = expect_object(parse_json(data[8 : 8 + size], f"{where}: header"), names, f"{where}: header")
    for name, dtype in names.items():
        got = expect_object(header[name], ("dtype", "shape", "data_offsets"), f"{where}: {name}")["dtype"]
        if not isinstance(got, str) or _DTYPES.get(got) is not dtype:
            raise BundleError(f"{where}: {name}: expected dtype {np.dtype(dtype)}, got {brief(got)}; {REMEDY}")
    try:
        return dict(require("safetensors.numpy", "pip install safetensors").load(data))
    except (safetensors.SafetensorError, ValueError) as error:  # ValueError: a shape too large for NumPy
        raise BundleError(f"{where}: expected a safetensors file, got {error}; {REMEDY}") from error


def dump_tensors(tensors: dict[str, NDArray[Any]]) -> bytes:
    """Safetensors file of C-contiguous arrays; the same arrays always give the same bytes."""
    data = require("safetensors.numpy", "pip install safetensors").save(tensors)
    return bytes(data)
