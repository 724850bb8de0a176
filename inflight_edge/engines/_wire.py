"""A look into an ONNX file's protocol-buffer encoding: does any tensor keep its data in another file?

Some versions of ONNX Runtime read such a file from wherever the model says, past every hash; none is let near one.
"""

from __future__ import annotations

from collections.abc import Iterator

from inflight_edge.errors import EngineError

__all__ = ["refuse_external_data"]

# Message type -> field number -> type of the message in it.  Source: onnx.proto, IR version 10.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def refuse_external_data(model: bytes) -> None:
    """Raise EngineError when the ONNX file names other files for its tensors, or is no protocol-buffer message."""
    # Other formats that an engine would read can be written so that they parse as a message too, but not from this byte on:
    # field 1, ir_version, which exporters write first.
    if model[:1] != b"\x08":
        raise _damaged()
    pending = [("model", memoryview(model))]
    while pending:
        kind, message = pending.pop()
        for number, wire, value in _fields(message):
            if kind == "tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)):
                raise EngineError(
                    "model: expected an ONNX file with its weights inside, got external data; export it in one file"
                )
            inner = _FIELDS[kind].get(number)
            if inner is not None and wire == _BYTES and isinstance(value, memoryview):
                pending.append((inner, value))


def _fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Field number, wire type and value of each field of a message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position, bits=32)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise _damaged()
        if wire == _VARINT:
            value, position = _varint(message, position, bits=64)
            yield number, wire, value
            continue
        if wire == _BYTES:
            length, position = _varint(message, position, bits=31)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise _damaged()
        if position + length > len(message):
            raise _damaged()
        yield number, wire, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int, *, bits: int) -> tuple[int, int]:
    """A number of at most so many bits: readers that cut a longer one would see another number than this one does."""
    value = 0
    for shift in range(0, bits + 6, 7):
        if position >= len(message):
            raise _damaged()
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> bits:
                break
            return value, position
    raise _damaged()


def _damaged() -> EngineError:
    return EngineError("model: expected an ONNX file, got damaged or other data; export it again")
