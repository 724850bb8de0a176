"""A frame with its verdict drawn beside it, as a picture of fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._optional import require
from inflight_edge.errors import DataError
from inflight_edge.events import Context, Outcome
from inflight_edge.sinks._picture import picture
from inflight_edge.sinks.record import record

__all__ = ["Annotator"]

# Pixels.  The border lies around the image, not on it: triggers sit in corners.
_BORDER = 8
_LINE = 22
_FONT = 16
_MIN_WIDTH = 352
_MAX_SIDE = 1280

_COLOURS = {"accept": (40, 160, 70), "unguarded": (90, 90, 90), "trigger": (220, 30, 30), "invalid": (230, 150, 0)}
_FLAGGED = ("trigger", "invalid")
_PANEL, _ALARM, _TEXT, _DARK = (24, 24, 24), (120, 0, 0), (240, 240, 240), (0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the image lies: x, y of its corner, its largest width and height, and the size of the whole."""

    x: int
    y: int
    width: int
    height: int
    whole_width: int
    whole_height: int


class Annotator:
    """Draws with Pillow; the first frame's size decides that of all, other sizes are fitted in.

    Small frames are enlarged by whole pixels, large ones reduced to 1280 pixels.
    """

    def __init__(self, context: Context, height: int, width: int) -> None:
        remedy = "pip install 'inflight-edge[video]'"
        self._image, self._draw = require("PIL.Image", remedy), require("PIL.ImageDraw", remedy)
        self._font = _font(require("PIL.ImageFont", remedy))
        self._context = context
        scale = _scale(width, height)
        inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
        # Even, as encoders of subsampled chroma want it.
        whole_width = _even(max(inner_width + 2 * _BORDER, _MIN_WIDTH))
        whole_height = _even(inner_height + 2 * _BORDER + 3 * _LINE + 6)
        self._layout = _Layout(
            (whole_width - inner_width) // 2, _BORDER, inner_width, inner_height, whole_width, whole_height
        )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of every picture."""
        return self._layout.whole_width, self._layout.whole_height

    def draw(self, outcome: Outcome) -> NDArray[np.uint8]:
        """The annotated frame, (height, width, 3) uint8 RGB.  A frame without pixels has its problem as text."""
        layout, values = self._layout, record(outcome, self._context)
        canvas = self._image.new("RGB", self.size)
        pen = self._draw.Draw(canvas)
        colour = _COLOURS[values["decision"]]
        bottom = layout.y + layout.height + _BORDER
        if values["decision"] in _FLAGGED:
            pen.rectangle((0, 0, layout.whole_width - 1, bottom - 1), outline=colour, width=_BORDER - 2)
        self._paste(canvas, pen, outcome)
        pen.rectangle((0, bottom, *self.size), fill=_ALARM if values["alarm"] else _PANEL)
        pen.rectangle((0, bottom, layout.whole_width, bottom + _LINE + 1), fill=colour)
        inks = (_DARK if values["decision"] == "invalid" else _TEXT, _TEXT, _TEXT)  # readable on their ground
        for number, (text, ink) in enumerate(zip(_lines(values), inks, strict=True)):
            place = (_BORDER, bottom + 2 + number * _LINE)
            pen.text(place, self._fitted(pen, text), fill=ink, font=self._font)
        return np.asarray(canvas)

    def _paste(self, canvas: Any, pen: Any, outcome: Outcome) -> None:
        layout = self._layout
        try:
            image = self._image.fromarray(picture(outcome.frame)).convert("RGB")
        except DataError as error:
            text = self._fitted(pen, outcome.frame.problem or str(error))
            pen.text((_BORDER + 4, layout.y + layout.height // 2 - _FONT), text, fill=_TEXT, font=self._font)
            return
        scale = min(layout.width / image.width, layout.height / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        if size != image.size:
            sampling = self._image.Resampling
            image = image.resize(size, sampling.NEAREST if scale > 1 else sampling.BILINEAR, reducing_gap=2.0)
        canvas.paste(image, (layout.x + (layout.width - size[0]) // 2, layout.y + (layout.height - size[1]) // 2))

    def _fitted(self, pen: Any, text: str) -> str:
        """The text, cut where it leaves the picture; what cannot be drawn in one line becomes a question mark."""
        text = "".join(character if character.isprintable() else "?" for character in text)[:200]
        while text and pen.textlength(text, font=self._font) > self.size[0] - 2 * _BORDER:
            text = text[:-1]
        return text


def _lines(values: dict[str, Any]) -> tuple[str, str, str]:
    """Verdict; margin and label; where and when."""
    verdict = str(values["decision"]).upper()
    if values["predicted"] is not None:
        verdict += f"  {_class(values, 'predicted')}"
    if values["source"] is not None:
        verdict += f", really {_class(values, 'source')}"
    if values["margin"] is not None:
        detail = f"margin {values['margin']:+.2f}"
    else:
        detail = values["reason"] or "no margin: the class has no guard"
    if values["label"] is not None:
        detail += f"  label {_class(values, 'label')}"
    if values["alarm"]:
        detail = f"ALARM  {detail}"
    time = f"  {values['time'][11:23]}Z" if values["time"] else ""
    return verdict, detail, f"{values['camera']}  #{values['index']}{time}"


def _font(fonts: Any) -> Any:
    """A font of the system with most scripts of Europe, else Pillow's own, which has ASCII."""
    try:
        return fonts.truetype("DejaVuSans.ttf", _FONT)
    except OSError:
        return fonts.load_default(_FONT)


def _class(values: dict[str, Any], key: str) -> str:
    name = values[f"{key}_name"]
    return str(values[key]) if name is None else str(name)


def _scale(width: int, height: int) -> float:
    longest = max(width, height)
    if longest > _MAX_SIDE:
        return _MAX_SIDE / longest
    return float(max(1, (_MIN_WIDTH - 2 * _BORDER) // longest))


def _even(number: int) -> int:
    return number + number % 2
