"""Signed bundles: what the owner did not sign is refused with one line, before anything of it is parsed."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from bundles import assert_same, forge, tiny_bundle, written
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import inflight_edge._optional
from inflight_edge import (
    BundleError,
    DependencyError,
    Detector,
    OptionError,
    _decode,
    read_bundle,
    sign_bundle,
    write_bundle,
)
from inflight_edge.cli import main
from inflight_edge.signing import check_signature, read_public_key, sign_manifest, write_keys
from inflight_edge.verify import verify

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
OPEN = serialization.NoEncryption()
PUBLIC = serialization.PublicFormat.SubjectPublicKeyInfo
# The key whose secret is the bytes 0 to 31, and what it makes of a manifest.
FIXED = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
GOLDEN_MANIFEST = b'{"format": "inflight-edge-bundle"}\n'
GOLDEN_SIGNATURE = bytes.fromhex(
    "21a1481f46673e0b91f448bb2d51dff5d97b295013c44c37f9b2c03c92f2459a"
    "83978bacca0cdea165c0116406b148f963d17e610d96217fd5ffae6244acdb00"
)


class Keys:
    def __init__(self, folder: Path, name: str) -> None:
        self.private, self.public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
        write_keys(self.private, self.public)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path, "owner")


@pytest.fixture
def path(tmp_path: Path, keys: Keys) -> Path:
    """A signed bundle."""
    folder = written(tmp_path / "bundle")
    sign_bundle(folder, keys.private)
    return folder


def refused(path: Path, key: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        read_bundle(path, key=key)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_golden_signature(tmp_path: Path) -> None:
    """The bytes of format 1: any change of prefix, algorithm or encoding breaks every signature in the field."""
    secret, known = tmp_path / "a.pem", tmp_path / "b.pem"
    secret.write_bytes(FIXED.private_bytes(PEM, PKCS8, OPEN))
    known.write_bytes(FIXED.public_key().public_bytes(PEM, PUBLIC))
    assert sign_manifest(GOLDEN_MANIFEST, secret) == GOLDEN_SIGNATURE
    check_signature(GOLDEN_MANIFEST, GOLDEN_SIGNATURE, read_public_key(known), tmp_path)
    FIXED.public_key().verify(GOLDEN_SIGNATURE, b"inflight-edge bundle signature 1\0" + GOLDEN_MANIFEST)


def test_signed_bundle_reads_with_and_without_the_key(path: Path, keys: Keys) -> None:
    assert sorted(os.listdir(path)) == [
        "bundle.json",
        "bundle.sig",
        "detector.safetensors",
        "model.onnx",
        "selftest.safetensors",
    ]
    assert_same(read_bundle(path, key=keys.public), tiny_bundle())
    assert_same(read_bundle(path), tiny_bundle())
    assert Detector.load(path, key=keys.public).class_names == tiny_bundle().class_names
    assert not list(path.parent.glob(".*"))


def test_unsigned_bundle_reads_only_without_a_key(tmp_path: Path, keys: Keys) -> None:
    folder = written(tmp_path / "b")
    assert_same(read_bundle(folder), tiny_bundle())
    refused(folder, keys.public, "expected a bundle signed by its owner, got one without bundle.sig; do not use")
    with pytest.raises(BundleError, match=r"got one without bundle\.sig"):
        Detector.load(folder, key=keys.public)


def test_key_of_somebody_else(path: Path, tmp_path: Path, keys: Keys) -> None:
    other = Keys(tmp_path, "other")
    refused(path, other.public, r"bundle\.sig: expected the signature of bundle\.json by this key, got another key's")
    sign_bundle(path, other.private)
    read_bundle(path, key=other.public)
    refused(path, keys.public, "got another key's or of other contents; do not use this bundle")


@pytest.mark.parametrize("bit", range(0, 512, 37))
def test_any_changed_bit_of_the_signature(path: Path, keys: Keys, bit: int) -> None:
    data = bytearray((path / "bundle.sig").read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (path / "bundle.sig").write_bytes(data)
    refused(path, keys.public, "expected the signature of bundle.json by this key")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected 64 bytes, got 0; sign the bundle again"),
        (b"\0" * 63, "expected 64 bytes, got 63"),
        (b"\0" * 65, "expected at most 64 bytes, got 65"),
        (b"\0" * 64, "expected the signature of bundle.json by this key"),
        (b"\xff" * 64, "expected the signature of bundle.json by this key"),
    ],
)
def test_signature_that_is_none(path: Path, keys: Keys, data: bytes, message: str) -> None:
    (path / "bundle.sig").write_bytes(data)
    refused(path, keys.public, rf"bundle\.sig: {message}")


def test_signature_of_the_bare_manifest_is_not_taken(path: Path, keys: Keys) -> None:
    """The prefix: a signature that the same key gave for another purpose does not open a bundle."""
    loaded = serialization.load_pem_private_key(keys.private.read_bytes(), None)
    assert isinstance(loaded, Ed25519PrivateKey)
    (path / "bundle.sig").write_bytes(loaded.sign((path / "bundle.json").read_bytes()))
    refused(path, keys.public, "expected the signature of bundle.json by this key")


def test_every_other_file_is_covered_by_the_manifest(path: Path, keys: Keys) -> None:
    for name in ("detector", "model", "selftest"):
        file = next(path.glob(f"{name}.*"))
        original, manifest = file.read_bytes(), (path / "bundle.json").read_bytes()
        file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        refused(path, keys.public, f"{file.name}: expected SHA-256")
        forge(path, **{name: original[:-1] + bytes([original[-1] ^ 1])})  # hashes that fit, as an attacker would
        refused(path, keys.public, "expected the signature of bundle.json by this key")
        file.write_bytes(original)
        (path / "bundle.json").write_bytes(manifest)
    read_bundle(path, key=keys.public)


def test_same_manifest_in_other_bytes_is_not_what_was_signed(path: Path, keys: Keys) -> None:
    manifest = json.loads((path / "bundle.json").read_bytes())
    (path / "bundle.json").write_text(json.dumps(manifest))
    read_bundle(path)
    refused(path, keys.public, "expected the signature of bundle.json by this key")


def test_nothing_is_parsed_before_the_signature_holds(path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object) -> None:
        raise AssertionError("parsed")

    (path / "bundle.json").write_bytes(b"[" * 100_000)
    monkeypatch.setattr(_decode, "parse_json", parse)
    refused(path, keys.public, "expected the signature of bundle.json by this key")
    with pytest.raises(AssertionError, match="parsed"):
        read_bundle(path)


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
@pytest.mark.parametrize("with_key", [False, True])
def test_signature_that_is_no_regular_file(path: Path, keys: Keys, kind: str, with_key: bool) -> None:
    """Without a key as well: what a reader does not understand it refuses."""
    file = path / "bundle.sig"
    real = file.rename(path.parent / "kept.sig")
    {"link": lambda: file.symlink_to(real), "fifo": lambda: os.mkfifo(file), "folder": file.mkdir}[kind]()
    with pytest.raises(BundleError, match=r"bundle\.sig: expected a regular file"):
        read_bundle(path, key=keys.public if with_key else None)


def test_another_fifth_file_is_still_refused(path: Path, keys: Keys) -> None:
    (path / "bundle.sig.old").write_bytes(b"")
    refused(path, keys.public, r"expected only .*, got 'bundle\.sig\.old' too; remove it")


def test_signature_of_an_older_bundle_does_not_fit(path: Path, keys: Keys) -> None:
    signature = (path / "bundle.sig").read_bytes()
    write_bundle(tiny_bundle(feature_layer="other"), path, overwrite=True)
    assert not (path / "bundle.sig").exists()  # a stale signature would only puzzle
    (path / "bundle.sig").write_bytes(signature)
    refused(path, keys.public, "expected the signature of bundle.json by this key")
    sign_bundle(path, keys.private)
    assert read_bundle(path, key=keys.public).feature_layer == "other"


def test_only_a_bundle_that_can_be_read_is_signed(path: Path, keys: Keys) -> None:
    (path / "bundle.sig").unlink()
    (path / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"model\.onnx: expected \d+ bytes, got"):
        sign_bundle(path, keys.private)
    assert not (path / "bundle.sig").exists()


def test_signing_replaces_a_link_and_not_its_target(path: Path, keys: Keys) -> None:
    victim = path.parent / "victim"
    victim.write_text("mine")
    (path / "bundle.sig").unlink()
    (path / "bundle.sig").symlink_to(victim)
    sign_bundle(path, keys.private)
    assert victim.read_text() == "mine"
    assert stat.S_ISREG(os.lstat(path / "bundle.sig").st_mode)
    read_bundle(path, key=keys.public)


# --- keys


def test_keys_are_private_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    previous = os.umask(0)
    try:
        keys = Keys(tmp_path, "a")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(os.stat(keys.private).st_mode) == 0o600
    before = keys.private.read_bytes(), keys.public.read_bytes()
    for private, public in ((keys.private, tmp_path / "n"), (tmp_path / "n", keys.public)):
        with pytest.raises(OptionError, match="expected no such file, got one; a key is never overwritten"):
            write_keys(private, public)
    assert (keys.private.read_bytes(), keys.public.read_bytes()) == before
    assert not (tmp_path / "n").exists()
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OptionError, match="expected no such file"):
        write_keys(tmp_path / "dangling", tmp_path / "n")
    for pair in ((tmp_path / "no" / "a", tmp_path / "n"), (tmp_path / "n", tmp_path / "no" / "a")):
        with pytest.raises(OptionError, match="cannot be written: No such file or directory"):
            write_keys(*pair)
        assert not (tmp_path / "n").exists(), "half a pair"
    real = os.fsync
    calls: list[int] = []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OptionError, match="m: cannot be written: No space left on device"):
        write_keys(tmp_path / "m", tmp_path / "n")
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "n").exists()
    with pytest.raises(OptionError, match="expected two files, got one for both keys"):
        write_keys(tmp_path / "n", tmp_path / "x" / ".." / "n")
    assert not (tmp_path / "n").exists()


OTHER_KINDS = {
    "RSA": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "EC": lambda: ec.generate_private_key(ec.SECP256R1()),
    "Ed448": ed448.Ed448PrivateKey.generate,
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_key_are_refused_by_name(path: Path, tmp_path: Path, kind: str) -> None:
    key = OTHER_KINDS[kind]()
    secret, known = tmp_path / "s.pem", tmp_path / "k.pem"
    secret.write_bytes(key.private_bytes(PEM, PKCS8, OPEN))
    known.write_bytes(key.public_key().public_bytes(PEM, PUBLIC))
    for call in (lambda: sign_bundle(path, secret), lambda: read_bundle(path, key=known)):
        with pytest.raises(OptionError, match=rf"expected an Ed25519 key, got .*{kind}; make one with `inflight-edge"):
            call()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a public key .PEM, Ed25519., got something else"),
        (b"\0" * 200, "expected .*, got something else"),
        (
            b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
            "expected .*, got one that is damaged, of another kind",
        ),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "expected .*, got a certificate"),
        (b"A" * (1 << 17), "expected a key in PEM, got more than 65536 bytes"),
    ],
)
def test_public_key_that_is_none(path: Path, tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "key.pem").write_bytes(data)
    with pytest.raises(OptionError, match=rf"key\.pem: {message}"):
        read_bundle(path, key=tmp_path / "key.pem")


def test_keys_in_each_others_place(path: Path, keys: Keys) -> None:
    with pytest.raises(OptionError, match=r"expected a public key .*, got a private key"):
        read_bundle(path, key=keys.private)
    with pytest.raises(OptionError, match=r"expected a private key .*, got a public key"):
        sign_bundle(path, keys.public)
    with pytest.raises(OptionError, match="none: the key cannot be read: No such file or directory"):
        read_bundle(path, key=path / "none")


def test_private_key_with_a_passphrase(path: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    locked.write_bytes(FIXED.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"open sesame")))
    with pytest.raises(OptionError, match="expected a private key without a passphrase; sign on a terminal"):
        sign_bundle(path, locked)
    with pytest.raises(OptionError, match=r"expected a private key .*locked otherwise"):
        sign_bundle(path, locked, passphrase=lambda: "wrong")
    sign_bundle(path, locked, passphrase=lambda: "open sesame")
    known = tmp_path / "known.pem"
    known.write_bytes(FIXED.public_key().public_bytes(PEM, PUBLIC))
    read_bundle(path, key=known)


def test_passphrase_that_is_not_given_is_one_line(
    path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    locked = keys.private.with_name("locked.pem")
    locked.write_bytes(FIXED.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"open sesame")))

    def nothing(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("inflight_edge.commands.getpass", nothing)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["sign", str(path), "--key", str(locked)]) == 2
    assert capsys.readouterr().err.endswith("locked.pem: expected its passphrase, got none\n")
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["sign", str(path), "--key", str(locked)]) == 2
    assert "expected a private key without a passphrase; sign on a terminal" in capsys.readouterr().err


def test_without_the_library_a_key_lets_nothing_pass(path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    real = inflight_edge._optional.importlib.import_module

    def missing(name: str) -> object:
        if name.startswith("cryptography"):
            raise ImportError("no cryptography")
        return real(name)

    monkeypatch.setattr(inflight_edge._optional.importlib, "import_module", missing)
    with pytest.raises(DependencyError, match=r"pip install 'inflight-edge\[signing\]'"):
        read_bundle(path, key=keys.public)
    read_bundle(path)


# --- command line


def test_commands_from_keys_to_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "bundle")

    def run(line: str, status: int) -> str:
        assert main(line.split()) == status
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert "private.pem: keep it off the device" in run("keygen private.pem public.pem", 0)
    assert "got one without bundle.sig" in run("verify bundle --key public.pem", 1)
    assert run("sign bundle --key private.pem", 0) == "bundle: signed\n"
    assert "signed by public.pem" in run("verify bundle --key public.pem", 0)
    assert "no key given: signature not checked" in run("verify bundle", 0)
    (tmp_path / "bundle" / "bundle.sig").unlink()
    for command in ("score bundle x.npz", "bench bundle --frames 1000"):
        text = run(f"{command} --key public.pem", 2)
        assert "error: bundle: expected a bundle signed by its owner" in text
        assert text.count("\n") == 1
    assert "a key is never overwritten" in run("keygen private.pem other.pem", 2)


def test_verify_names_a_key_that_is_none(path: Path, tmp_path: Path) -> None:
    (check,) = verify(path, key=tmp_path / "none")
    assert not check.passed
    assert "the key cannot be read" in check.detail
