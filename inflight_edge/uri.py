"""Addresses of sources and sinks: ``scheme:rest#option=value&option=value``, read strictly."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar
from urllib.parse import parse_qsl

from inflight_edge.errors import OptionError

__all__ = ["Uri", "one_of", "real_number", "whole_number", "without_named_secrets", "without_secrets"]

T = TypeVar("T")


class Uri:
    """An address in parts; options are taken one by one, and one that nobody took is an error.

    The options stand behind ``#``, since the query of a camera's URL is the camera's.

    text    as given, without secrets.   scheme  before the first colon, "" for a plain path.   rest  between scheme and options.
    Raises OptionError for a repeated option.
    """

    def __init__(self, text: str, schemes: frozenset[str]) -> None:
        """schemes: those known; a text that starts with none of them and a colon is a plain path, without options."""
        scheme, colon, rest = text.partition(":")
        self.text = without_secrets(text)
        self.scheme = scheme if colon and scheme in schemes else ""
        self._options: dict[str, str] = {}
        if not self.scheme:
            self.rest = text
            return
        self.rest, _, query = rest.rpartition("#") if "#" in rest else (rest, "", "")
        if "#" in self.rest and rest.startswith("//"):
            raise OptionError(f"{self.text}: expected one # at most, before the options; write one of a login as %23")
        for name, value in parse_qsl(query, keep_blank_values=True):
            if not re.fullmatch(r"[a-z_]+", name):  # not shown: it may be the end of a password
                raise OptionError(f"{self.text}: expected name=value behind #, got other text; write # itself as %23")
            if name in self._options:
                raise OptionError(f"{self.text}: expected the option {name} once, got it twice")
            self._options[name] = value

    def take(self, name: str, convert: Callable[[str], T], default: T) -> T:
        """The option's value, or the default.  Raises OptionError where ``convert`` raises ValueError."""
        if name not in self._options:
            return default
        value = self._options.pop(name)
        try:
            return convert(value)
        except ValueError as error:
            raise OptionError(f"{self.text}: option {name}: {error}") from None

    def finish(self) -> None:
        """Raise OptionError when an option is left that nobody took."""
        if self._options:
            raise OptionError(f"{self.text}: unknown option {', '.join(sorted(self._options))}")


def without_secrets(text: str) -> str:
    """An address for messages; what may be a secret becomes ``...``.

    These are user and password, the query of a URL, the path of a web hook, and what is assigned to a secret's name.
    """
    text = re.sub(r"//.*@", "//...@", text)  # up to the last one: a password may hold any other sign
    text = re.sub(r"^(https?://[^/?#]*/)[^#]+", r"\1...", text)
    text = re.sub(r"\?[^#]*", "?...", text)
    text = re.sub(r"([#&](?:user|password|token)=)[^&]*", r"\1...", text)
    return without_named_secrets(text)


def without_named_secrets(text: str) -> str:
    """Paths of cameras such as ``user=admin_password=abc_channel=1``, without what follows a secret's name."""
    return re.sub(r"(?i)((?:pass|pwd|user|token|key)[\w-]*?=)[^/&_;#\s]+", r"\1...", text)


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A converter for Uri.take: an integer from ``low`` to ``high``, both included."""
    return lambda text: int(_within(text, int, "an integer", low, high))


def real_number(low: float, high: float | None = None) -> Callable[[str], float]:
    """A converter for Uri.take: a finite number from ``low`` to ``high``, both included."""
    return lambda text: _within(text, float, "a number", low, high)


def _within(text: str, convert: Callable[[str], float], kind: str, low: float, high: float | None) -> float:
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    try:
        value = convert(text)
    except ValueError:
        value = math.nan
    if not low <= value <= (sys.float_info.max if high is None else high):  # NaN and infinity are outside
        raise ValueError(f"expected {kind} {limits}, got {text!r}")
    return value


def one_of(values: Sequence[T]) -> Callable[[str], T]:
    """A converter for Uri.take: one of these texts."""

    def converter(text: str) -> T:
        for value in values:
            if value == text:
                return value
        raise ValueError(f"expected one of {', '.join(map(str, values))}, got {text!r}")

    return converter
