"""Text for people: that of others, such as names of files and cameras, made safe to print; tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["is_name", "printable", "table"]


def is_name(text: object) -> bool:
    """Whether a class or a layer may be called so: text that can be printed."""
    return isinstance(text, str) and bool(text) and text.isprintable()


def printable(text: str) -> str:
    """Text for one line: line breaks and other control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Left-aligned columns, a header and a rule."""
    cells = [[printable(str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
