"""Triton's model configurations as text: protocol-buffer text format, written without protobuf."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Word", "parameters", "tensor", "to_pbtxt"]


class Word(str):
    """An enumeration's value: written without quotes."""

    __slots__ = ()


def to_pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """A message as protocol-buffer text.  A list is a repeated field, a mapping a message; strings are quoted."""
    lines = []
    for name, value in message.items():
        for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{name} {{\n{to_pbtxt(item, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {_scalar(item)}\n")
    return "".join(lines)


def _scalar(value: str | float) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    # JSON's escapes are those of the text format, but for what is not ASCII.
    return "".join(_escape(c) for c in json.dumps(value, ensure_ascii=False)) if isinstance(value, str) else repr(value)


def _escape(character: str) -> str:
    return character if character.isascii() else "".join(f"\\{byte:03o}" for byte in character.encode())


def tensor(name: str, kind: str, dims: Sequence[int]) -> dict[str, Any]:
    """An input or output: its data type without TYPE_, its dimensions without the batch."""
    return {"name": name, "data_type": Word(f"TYPE_{kind}"), "dims": list(dims)}


def parameters(values: Mapping[str, str]) -> list[dict[str, Any]]:
    """Entries of the configuration's parameters."""
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]
