"""Hostile and damaged bundles: each is refused with one line that names the file, and nothing of it is used."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import assert_same, forge, tiny_bundle, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

import inflight_edge.bundle as bundle_module
from inflight_edge import BundleError, read_bundle
from inflight_edge.bundle import MAX_MANIFEST_BYTES

FILES = ("bundle.json", "detector.safetensors", "model.onnx", "selftest.safetensors")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "bundle")


def refused(path: Path, message: str) -> str:
    """The one-line error of a bundle that must not be read; it names the folder."""
    with pytest.raises(BundleError, match=message) as caught:
        read_bundle(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text


# --- files


@pytest.mark.parametrize("name", FILES)
def test_missing_file(path: Path, name: str) -> None:
    (path / name).unlink()
    refused(path, f"expected the file {name}, got none; copy the whole bundle again")


def test_unexpected_file(path: Path) -> None:
    (path / "model.onnx.data").write_bytes(b"")
    refused(path, r"expected only bundle.json, .*, got 'model.onnx.data' too; remove it")


@pytest.mark.parametrize("name", FILES)
def test_symbolic_link_inside(path: Path, name: str) -> None:
    real = (path / name).rename(path.parent / name)
    (path / name).symlink_to(real)
    refused(path, f"{name}: expected a regular file, no link, got Too many levels of symbolic links")


def test_link_to_the_folder_is_fine(path: Path) -> None:
    link = path.parent / "current"
    link.symlink_to(path.name)
    assert_same(read_bundle(link), tiny_bundle())


@pytest.mark.parametrize("name", FILES)
def test_fifo_is_refused_and_does_not_hang(path: Path, name: str) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)
    refused(path, f"{name}: expected a regular file, got another kind")


@pytest.mark.parametrize("name", FILES)
def test_folder_for_a_file(path: Path, name: str) -> None:
    (path / name).unlink()
    (path / name).mkdir()
    refused(path, f"{name}: expected a regular file, got a folder")


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "expected a bundle folder, got No such file or directory")
    (tmp_path / "file").write_bytes(b"")
    refused(tmp_path / "file", "expected a bundle folder, got Not a directory")
    with pytest.raises(BundleError, match=r"expected a bundle folder, got .*embedded null"):
        read_bundle("a\0b")


@pytest.mark.parametrize("name", FILES[1:])
def test_truncated_or_longer_file(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    for length in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1):
        (path / name).write_bytes(data[:length])
        refused(path, f"{name}: expected {len(data)} bytes, got {length}: it is cut short; copy the bundle again")
    (path / name).write_bytes(data + b"\0")
    refused(path, f"{name}: expected at most {len(data)} bytes, got {len(data) + 1}")


def test_truncated_manifest(path: Path) -> None:
    data = (path / "bundle.json").read_bytes()
    for length in (*range(0, len(data) - 2, 97), len(data) - 2):
        (path / "bundle.json").write_bytes(data[:length])
        refused(path, "bundle.json: expected plain JSON")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from(FILES[1:]), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_changed_byte_is_noticed(path: Path, name: str, where: float, flip: int) -> None:
    data = (path / name).read_bytes()
    place = int(where * len(data))
    (path / name).write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
    try:
        refused(path, f"{name}: expected SHA-256 [0-9a-f]{{64}}, got [0-9a-f]{{64}}; copy the bundle again")
    finally:
        (path / name).write_bytes(data)


# --- manifest


def change(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """Edit that sets manifest[key][key]... = to."""

    def edit(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = to

    return edit


def drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return edit


MODEL = ("files", "model.onnx")
BAD_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "other format": (
        change("format", to="zip"),
        "expected format 'inflight-edge-bundle', got str 'zip'; is this a bundle",
    ),
    "no format": (drop("format"), "expected format 'inflight-edge-bundle', got NoneType None"),
    "newer": (
        change("format_version", to=3),
        "expected format_version 1 or 2, got 3; update inflight-edge or calibrate",
    ),
    "older": (change("format_version", to=0), "expected format_version 1 or 2, got 0"),
    "version true": (change("format_version", to=True), "format_version: expected an integer, got bool True"),
    "version text": (change("format_version", to="1"), "format_version: expected an integer, got str '1'"),
    "unknown key": (change("extra", to=1), "expected .*, got str 'extra' too"),
    "missing key": (drop("metrics"), "expected the key 'metrics', got none"),
    "nested unknown": (change("guards", 0, "alpha", to=1), "guards: expected target, kind, got str 'alpha' too"),
    "nested missing": (drop("preprocess", "std"), "preprocess: expected the key 'std', got none"),
    "traversal": (
        change("files", "../../etc/passwd", to={"bytes": 1, "sha256": "0" * 64}),
        "files: expected .*, got str '../../etc/passwd' too",
    ),
    "absolute": (
        change("files", to={"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        "files: expected the key 'detector.safetensors', got none",
    ),
    "huge": (change(*MODEL, "bytes", to=1 << 31), "model.onnx: expected 0 to 2147483647 bytes, got 2147483648"),
    "negative": (change(*MODEL, "bytes", to=-1), "model.onnx: expected 0 to 2147483647 bytes, got -1"),
    "bytes 1.0": (change(*MODEL, "bytes", to=1.0), "model.onnx: bytes: expected an integer, got float 1.0"),
    "short hash": (change(*MODEL, "sha256", to="abc"), "expected 64 lower-case hex digits, got str 'abc'"),
    "upper hash": (change(*MODEL, "sha256", to="A" * 64), "expected 64 lower-case hex digits"),
    "hash null": (change(*MODEL, "sha256", to=None), "sha256: expected a string, got NoneType None"),
    "wrong hash": (change(*MODEL, "sha256", to="0" * 64), f"model.onnx: expected SHA-256 {'0' * 64}, got"),
    "entry list": (change(*MODEL, to=[]), "files: model.onnx: expected an object, got list"),
    "fewer names": (change("class_names", to=["a", "b"]), r"logits: expected shape \(6, 2\), got \(6, 4\)"),
    "more names": (change("class_names", to=list("abcde")), r"logits: expected shape \(6, 5\), got \(6, 4\)"),
    "number name": (change("class_names", to=[1, 2, 3, 4]), "class_names: expected a string, got int 1"),
    "names text": (change("class_names", to="abcd"), "class_names: expected a list, got str 'abcd'"),
    "escape": (change("class_names", 0, to="\x1b[2J"), r"class names.*: expected printable text, got '\\x1b\[2J'"),
    "surrogate": (change("class_names", 0, to="\ud800"), "expected plain JSON, got .*surrogates not allowed"),
    "target out": (change("guards", 0, "target", to=9), "detector.safetensors: guard 0: target: expected one of"),
    "same target": (change("guards", 1, "target", to=3), r"one per target, got targets \[3, 3\]"),
    "target true": (change("guards", 1, "target", to=True), "target: expected an integer, got bool True"),
    "kind": (change("guards", 0, "kind", to="tied"), "guard 0: kind: expected one of diagonal, shared, full, got 'ti"),
    "other kind": (
        change("guards", 0, "kind", to="full"),
        r"guard 0: whitener: expected shape \(4, 10\), got \(4, 4\)",
    ),
    "no guards": (change("guards", to=[]), "detector.safetensors: header: expected .*, got str 'guards.0"),
    "fewer guards": (drop("guards", 1), "detector.safetensors: header: expected .*, got str 'guards.1"),
    "third guard": (
        lambda m: m["guards"].append({"target": 1, "kind": "full"}),
        "detector.safetensors: header: expected the key 'guards.2.classes', got none",
    ),
    "shape": (change("preprocess", "input_shape", to=[1, 2]), r"input_shape: expected channels, height, width, got"),
    "zero shape": (change("preprocess", "input_shape", to=[1, 0, 2]), "preprocess: input shape: expected"),
    "float shape": (change("preprocess", "input_shape", 0, to=1.5), "input_shape: expected an integer, got float 1.5"),
    "std": (change("preprocess", "std", to=[0]), r"bundle.json: preprocess: std: expected numbers > 0, got \(0.0,\)"),
    "mean": (
        change("preprocess", "mean", to=[0, 0]),
        "bundle.json: preprocess: mean: expected one number, or one for each of 1 channels",
    ),
    "scale": (change("preprocess", "scale", to=10**400), "scale: expected a number that fits a float, got a larger"),
    "scale text": (change("preprocess", "scale", to="1"), "scale: expected a number, got str '1'"),
    "metrics": (change("metrics", to=[]), "metrics: expected an object, got list"),
    "versions": (change("versions", to={"torch": 2}), "versions: expected names and versions as strings"),
    "layer": (change("feature_layer", to=""), "feature layer: expected printable text, got ''"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_manifest_that_is_not_understood(path: Path, case: str) -> None:
    edit, message = BAD_MANIFESTS[case]
    forge(path, edit)
    refused(path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "format": 2}', "got the key 'format' twice"),
        ('{"metrics": {"a": {"b": 1, "b": 1}}}', "got the key 'b' twice"),
        ('{"format": NaN}', "got NaN for a number"),
        ('{"format": -Infinity}', "got -Infinity for a number"),
        ('{"format": 1e999}', "got 1e999 for a number: it does not fit a float"),
        ("[" * 100_000, "expected plain JSON, got maximum recursion depth|expected plain JSON, got Stack overflow"),
        ("1" * 5000, "expected plain JSON, got Exceeds the limit|expected an object, got int"),
        ("[]", r"expected an object, got list \[\]"),
        ("", "expected plain JSON, got Expecting value"),
        ("\ufeff{}", "expected plain JSON, got "),
        ("{} {}", "expected plain JSON, got Extra data"),
        (b"\xff\xfe{}", "expected plain JSON, got 'utf-8' codec can't decode byte 0xff"),
        (b"{}" + b" " * MAX_MANIFEST_BYTES, "bundle.json: expected at most 1048576 bytes, got 1048578"),
    ],
)
def test_manifest_that_is_no_plain_json(path: Path, text: str | bytes, message: str) -> None:
    (path / "bundle.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(path, message)


# --- tensors, with hashes that fit


def with_tensor(path: Path, stem: str, name: str, array: np.ndarray | None) -> None:
    tensors = load((path / f"{stem}.safetensors").read_bytes())
    del tensors[name]
    forge(path, **{stem: save(tensors if array is None else tensors | {name: array})})


NAN4 = np.array([0, 0, np.nan, 0], np.float32)
BAD_TENSORS: dict[str, tuple[str, str, Any, str]] = {
    "nan mean": ("detector", "guards.0.mean", NAN4, "detector.safetensors: guard 0: mean: expected finite numbers"),
    "scale 0": ("detector", "guards.1.scale", np.zeros(4, np.float32), "guard 1: scale: expected every entry > 0"),
    "shape": (
        "detector",
        "guards.0.means",
        np.zeros((4, 3), np.float32),
        r"means: expected shape \(4, 4\), got \(4, 3\)",
    ),
    "dtype": ("detector", "guards.0.mean", np.zeros(4), "guards.0.mean: expected dtype float32, got str 'F64'"),
    "missing": ("detector", "guards.0.mean", None, "detector.safetensors: header: expected the key 'guards.0.mean'"),
    "class": (
        "detector",
        "guards.1.classes",
        np.array([0, 1, 2, 7], np.int32),
        "guard 1: expected classes below 4, got 7",
    ),
    "logits": ("selftest", "logits", np.zeros((6, 3), np.float32), r"logits: expected shape \(6, 4\), got \(6, 3\)"),
    "nan": ("selftest", "features", np.full((6, 4), np.nan, np.float32), "features: expected numbers, got 24 NaN"),
    "inf": ("selftest", "logits", np.full((6, 4), np.inf, np.float32), "logits: expected numbers, got 24 NaN or inf"),
    "rows": ("selftest", "sources", np.zeros(5, np.int32), "sources: expected 6 rows, got 5"),
    "axes": ("selftest", "frames", np.zeros((6, 2, 2), np.uint8), "frames: expected a C-contiguous uint8 array of 4"),
    "empty": ("selftest", "frames", np.zeros((0, 2, 2, 1), np.uint8), "frames: expected at least one frame and pixel"),
    "code": ("selftest", "decisions", np.full(6, 4, np.uint8), "decisions: expected codes below 4"),
    "scalar": ("selftest", "decisions", np.zeros((), np.uint8), "decisions: expected codes below 4 along one axis"),
    "few codes": ("selftest", "decisions", np.zeros(5, np.uint8), "decisions: expected 6 of"),
    "no source": ("selftest", "sources", np.full(6, -1, np.int32), "sources: expected a class for each trigger and -1"),
    "no class": ("selftest", "sources", np.array([-1, 9, 2, -1, -1, 2], np.int32), "sources: expected classes below 4"),
    "densities": ("selftest", "log_likelihoods.1", np.zeros((6, 3), np.float32), "log_likelihoods: expected shapes"),
    "nan nats": (
        "selftest",
        "log_likelihoods.0",
        np.full((6, 4), np.nan, np.float32),
        "log_likelihoods.0: expected num",
    ),
    "frames": ("selftest", "frames", np.zeros((6, 2, 2, 1), np.int8), "frames: expected dtype uint8, got str 'I8'"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensor_that_does_not_fit(path: Path, case: str) -> None:
    stem, name, array, message = BAD_TENSORS[case]
    with_tensor(path, stem, name, array)
    refused(path, message)


def test_guards_over_different_features(path: Path) -> None:
    tensors = load((path / "detector.safetensors").read_bytes())
    for name in ("mean", "scale", "means", "whitener"):
        tensors[f"guards.0.{name}"] = np.ascontiguousarray(tensors[f"guards.0.{name}"][..., :3])
    forge(path, detector=save(tensors))
    refused(path, r"features: expected shape \(6, 3\), got \(6, 4\)")


def test_self_test_may_hold_log_likelihoods_of_minus_infinity(path: Path) -> None:
    with_tensor(path, "selftest", "log_likelihoods.0", np.full((6, 4), -np.inf, np.float32))
    assert np.isneginf(read_bundle(path).self_test.log_likelihoods[0]).all()


def safetensors(header: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


def with_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Forge the header of detector.safetensors, leaving its data."""
    data = (path / "detector.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(header)
    forge(path, detector=safetensors(json.dumps(header), data[8 + size :]))


def test_header_tricks(path: Path) -> None:
    with_header(path, change("__metadata__", to={"a": "b"}))
    refused(path, "detector.safetensors: header: expected 16 known keys, got str '__metadata__' too")
    with_header(path, drop("__metadata__"))
    assert_same(read_bundle(path), tiny_bundle())
    original = (path / "detector.safetensors").read_bytes()
    for keys, to, message in (
        (("guards.0.mean", "shape"), [5], "expected a safetensors file, got .*"),
        (("guards.0.mean", "shape"), [1 << 62, 4], "expected a safetensors file, got .*"),
        (("guards.0.mean", "shape"), "4", "expected a safetensors file, got .*"),
        (("guards.0.mean", "data_offsets"), [0, 1 << 40], "expected a safetensors file, got .*"),
        (("guards.0.mean", "data_offsets"), [-4, 12], "expected a safetensors file, got .*"),
        (("guards.0.mean", "dtype"), "BF16", "guards.0.mean: expected dtype float32, got str 'BF16'"),
        (("guards.0.mean", "dtype"), ["F32"], r"guards.0.mean: expected dtype float32, got list \['F32'\]"),
        (("guards.0.mean", "stride"), 1, "guards.0.mean: expected dtype, shape, data_offsets, got str 'stride'"),
        (("guards.0.mean",), 1, "guards.0.mean: expected an object, got int 1"),
    ):
        with_header(path, change(*keys, to=to))
        refused(path, "detector.safetensors: " + message)
        forge(path, detector=original)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected 8 bytes or more, got 0"),
        (b"\x02", "expected 10 bytes or more, got 1"),
        (struct.pack("<Q", 1 << 40) + b"{}", "expected a header of at most 1048576 bytes, got 1099511627776"),
        (struct.pack("<Q", 1 << 63) + b"{}", "expected a header of at most 1048576 bytes, got 9223372036854775808"),
        (struct.pack("<Q", (1 << 20) + 1) + b" " * ((1 << 20) + 1), "expected a header of at most 1048576 bytes"),
        (struct.pack("<Q", 100) + b"{}", "expected 108 bytes or more, got 10"),
        (safetensors("[]"), r"header: expected an object, got list \[\]"),
        (safetensors("{}"), "header: expected the key 'guards.0.classes', got none"),
        (safetensors('{"a": 1, "a": 2}'), "header: expected plain JSON, got the key 'a' twice"),
        (b"PK\x03\x04" + b"\0" * 60, "expected 67324760 bytes or more|expected a header of at most"),
    ],
)
def test_file_that_is_no_safetensors(path: Path, data: bytes, message: str) -> None:
    forge(path, detector=data)
    refused(path, f"detector.safetensors: {message}")


