"""A bundle from the bytes of its files: every one checked before it is used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from inflight_edge._contents import DECISIONS, Bundle, SelfTest, Variant
from inflight_edge._layout import (
    FORMAT,
    FORMAT_VERSION,
    GUARD_TENSORS,
    MANIFEST,
    MAX_FILE_BYTES,
    MAX_MANIFEST_BYTES,
    PRECISIONS,
    names_of,
    payload,
)
from inflight_edge._strict import (
    REMEDY,
    brief,
    expect_integer,
    expect_list,
    expect_number,
    expect_object,
    expect_text,
    parse_json,
    parse_tensors,
)
from inflight_edge.errors import BundleError, GuardError, OptionError
from inflight_edge.guard import Guard, Kind
from inflight_edge.preprocess import Preprocess

__all__ = ["decode"]

_KEYS = (
    "format",
    "format_version",
    "class_names",
    "preprocess",
    "feature_layer",
    "guards",
    "files",
    "metrics",
    "versions",
)


def decode(read: Callable[[str, int], bytes], path: Path) -> Bundle:
    """Bundle from ``read(name, limit)``, which gives the bytes of a file."""
    where = str(path / MANIFEST)
    manifest = expect_object(parse_json(read(MANIFEST, MAX_MANIFEST_BYTES), where), None, where)
    if manifest.get("format") != FORMAT:
        raise BundleError(
            f"{where}: expected format {FORMAT!r}, got {brief(manifest.get('format'))}; is this a bundle?"
        )
    version = expect_integer(manifest.get("format_version"), f"{where}: format_version")
    if version not in (1, FORMAT_VERSION):
        raise BundleError(
            f"{where}: expected format_version 1 or {FORMAT_VERSION}, got {str(version)[:20]}; "
            "update inflight-edge or calibrate again"
        )
    expect_object(manifest, _KEYS if version == 1 else (*_KEYS, "precisions"), where)
    guards = {PRECISIONS[0]: manifest["guards"]} | _further_guards(manifest.get("precisions"), where)
    names = payload(guards)
    entries = expect_object(manifest["files"], names, f"{where}: files")
    files = {name: _read_payload(read, path / name, entries[name], where) for name in names}
    try:
        variants = {precision: _decode_variant(files, precision, guards[precision], path) for precision in guards}
        first = variants.pop(PRECISIONS[0])
        return Bundle(
            class_names=_texts(manifest["class_names"], f"{where}: class_names"),
            preprocess=_decode_preprocess(manifest["preprocess"], f"{where}: preprocess"),
            feature_layer=expect_text(manifest["feature_layer"], f"{where}: feature_layer"),
            guards=first.guards,
            model=first.model,
            self_test=first.self_test,
            metrics=expect_object(manifest["metrics"], None, f"{where}: metrics"),
            versions=expect_object(manifest["versions"], None, f"{where}: versions"),
            variants=variants,
        )
    except BundleError as error:
        if str(error).startswith(str(path)):
            raise
        raise BundleError(f"{path}: {error}") from error  # the parts do not know the folder they came from
    except OptionError as error:
        raise BundleError(f"{where}: preprocess: {error}") from error


def _further_guards(value: Any, where: str) -> dict[str, Any]:
    """Descriptions of the guards of each further precision; none in format 1."""
    if value is None:
        return {}
    where = f"{where}: precisions"
    entries = expect_object(value, None, where)
    if not entries or (unknown := sorted(set(entries) - set(PRECISIONS[1:]))):
        got = unknown[0] if entries else "none"
        raise BundleError(f"{where}: expected any of {', '.join(PRECISIONS[1:])}, got {brief(got)}; {REMEDY}")
    return {
        name: expect_object(entries[name], ("guards",), f"{where}: {name}")["guards"]
        for name in PRECISIONS
        if name in entries
    }


def _decode_variant(files: dict[str, bytes], precision: str, entries: Any, path: Path) -> Variant:
    """Model, guards and self-test of one precision."""
    detector, model, self_test = names_of(precision)
    guards = _decode_guards(files[detector], entries, path / detector, path / MANIFEST)
    test = _decode_self_test(files[self_test], len(guards), str(path / self_test))
    return Variant(files[model], guards, test)


def _read_payload(read: Callable[[str, int], bytes], path: Path, entry: Any, where: str) -> bytes:
    """Bytes of one file, of the size and hash that its manifest entry promises."""
    entry = expect_object(entry, ("bytes", "sha256"), f"{where}: files: {path.name}")
    size = expect_integer(entry["bytes"], f"{where}: files: {path.name}: bytes")
    expected = expect_text(entry["sha256"], f"{where}: files: {path.name}: sha256")
    if not 0 <= size <= MAX_FILE_BYTES:
        raise BundleError(f"{where}: files: {path.name}: expected 0 to {MAX_FILE_BYTES} bytes, got {size}; {REMEDY}")
    if not re.fullmatch("[0-9a-f]{64}", expected):
        raise BundleError(
            f"{where}: files: {path.name}: expected 64 lower-case hex digits, got {brief(expected)}; {REMEDY}"
        )
    data = read(path.name, size)
    if len(data) != size:
        raise BundleError(f"{path}: expected {size} bytes, got {len(data)}: it is cut short; {REMEDY}")
    if (got := hashlib.sha256(data).hexdigest()) != expected:
        raise BundleError(f"{path}: expected SHA-256 {expected}, got {got}; {REMEDY}")
    return data


def _decode_guards(data: bytes, entries: Any, path: Path, manifest: Path) -> tuple[Guard, ...]:
    where = f"{manifest}: guards"
    described = [expect_object(entry, ("target", "kind"), where) for entry in expect_list(entries, where)]
    names = {f"guards.{i}.{name}": dtype for i in range(len(described)) for name, dtype in GUARD_TENSORS.items()}
    tensors = parse_tensors(data, names, str(path))
    guards = []
    for i, entry in enumerate(described):
        target = expect_integer(entry["target"], f"{where}: target")
        kind = cast(Kind, expect_text(entry["kind"], f"{where}: kind"))  # Guard refuses other kinds
        try:
            guards.append(Guard(target, kind, **{name: tensors[f"guards.{i}.{name}"] for name in GUARD_TENSORS}))
        except GuardError as error:
            raise BundleError(f"{path}: guard {i}: {error}; {REMEDY}") from error
    return tuple(guards)


def _decode_self_test(data: bytes, n_guards: int, where: str) -> SelfTest:
    rows = [f"log_likelihoods.{i}" for i in range(n_guards)]
    names: dict[str, type[np.generic]] = {"frames": np.uint8, "logits": np.float32, "features": np.float32}
    names |= dict.fromkeys(rows, np.float32) | {"decisions": np.uint8, "sources": np.int32}
    tensors = parse_tensors(data, names, where)
    codes = tensors["decisions"]
    if codes.ndim != 1 or (codes >= len(DECISIONS)).any():
        raise BundleError(f"{where}: decisions: expected codes below {len(DECISIONS)} along one axis; {REMEDY}")
    decisions = tuple(DECISIONS[code].value for code in codes)
    log_likelihoods = tuple(tensors[name] for name in rows)
    try:
        return SelfTest(
            tensors["frames"], tensors["logits"], tensors["features"], log_likelihoods, decisions, tensors["sources"]
        )
    except BundleError as error:
        raise BundleError(f"{where}: {error}") from error


def _decode_preprocess(value: Any, where: str) -> Preprocess:
    entry = expect_object(value, ("input_shape", "scale", "mean", "std"), where)
    sizes = [expect_integer(size, f"{where}: input_shape") for size in expect_list(entry["input_shape"], where)]
    if len(sizes) != 3:
        raise BundleError(f"{where}: input_shape: expected channels, height, width, got {brief(sizes)}; {REMEDY}")
    mean, std = (tuple(expect_number(v, where) for v in expect_list(entry[name], where)) for name in ("mean", "std"))
    return Preprocess((sizes[0], sizes[1], sizes[2]), expect_number(entry["scale"], f"{where}: scale"), mean, std)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    return tuple(expect_text(text, where) for text in expect_list(value, where))
