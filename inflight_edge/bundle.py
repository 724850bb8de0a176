"""The bundle: all that crosses from the workstation to the device, as one folder of a few files.

``bundle.json`` describes the classifier and holds the SHA-256 and size of the others: ``detector.safetensors``
(guards), ``model.onnx`` (outputs ``logits`` and ``features``) and ``selftest.safetensors`` (expected outputs); and the
same three for each further precision, ``model.fp16.onnx`` and so on.  ``bundle.sig`` is the owner's signature of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._contents import DECISIONS, Bundle, SelfTest, Variant, dump_json
from inflight_edge._decode import decode
from inflight_edge._files import open_folder, read_regular, replace_file, write_folder
from inflight_edge._layout import (
    FORMAT,
    FORMAT_VERSION,
    GUARD_TENSORS,
    MANIFEST,
    MAX_FILE_BYTES,
    MAX_MANIFEST_BYTES,
    OPTIONAL,
    PRECISIONS,
    REQUIRED,
    SIGNATURE,
    names_of,
    payload,
)
from inflight_edge._strict import dump_tensors
from inflight_edge.errors import BundleError
from inflight_edge.guard import Guard
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
            f"{path}: expected at most {limits}, got {size}, {len(text)}; guard fewer classes, or keep less in the metrics"
        )
    decode(lambda name, _: files[name], Path(path))
    write_folder(Path(path), files, overwrite=overwrite, optional=OPTIONAL)


def _encode(bundle: Bundle) -> dict[str, bytes]:
    """The three files of a bundle's own precision."""
    detector: dict[str, NDArray[Any]] = {}
    for i, guard in enumerate(bundle.guards):
        detector |= {f"guards.{i}.{name}": getattr(guard, name) for name in GUARD_TENSORS}
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

        bundle = decode(read, folder_path)
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

        _check_found(found, decode(keep, folder_path), folder_path)
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
