"""Addresses of sources and sinks: ``scheme:rest#option=value&option=value``, read strictly."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from urllib.parse import parse_qsl

from inflight_edge.errors import OptionError

__all__ = ["Uri"]

T = TypeVar("T")


class Uri:
    """An address in parts; options are taken one by one, and one that nobody took is an error.

    The options stand behind ``#``, since the query of a camera's URL is the camera's.

    text    as given.   scheme  before the first colon, "" for a plain path.   rest  between scheme and options.
    Raises OptionError for a repeated option.
    """

    def __init__(self, text: str, schemes: frozenset[str]) -> None:
        """schemes: those known; a text that starts with none of them and a colon is a plain path, without options."""
        scheme, colon, rest = text.partition(":")
        self.text = text
        self.scheme = scheme if colon and scheme in schemes else ""
        self._options: dict[str, str] = {}
        if not self.scheme:
            self.rest = text
            return
        self.rest, _, query = rest.rpartition("#") if "#" in rest else (rest, "", "")
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name in self._options:
                raise OptionError(f"{text}: expected the option {name} once, got it twice")
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
