"""The bundle: all that crosses from the workstation to the device, as one folder of a few files.

``bundle.json`` describes the classifier and holds the SHA-256 and size of the others: ``detector.safetensors``
(guards), ``model.onnx`` (outputs ``logits`` and ``features``) and ``selftest.safetensors`` (expected outputs); and the
same three for each further precision, ``model.fp16.onnx`` and so on.  ``bundle.sig`` is the owner's signature of it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from inflight_edge._contents import DECISIONS, Bundle, SelfTest, Variant, dump_json
from inflight_edge._files import open_folder, read_regular, replace_file, write_folder
from inflight_edge._layout import MANIFEST, OPTIONAL, PRECISIONS, REQUIRED, SIGNATURE, names_of, payload
from inflight_edge._strict import (
    REMEDY,
    brief,
    dump_tensors,
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
from inflight_edge.signing import SIGNATURE_BYTES, check_signature, read_public_key, sign_manifest
from inflight_edge.verdict import Decision

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "PRECISIONS",
    "Bundle",
    "SelfTest",
    "Variant",
    "read_bundle",
    "sign_bundle",
    "write_bundle",
]

FORMAT = "inflight-edge-bundle"
FORMAT_VERSION = 2  # with more than one precision; else 1 is written, which older readers know
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = (1 << 31) - 1  # protocol buffers, hence ONNX, end there

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
_GUARD_TENSORS: dict[str, type[np.generic]] = {
    "classes": np.int32,
    "offsets": np.int32,
    "mean": np.float32,
    "scale": np.float32,
    "means": np.float32,
    "log_weights": np.float32,
    "whitener": np.float32,
    "clean_margins": np.float32,
}


def write_bundle(bundle: Bundle, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the folder ``path`` in one step, after proof that it reads back; equal bundles give equal bytes.

    An existing path is an error; with ``overwrite`` a bundle there is replaced, and kept when writing fails.  The
    new one is unsigned, see sign_bundle.  Raises BundleError.
    """
    if bundle.precision != PRECISIONS[0]:
        raise BundleError(
            f"{path}: expected a bundle with {PRECISIONS[0]}, got {bundle.precision} alone; write the whole"
        )
    files: dict[str, bytes] = {}
    for precision in bundle.precisions:
        files |= _encode(bundle.at(precision))
    constants = bundle.preprocess
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": 2 if bundle.variants else 1,
        "class_names": list(bundle.class_names),
        "preprocess": {
            "input_shape": list(constants.input_shape),
            "scale": constants.scale,
            "mean": list(constants.mean),
            "std": list(constants.std),
        },
        "feature_layer": bundle.feature_layer,
        "guards": _describe(bundle.guards),
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
        "metrics": bundle.metrics,
        "versions": bundle.versions,
    }
    if bundle.variants:
        manifest["precisions"] = {name: {"guards": _describe(v.guards)} for name, v in bundle.variants.items()}
    if (text := dump_json(manifest)) is None:
        raise BundleError(f"{path}: expected plain numbers in the preprocessing, got {constants}; use int and float")
    files[MANIFEST] = text
    if (size := max(map(len, files.values()))) > MAX_FILE_BYTES or len(text) > MAX_MANIFEST_BYTES:
        limits = f"{MAX_FILE_BYTES} bytes a file, {MAX_MANIFEST_BYTES} for {MANIFEST}"
        raise BundleError(
            f"{path}: expected at most {limits}, got {size}, {len(text)}; use a smaller density or report"
        )
    _decode(lambda name, _: files[name], Path(path))
    write_folder(Path(path), files, overwrite=overwrite, optional=OPTIONAL)


def _encode(bundle: Bundle) -> dict[str, bytes]:
    """The three files of a bundle's own precision."""
    detector: dict[str, NDArray[Any]] = {}
    for i, guard in enumerate(bundle.guards):
        detector |= {f"guards.{i}.{name}": getattr(guard, name) for name in _GUARD_TENSORS}
    test = bundle.self_test
    codes = np.array([DECISIONS.index(Decision(decision)) for decision in test.decisions], np.uint8)
    self_test: dict[str, NDArray[Any]] = {"frames": test.frames, "logits": test.logits, "features": test.features}
    self_test |= {f"log_likelihoods.{i}": array for i, array in enumerate(test.log_likelihoods)}
    self_test |= {"decisions": codes, "sources": test.sources}
    contents = dump_tensors(detector), bundle.model, dump_tensors(self_test)
    return dict(zip(names_of(bundle.precision), contents, strict=True))


