"""What is fuzzed in Python: each target takes bytes, reads them as a script of mutations of real files, and may end
only in silence or in the error that its reader promises.  Both hypothesis and atheris write such scripts.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from bundles import CLEAN_WEST, tiny_bundle, tiny_model, written
from onnx import TensorProto, helper
from PIL import Image

from inflight_edge import (
    Bundle,
    BundleError,
    DataError,
    Decision,
    Detector,
    EngineError,
    GuardError,
    OptionError,
    Verdict,
)
from inflight_edge._decode import decode
from inflight_edge.engines._wire import refuse_external_data
from inflight_edge.images import read_image, read_npz_images
from inflight_edge.uri import Uri

T = TypeVar("T")
NUMBERS = (0, 1, -1, 2, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**400)
TEXTS = (
    "",
    "a",
    "\x1b[2J",
    "\u202e",
    "\0",
    "../../etc/passwd",
    "x" * 5000,
    "F32",
    "I32",
    "U8",
    "F64",
    "shared",
    "full",
)
SCHEMES = frozenset(("rtsp", "video", "mqtt"))
FLOATS = (0.0, -0.0, 1.0, np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 1e-38, 0.5, 1e19)


class Script:
    """Choices read from bytes; zeros when they have run out, so that every input is a script."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, n: int) -> bytes:
        part = self.data[self.position : self.position + n]
        self.position += n
        return part.ljust(n, b"\0")

    def below(self, n: int) -> int:
        return int.from_bytes(self.take(1 if n <= 256 else 4), "big") % n

    def choose(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def value(self) -> Any:
        """A JSON value that its reader may not expect."""
        kind = self.below(8)
        if kind == 0:
            return self.choose(TEXTS)
        if kind == 1:
            return self.choose(NUMBERS)
        if kind == 2:
            return self.choose((1.5, 1e308, -1e-320, True, False, None))
        if kind == 3:
            return [self.choose(NUMBERS) for _ in range(self.below(5))]
        if kind == 4:
            return {self.choose(TEXTS): self.choose(NUMBERS)}
        if kind == 5:
            return f"nested {self.below(256) * 16}"  # see _dump
        return int.from_bytes(self.take(4), "big", signed=True) if kind == 6 else self.take(6).decode("latin-1")

    def mutate_json(self, value: Any) -> Any:
        """One change somewhere in a JSON value."""
        if isinstance(value, dict) and value and self.below(8):
            key = self.choose(sorted(value))
            change = self.below(8)
            if change == 0:
                return {k: v for k, v in value.items() if k != key}
            return {**value, (self.choose(TEXTS) if change == 1 else key): self.mutate_json(value[key])}
        if isinstance(value, list) and value and self.below(8):
            place = self.below(len(value))
            return [*value[:place], self.mutate_json(value[place]), *value[place + self.below(2) :]]
        return self.value()

    def mutate(self, seed: bytes) -> bytes:
        """Up to four changes of bytes."""
        data = bytearray(seed)
        for _ in range(self.below(5)):
            place = self.below(len(data) + 1)
            change = self.below(7)
            if change == 0:
                del data[place:]
            elif change == 1:
                del data[place : place + 1 + self.below(16)]
            elif change == 2:
                data[place:place] = self.take(1 + self.below(8))
            elif change == 3:
                new = self.take(1 + self.below(8))
                data[place : place + len(new)] = new
            elif change == 4:
                data[place : place + 4] = struct.pack("<I", self.choose(NUMBERS) & 0xFFFFFFFF)
            elif change == 5 and place < len(data):
                data[place] ^= 1 << self.below(8)
            else:
                part = data[place : place + 1 + self.below(64)]
                data[place:place] = part
        return bytes(data)


@cache
def seed_bundle() -> dict[str, bytes]:
    """The files of a real bundle."""
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "bundle")
        return {file.name: file.read_bytes() for file in path.iterdir()}


