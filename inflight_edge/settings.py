"""Settings of the `run` command: from the command line and from a TOML file, validated once."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from inflight_edge._optional import require
from inflight_edge.actions import AlarmRule
from inflight_edge.affinity import parse_cpus
from inflight_edge.engines import EngineOptions, Optimisation, Wait
from inflight_edge.errors import OptionError
from inflight_edge.frame_queue import POLICIES, Keep
from inflight_edge.logs import FORMATS
from inflight_edge.region import Region
from inflight_edge.scoring import Backend

__all__ = ["Settings", "read_settings"]

# Name of the setting: types that a value of it may have.
_TYPES: dict[str, tuple[type, ...]] = {
    "max_seconds": (float, int),
    "alpha": (float, int),
    **dict.fromkeys(("repair", "no_arena", "no_graph"), (bool,)),
    **dict.fromkeys(("threads", "batch", "queue", "sink_queue", "max_frames"), (int,)),
    **dict.fromkeys(("source", "sink", "cpus"), (list, tuple)),
}

# What TOML calls the first of these types.
_NAMES: dict[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list of texts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `run` does; the names are those of its options, see README.  Raises OptionError for a value out of range."""

    bundle: str
    source: tuple[str, ...]
    sink: tuple[str, ...] = ()
    web: str | None = None
    key: str | None = None
    engine: str = "onnxruntime"
    precision: str = "fp32"
    scorer: Backend = "auto"
    threads: int | None = None
    no_arena: bool = False
    optimisation: Optimisation = "all"
    memory: Literal["auto", "mapped", "copied"] = "auto"
    wait: Wait = "blocking"
    no_graph: bool = False
    plan: str | None = None
    alpha: float | None = None
    batch: int | None = None
    keep: Keep | None = None
    queue: int = 4
    sink_queue: int = 256
    max_frames: int | None = None
    max_seconds: float | None = None
    repair: bool = False
    alarm: str = "1/1"
    region: str | None = None
    cpus: tuple[str, ...] = ()
    log_format: str = "text"

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            types = _TYPES.get(field.name, (str,))
            if value is None and field.default is None:
                continue
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise OptionError(f"{field.name}: expected {_NAMES[types[0]]}, got {value!r}")
            if list in types and not all(isinstance(item, str) for item in cast("tuple[Any, ...]", value)):
                raise OptionError(f"{field.name}: expected a list of texts, got {value!r}")
        for name in ("batch", "queue", "sink_queue", "max_frames", "threads"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise OptionError(f"{name}: expected a whole number from 1, got {value}")
        if self.max_seconds is not None and not 0.0 < self.max_seconds <= 1e9:
            raise OptionError(f"max_seconds: expected a number > 0, got {self.max_seconds}")
        for name, known in (("keep", POLICIES), ("log_format", FORMATS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise OptionError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if not self.source:
            raise OptionError("source: expected at least one, got none; give --source, or `source` in the file")
        _ = self.alarm_rule, self.region_of_interest, self.processors, self.engine_options

    @property
    def engine_options(self) -> EngineOptions:
        """What only one engine has."""
        return EngineOptions(
            arena=not self.no_arena,
            optimisation=self.optimisation,
            memory=self.memory,
            wait=self.wait,
            graph=not self.no_graph,
            plan=self.plan,
        )

    @property
    def sinks(self) -> tuple[str, ...]:
        """Addresses of the sinks, the live page among them."""
        return self.sink if self.web is None else (*self.sink, f"web:{self.web}")

    @property
    def alarm_rule(self) -> AlarmRule:
        """``alarm``, parsed."""
        return AlarmRule.parse(self.alarm)

    @property
    def region_of_interest(self) -> Region | None:
        """``region``, parsed."""
        return None if self.region is None else Region.parse(self.region)

    @property
    def processors(self) -> dict[str, frozenset[int]]:
        """``cpus``, parsed."""
        return parse_cpus(self.cpus)


def read_settings(path: str | os.PathLike[str] | None, given: Mapping[str, Any]) -> Settings:
    """Settings from a TOML file, if there is one, and what the command line gave, which takes precedence.

    given: by name of the setting; None and empty lists count as not given.  Raises OptionError, DependencyError.
    """
    table = {} if path is None else _read_toml(Path(path))
    known = {field.name for field in fields(Settings)}
    if unknown := sorted(set(table) - known):
        raise OptionError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    table |= {name: value for name, value in given.items() if value not in (None, [])}
    for name in ("bundle", "source"):
        if name not in table:
            raise OptionError(f"{name}: expected one, got none; give it, or a --config file with `{name}`")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}
    return Settings(**values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    toml = _toml()
    try:
        return cast("dict[str, Any]", toml.loads(text))
    except toml.TOMLDecodeError as error:
        raise OptionError(f"{path}: expected TOML: {error}") from None


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    return require("tomli", "pip install 'inflight-edge[config]', or give the settings as options")