def _describe(guards: tuple[Guard, ...]) -> list[dict[str, Any]]:
    return [{"target": guard.target, "kind": guard.kind} for guard in guards]


def read_bundle(path: str | os.PathLike[str], *, key: str | os.PathLike[str] | None = None) -> Bundle:
    """Read the folder ``path``: each file once, and what is checked is what is used.

    key: file of the owner's public key; a bundle that this key did not sign is refused before anything of it is parsed.
    Without one a signature is not checked.
    Raises BundleError for anything that is damaged, unknown, inconsistent or not signed by ``key``; nothing of it is
    used then.  Raises OptionError for a key that is none, DependencyError when its library is missing.
    """
    public = None if key is None else read_public_key(key)
    folder_path = Path(path)
    with open_folder(folder_path, REQUIRED, OPTIONAL) as (folder, found):
        signature = _read_signature(folder, folder_path) if SIGNATURE in found else None

        def read(name: str, limit: int) -> bytes:
            data = read_regular(folder, folder_path / name, limit)
            if name == MANIFEST and public is not None:
                check_signature(data, signature, public, folder_path)
            return data

        bundle = _decode(read, folder_path)
        _check_found(found, bundle, folder_path)
        return bundle


def sign_bundle(
    path: str | os.PathLike[str], key: str | os.PathLike[str], *, passphrase: Callable[[], str] | None = None
) -> None:
    """Put the signature of the bundle ``path`` into it, in place of one that may be there.

    key: file of the private key (PEM, Ed25519).  passphrase: asked for the key's passphrase if it has one.
    Only a bundle that can be read is signed, and what is signed is what was read.  Raises BundleError, OptionError.
    """
    folder_path = Path(path)
    with open_folder(folder_path, REQUIRED, OPTIONAL) as (folder, found):
        read: dict[str, bytes] = {}

        def keep(name: str, limit: int) -> bytes:
            read[name] = read_regular(folder, folder_path / name, limit)
            return read[name]

        _check_found(found, _decode(keep, folder_path), folder_path)
        signature = sign_manifest(read[MANIFEST], key, passphrase)
        replace_file(folder, folder_path / SIGNATURE, signature)


def _check_found(found: frozenset[str], bundle: Bundle, path: Path) -> None:
    """Refuse files of a precision that the manifest does not have."""
    if extra := sorted((found & OPTIONAL) - {SIGNATURE, *payload(bundle.precisions)}):
        raise BundleError(
            f"{path}: expected only files that {MANIFEST} names, got {extra[0]!r} too; copy the whole bundle again"
        )


def _read_signature(folder: int, path: Path) -> bytes:
    signature = read_regular(folder, path / SIGNATURE, SIGNATURE_BYTES)
    if len(signature) != SIGNATURE_BYTES:
        got = len(signature)
        raise BundleError(f"{path / SIGNATURE}: expected {SIGNATURE_BYTES} bytes, got {got}; sign the bundle again")
    return signature


def _decode(read: Callable[[str, int], bytes], path: Path) -> Bundle:
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
    names = {f"guards.{i}.{name}": dtype for i in range(len(described)) for name, dtype in _GUARD_TENSORS.items()}
    tensors = parse_tensors(data, names, str(path))
    guards = []
    for i, entry in enumerate(described):
        target = expect_integer(entry["target"], f"{where}: target")
        kind = cast(Kind, expect_text(entry["kind"], f"{where}: kind"))  # Guard refuses other kinds
        try:
            guards.append(Guard(target, kind, **{name: tensors[f"guards.{i}.{name}"] for name in _GUARD_TENSORS}))
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
        raise BundleError(f"{where}: input_shape: expected channels, height, width, got {sizes}; {REMEDY}")
    mean, std = (tuple(expect_number(v, where) for v in expect_list(entry[name], where)) for name in ("mean", "std"))
    return Preprocess((sizes[0], sizes[1], sizes[2]), expect_number(entry["scale"], f"{where}: scale"), mean, std)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    return tuple(expect_text(text, where) for text in expect_list(value, where))
