"""Settings: options and TOML become one checked value; what is wrong is named."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from inflight_edge import DependencyError, OptionError
from inflight_edge.actions import AlarmRule
from inflight_edge.affinity import parse_cpus, pin
from inflight_edge.cli import _parser
from inflight_edge.region import Region
from inflight_edge.settings import Settings, read_settings

GIVEN = {"bundle": "b", "source": ["cam"]}


def test_every_setting_is_an_option_and_the_other_way_round() -> None:
    (action,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = {a.dest for a in action.choices["run"]._actions} - {"help", "config", "json", "quiet"}
    assert options == {field.name for field in fields(Settings)}


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'bundle = "file"\nsource = ["a", "b"]\nalarm = "2/3"\nqueue = 9\nregion = "0,0,8,8"\nalpha = 0.05\n'
    )
    settings = read_settings(path, {"source": ["c"], "queue": 7, "sink": [], "repair": None})
    assert settings == Settings(
        bundle="file", source=("c",), alarm="2/3", queue=7, region="0,0,8,8", alpha=0.05
    )  # fmt: skip
    assert settings.alarm_rule == AlarmRule(2, 3)
    assert settings.region_of_interest == Region(0, 0, 8, 8)
    assert settings.processors == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('queu = 3', "unknown key queu; known are alarm, alpha, batch, bundle"),
        ('queue = 0', "queue: expected a whole number from 1, got 0"),
        ('queue = "3"', "queue: expected a whole number, got '3'"),
        ('queue = true', "queue: expected a whole number, got True"),
        ('repair = 1', "repair: expected true or false, got 1"),
        ('sink = "x"', "sink: expected a list of texts, got 'x'"),
        ('engine = 1', "engine: expected a text, got 1"),
        ('max_seconds = "5"', "max_seconds: expected a number, got '5'"),
        ('sink = [1]', r"sink: expected a list of texts, got \(1,\)"),
        ('max_seconds = -1', "max_seconds: expected a number > 0, got -1"),
        ('max_seconds = nan', "max_seconds: expected a number > 0, got nan"),
        ('keep = "some"', "keep: expected one of newest, oldest, all, got 'some'"),
        ('log_format = "xml"', "log_format: expected one of text, json, got 'xml'"),
        ('alarm = "5"', "alarm: expected n/m such as 3/5, got '5'"),
        ('region = "1"', "region: expected x,y,width,height"),
        ('cpus = ["fan=1"]', "cpus: expected ROLE=NUMBERS with each of capture, inference, sinks at most once"),
        ('cpus = ["sinks=9999"]', "cpus: expected some of "),
        ('source = []', "source: expected at least one, got none"),
        ('= 3', "run.toml: expected TOML: "),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    given = {key: value for key, value in GIVEN.items() if not text.startswith(key)}
    with pytest.raises(OptionError, match=message):
        read_settings(path, given)


def test_missing_file_and_missing_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"absent.toml: cannot be read: No such file or directory"):
        read_settings(tmp_path / "absent.toml", GIVEN)
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    with pytest.raises(OptionError, match=r"latin.toml: cannot be read: 'utf-8' codec"):
        read_settings(tmp_path / "latin.toml", GIVEN)
    with pytest.raises(OptionError, match="bundle: expected one, got none; give it, or a --config file with `bundle`"):
        read_settings(None, {"source": ["cam"]})
    with pytest.raises(OptionError, match="source: expected one, got none"):
        read_settings(None, {"bundle": "b", "source": None})


def test_python_310_without_tomli_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.toml").write_text("queue = 3")
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(DependencyError, match=r"tomli: needed here .* pip install 'inflight-edge.config.'"):
        read_settings(tmp_path / "run.toml", GIVEN)


def test_processors_are_read_and_a_thread_is_pinned() -> None:
    usable = sorted(os.sched_getaffinity(0))
    low, high = usable[0], usable[-1]
    assert parse_cpus([f"inference={high}", f"capture={low},{high}"]) == {
        "inference": frozenset({high}),
        "capture": frozenset({low, high}),
    }
    if usable == list(range(low, high + 1)):
        assert parse_cpus([f"sinks={low}-{high}"]) == {"sinks": frozenset(usable)}
    for text in ("inference", "inference=", "inference=a", "inference=1-", "inference=3-2"):
        with pytest.raises(OptionError, match=re.escape(f"got {text!r}")):
            parse_cpus([text])
    with pytest.raises(OptionError, match="at most once"):
        parse_cpus([f"sinks={low}", f"sinks={low}"])
    try:
        pin(frozenset({low}))
        assert os.sched_getaffinity(0) == {low}
        pin(frozenset())
        assert os.sched_getaffinity(0) == {low}
    finally:
        os.sched_setaffinity(0, usable)
