"""Signatures of bundles: Ed25519 over the manifest, which holds the hashes of all other files.

The signature lies in the bundle as ``bundle.sig``.  A key is a PEM file: PKCS #8 the private, SubjectPublicKeyInfo the
public one, as OpenSSL writes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inflight_edge._layout import SIGNATURE
from inflight_edge._optional import require
from inflight_edge.errors import BundleError, OptionError

__all__ = ["SIGNATURE_BYTES", "check_signature", "read_public_key", "sign_manifest", "write_keys"]

SIGNATURE_BYTES = 64
# In front of the manifest: what was signed for another purpose with the same key is no signature of a bundle.
_PREFIX = b"inflight-edge bundle signature 1\0"
_MAX_KEY_BYTES = 1 << 16
_REMEDY = "pip install 'inflight-edge[signing]'"


def write_keys(private: str | os.PathLike[str], public: str | os.PathLike[str]) -> None:
    """Write a new key pair; the private file is readable by its owner alone (mode 600) and has no passphrase.

    Raises OptionError when one of the files exists, or cannot be written.
    """
    serialization = require("cryptography.hazmat.primitives.serialization", _REMEDY)
    key = _ed25519().Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    known = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    for path in (private, public):
        if os.path.lexists(path):
            raise OptionError(f"{path}: expected no such file, got one; a key is never overwritten: name another file")
    if os.path.abspath(private) == os.path.abspath(public):
        raise OptionError(f"{public}: expected two files, got one for both keys; name another file")
    # The public one first: half a pair that is left is then no secret, and goes again.
    for path, data, mode in ((public, known, 0o644), (private, secret, 0o600)):
        made = [public] if path is private else []
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
                made.append(path)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            for half in made:
                os.unlink(half)
            raise OptionError(f"{path}: cannot be written: {error.strerror or error}") from error


def sign_manifest(manifest: bytes, key: str | os.PathLike[str], passphrase: Callable[[], str] | None = None) -> bytes:
    """Signature of a manifest's bytes.

    key: file of the private key.  passphrase: asked for the passphrase if the key has one.  Raises OptionError.
    """
    serialization = require("cryptography.hazmat.primitives.serialization", _REMEDY)
    data = _read_key(key)
    load = serialization.load_pem_private_key
    try:
        try:
            loaded = load(data, None)
        except TypeError:  # the key is encrypted
            if passphrase is None:
                raise OptionError(f"{key}: expected a private key without a passphrase; sign on a terminal") from None
            loaded = load(data, passphrase().encode("utf-8"))
    except _key_errors() as error:
        raise OptionError(f"{key}: expected a private key (PEM, Ed25519), got {_what(data, 'private')}") from error
    signature: bytes = _expect_ed25519(loaded, "Private", key).sign(_PREFIX + manifest)
    return signature


def read_public_key(key: str | os.PathLike[str]) -> Any:
    """The public key of a PEM file.  Raises OptionError for anything else, a private key too."""
    serialization = require("cryptography.hazmat.primitives.serialization", _REMEDY)
    data = _read_key(key)
    try:
        loaded = serialization.load_pem_public_key(data)
    except _key_errors() as error:
        raise OptionError(f"{key}: expected a public key (PEM, Ed25519), got {_what(data, 'public')}") from error
    return _expect_ed25519(loaded, "Public", key)


def check_signature(manifest: bytes, signature: bytes | None, key: Any, path: Path) -> None:
    """Raise BundleError unless ``signature`` is that of the manifest by the owner of ``key``.

    key: from read_public_key.  path: the bundle's folder, for the message.
    """
    remedy = "do not use this bundle; get it, and the key, from its owner again"
    if signature is None:
        raise BundleError(f"{path}: expected a bundle signed by its owner, got one without {SIGNATURE}; {remedy}")
    try:
        key.verify(signature, _PREFIX + manifest)
    except require("cryptography.exceptions", _REMEDY).InvalidSignature as error:
        where = path / SIGNATURE
        raise BundleError(
            f"{where}: expected the signature of bundle.json by this key, got another key's or of other contents; {remedy}"
        ) from error


def _ed25519() -> Any:
    return require("cryptography.hazmat.primitives.asymmetric.ed25519", _REMEDY)


def _key_errors() -> tuple[type[Exception], ...]:
    unsupported: type[Exception] = require("cryptography.exceptions", _REMEDY).UnsupportedAlgorithm
    return (ValueError, TypeError, unsupported)


def _read_key(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_KEY_BYTES + 1)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OptionError(f"{path}: the key cannot be read: {cause}") from error
    if len(data) > _MAX_KEY_BYTES:
        raise OptionError(f"{path}: expected a key in PEM, got more than {_MAX_KEY_BYTES} bytes")
    return data


def _what(data: bytes, wanted: str) -> str:
    """What a file that is not the expected key holds, as far as its PEM label says."""
    for label, other in ((b"PRIVATE", "private"), (b"PUBLIC", "public")):
        if label + b" KEY-----" in data:
            return f"a {other} key" if other != wanted else "one that is damaged, of another kind, or locked otherwise"
    return "a certificate" if b"CERTIFICATE-----" in data else "something else"


def _expect_ed25519(key: Any, kind: str, path: str | os.PathLike[str]) -> Any:
    if not isinstance(key, getattr(_ed25519(), f"Ed25519{kind}Key")):
        got = type(key).__name__.removesuffix(f"{kind}Key").lstrip("_")
        raise OptionError(
            f"{path}: expected an Ed25519 key, got {got or 'another kind'}; make one with `inflight-edge keygen`"
        )
    return key