def test_data_cut_behind_the_header(path: Path) -> None:
    data = (path / "detector.safetensors").read_bytes()
    forge(path, detector=data[:-4])
    refused(path, "detector.safetensors: expected a safetensors file, got .*")
    forge(path, detector=data + b"\0\0\0\0")
    refused(path, "detector.safetensors: expected a safetensors file, got .*")


# --- races, memory, nesting


def test_folder_exchanged_while_it_is_read_gives_one_bundle_whole(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = written(tmp_path / "other", feature_layer="other")
    real = bundle_module.read_regular

    def exchange(folder: int, where: Path, limit: int) -> bytes:
        data = real(folder, where, limit)
        if where.name == "bundle.json":
            path.rename(tmp_path / "aside")
            other.rename(path)
        return data

    monkeypatch.setattr(bundle_module, "read_regular", exchange)
    assert_same(read_bundle(path), tiny_bundle())
    monkeypatch.undo()
    assert read_bundle(path).feature_layer == "other"


def test_file_replaced_after_the_manifest_was_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bundle_module.read_regular

    def replace(folder: int, where: Path, limit: int) -> bytes:
        data = real(folder, where, limit)
        if where.name == "bundle.json":
            model = (path / "model.onnx").read_bytes()
            (path / "new").write_bytes(model[:-1] + b"\xff")
            (path / "new").rename(path / "model.onnx")
        return data

    monkeypatch.setattr(bundle_module, "read_regular", replace)
    refused(path, "model.onnx: expected SHA-256")


def test_sparse_file_beyond_the_memory_is_refused_with_one_line(path: Path) -> None:
    """Two gigabytes that need no disk, in a process that may have one: an error of ours, not a traceback."""
    with open(path / "model.onnx", "r+b") as file:
        file.truncate(2**31 - 1)
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["files"]["model.onnx"]["bytes"] = 2**31 - 1
    (path / "bundle.json").write_text(json.dumps(manifest))
    code = (
        "import resource, sys, safetensors.numpy; from inflight_edge import BundleError, read_bundle\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))\n"
        "try: read_bundle(sys.argv[1])\n"
        "except BundleError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"{path}/model.onnx: expected a file that fits the memory, got 2147483647 bytes\n"


@pytest.mark.parametrize("key", ["format", "class_names", "guards", "metrics", "preprocess"])
def test_nesting_near_the_recursion_limit_is_refused_or_read(path: Path, key: str) -> None:
    """What the parser just takes, the error message or the comparison might not."""
    manifest = json.loads((path / "bundle.json").read_text()) | {key: "@"}
    text = json.dumps(manifest)
    for depth in [*range(sys.getrecursionlimit() - 120, sys.getrecursionlimit() + 1), 5000]:
        value = "[" * depth + "]" * depth
        (path / "bundle.json").write_text(text.replace('"@"', value if key != "metrics" else f'{{"a": {value}}}'))
        try:
            read_bundle(path)
        except BundleError as error:
            assert "\n" not in str(error)
        else:
            assert key == "metrics"