@cache
def seed_images() -> tuple[bytes, ...]:
    """A small picture in every format and some of their variants."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    files = []
    for name in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"):
        for picture in (colour, colour.convert("L"), colour.quantize(4), colour.convert("CMYK")):
            file = io.BytesIO()
            try:
                picture.save(file, format=name)
            except (OSError, ValueError):  # the format has no such mode
                continue
            files.append(file.getvalue())
    file = io.BytesIO()
    colour.save(file, format="TIFF", compression="tiff_lzw")
    return (*files, file.getvalue())


@cache
def seed_model() -> bytes:
    """A model with a tensor everywhere one may be; the last field of each is its external data, changed to a harmless one."""
    model = onnx.load_model_from_string(tiny_model())
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], raw_data=b"\0\0\0\0")
    branch = helper.make_graph([helper.make_node("Constant", [], ["k"], value=tensor)], "g", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["k"], then_branch=branch, many=[tensor]))
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    model.functions.append(helper.make_function("d", "f", [], ["k"], list(branch.node), [helper.make_opsetid("", 18)]))
    return bytes(model.SerializeToString())


def _dump(value: Any) -> bytes:
    """JSON; the text ``nested N`` becomes N brackets, deeper than this function could go."""

    def brackets(match: re.Match[str]) -> str:
        return "[" * int(match[1]) + "]" * int(match[1])

    return re.sub(r'"nested (\d+)"(?!:)', brackets, json.dumps(value)).encode()


def _decode_files(files: dict[str, bytes]) -> Bundle | None:
    """The bundle of these files, or None where it is refused with one line."""
    try:
        return decode(lambda name, _: files[name], Path("fuzzed"))
    except BundleError as error:
        assert str(error).startswith("fuzzed")
        assert "\n" not in str(error)
        assert len(str(error)) < 20_000
        return None


def _forged(files: dict[str, bytes], edit: Callable[[Any], Any] = lambda manifest: manifest) -> dict[str, bytes]:
    """The files with sizes and hashes that fit again."""
    manifest = json.loads(files["bundle.json"])
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": len(files[name]), "sha256": sha256(files[name]).hexdigest()}
    return files | {"bundle.json": _dump(edit(manifest))}


def manifest(data: bytes) -> None:
    """The manifest: changed values, or changed bytes."""
    script, files = Script(data), seed_bundle()
    if script.below(4):
        changed = json.loads(files["bundle.json"])
        for _ in range(1 + script.below(3)):
            changed = script.mutate_json(changed)
        _decode_files(files | {"bundle.json": _dump(changed)})
    else:
        _decode_files(files | {"bundle.json": script.mutate(files["bundle.json"])})


def tensors(data: bytes) -> None:
    """The tensor files, with hashes that fit: header, data or bytes; what is accepted must judge without an exception."""
    script, files = Script(data), seed_bundle()
    name = script.choose(("detector.safetensors", "selftest.safetensors"))
    content = files[name]
    size = int.from_bytes(content[:8], "little")
    kind = script.below(3)
    if kind == 0:
        content = script.mutate(content)
    elif kind == 1:
        header = _dump(script.mutate_json(json.loads(content[8 : 8 + size])))
        content = len(header).to_bytes(8, "little") + header + content[8 + size :]
    else:
        values = bytearray(content)
        for _ in range(1 + script.below(4)):
            place = 8 + size + script.below((len(content) - 8 - size) // 4) * 4
            values[place : place + 4] = (
                script.take(4) if script.below(2) else struct.pack("<f", np.float32(script.choose(FLOATS)))
            )
        content = bytes(values)
    bundle = _decode_files(_forged(files | {name: content}))
    if bundle is not None:
        try:
            detector = Detector(bundle, engine=_Engine(script), scorer="cpu")
        except GuardError:
            return
        for features in bundle.self_test.features:
            _check(detector.score(features, np.roll(bundle.self_test.logits[0], script.below(4))))


class _Engine:
    """Returns what no engine should."""

    name = "fuzzed"

    def __init__(self, script: Script) -> None:
        self.script = script

    def run(self, batch: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        return self._array(len(batch)), self._array(len(batch))

    def _array(self, n: int) -> np.ndarray[Any, Any]:
        script = self.script
        shape = script.choose(((n, 4), (n, 4), (n, 4), (n, 4), (n, 5), (n,), (4,), (n + 1, 4), (n, 0), (n, 4, 1), ()))
        dtype = script.choose((np.float32, np.float32, np.float32, np.float64, np.int32, np.complex64, object))
        array = np.zeros(shape, np.float32)
        for i in range(array.size):
            array.flat[i] = script.choose(FLOATS) if script.below(2) else script.below(256) / 255
        array = array.astype(dtype)
        return array[..., ::-1] if script.below(4) == 1 and array.ndim else array


@cache
def _bundle() -> Bundle:
    return tiny_bundle()


def frame(data: bytes) -> None:
    """Any array for a frame, and an engine that returns anything: a verdict, never an exception."""
    script = Script(data)
    shape = tuple(script.choose((0, 1, 2, 3, 4, 7)) for _ in range(script.below(5)))
    dtype = script.choose((np.uint8, np.uint8, np.uint8, np.int8, np.float32, np.bool_, object))
    pixels: Any = np.full(shape, script.below(256)).astype(dtype) if script.below(8) else script.value()
    if script.below(4) == 1 and isinstance(pixels, np.ndarray):
        pixels = pixels.T[::-1] if pixels.ndim else pixels
    detector = Detector(_bundle(), engine=_Engine(script), scorer="cpu", log_likelihoods=script.below(2) == 0)
    for verdict in detector.run([pixels, CLEAN_WEST]):
        _check(verdict)


def _check(verdict: Verdict) -> None:
    if verdict.decision is Decision.ACCEPT:
        assert verdict.margin < 0.0
        assert not verdict.reason
    assert verdict.passes == (verdict.decision in (Decision.ACCEPT, Decision.UNGUARDED))
    assert (verdict.decision is Decision.INVALID) == bool(verdict.reason)


def npz(data: bytes) -> None:
    """An .npz: its bytes, or its member's with a checksum that fits."""
    script, member, file = Script(data), io.BytesIO(), io.BytesIO()
    np.save(member, np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4))
    content = member.getvalue()
    inside = script.below(2)
    if inside:
        content = script.mutate(content)
        if script.below(2):
            header = _dump({"descr": script.value(), "fortran_order": False, "shape": script.value()})
            content = content[:8] + struct.pack("<H", len(header) & 0xFFFF) + header + content[-24:]
    compression = script.choose((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("images.npy", content)
    whole = file.getvalue() if inside else script.mutate(file.getvalue())
    _read(whole, ".npz", read_npz_images)


def image(data: bytes) -> None:
    """An image file of every format."""
    script = Script(data)
    content, channels = script.mutate(script.choose(seed_images())), script.choose((1, 3, 4))
    _read(content, ".png", lambda path: read_image(path, channels))


def _read(content: bytes, suffix: str, read: Callable[[str], np.ndarray[Any, Any]]) -> None:
    descriptor, path = tempfile.mkstemp(suffix)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        pixels = read(path)
        assert pixels.dtype == np.uint8
    except DataError as error:
        assert path in str(error)
        assert "\n" not in str(error)
    finally:
        os.unlink(path)


def uri(data: bytes) -> None:
    """Addresses of sources and sinks."""
    script = Script(data)
    seed = script.choose((b"rtsp://u:p@h:554/s?a=b#transport=tcp&retry=3", b"mqtt:h#qos=1", b"video:a b#c.mp4#loop=1"))
    try:
        text = script.mutate(seed).decode("utf-8", "surrogateescape")
        address = Uri(text, SCHEMES)
        assert address.scheme in SCHEMES | {""}
        assert address.scheme or address.rest == text
        address.take("retry", int, 0)
        address.take("transport", str, "udp")
        address.finish()
    except OptionError as error:
        assert "\n" not in " ".join(str(error).split())


def wire(data: bytes) -> None:
    """An ONNX file: whatever passes holds no tensor outside, by the reading of the library that ONNX uses."""
    script = Script(data)
    model = script.mutate(seed_model())
    if script.below(2):
        for _ in range(1 + script.below(2)):  # a field of external data or its location, spliced in somewhere
            place = script.below(len(model) + 1)
            model = (
                model[:place]
                + script.choose((b"\x70\x01", b"\x6a\x00", b"\xf0\x00\x01", b"\x70\x81\x00"))
                + model[place:]
            )
    try:
        refuse_external_data(model)
    except EngineError:
        return
    try:
        parsed = onnx.ModelProto.FromString(model)
    except Exception:  # noqa: BLE001 - protocol buffers has an error type per implementation
        return
    for tensor in _tensors(parsed):
        assert not tensor.external_data
        assert tensor.data_location != TensorProto.EXTERNAL


def _tensors(message: Any) -> Iterator[TensorProto]:
    """Every tensor in a message, found without knowing where it may be."""
    pending = [message]
    while pending:
        current = pending.pop()
        if isinstance(current, TensorProto):
            yield current
        for field, value in current.ListFields():
            if field.type == field.TYPE_MESSAGE and field.name != "training_info":  # no part of inference
                pending += value if field.is_repeated else [value]


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (manifest, tensors, frame, npz, image, uri, wire)
}
