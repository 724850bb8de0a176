"""The record of an outcome is what docs/outcome-schema.md and its JSON Schema say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from outcomes import accepted, context, dropped, every_kind, invalid, triggered, unguarded, unreadable

from inflight_edge.events import Outcome
from inflight_edge.sinks.record import SCHEMA_VERSION, encode, flagged, record, timestamp
from inflight_edge.verdict import Decision, Verdict

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "outcome.schema.json").read_text())
PAGE = (DOCS / "outcome-schema.md").read_text()
validator = jsonschema.Draft202012Validator(SCHEMA)


def test_records_of_every_kind_are_valid() -> None:
    validator.check_schema(SCHEMA)
    for outcome in every_kind():
        validator.validate(json.loads(encode(outcome, context())))


def test_schema_page_and_record_have_the_same_keys() -> None:
    keys = list(record(accepted(0), context()))
    assert list(SCHEMA["properties"]) == SCHEMA["required"] == keys
    table = PAGE.partition("## Half a line")[0]
    assert re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE) == [
        (key, SCHEMA["properties"][key]["description"]) for key in keys
    ]
    assert SCHEMA["properties"]["schema"]["const"] == SCHEMA_VERSION == 1
    assert SCHEMA["properties"]["decision"]["enum"] == [*(decision.value for decision in Decision), None]


def test_the_page_shows_a_real_record() -> None:
    shown = json.loads(re.search(r"^```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1])  # type: ignore[index]
    assert shown == {**record(triggered(12), context()), "captured_ns": 8123456789, "time": timestamp(OUTCOME_NS)}


OUTCOME_NS = 1_795_507_200_123_456_000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("margin", "0"), ("decision", "accepted"), ("decision", None), ("log_likelihoods", {"north": 0.0}),
        ("log_likelihoods", {"0": "NaN"}), ("time", "2026-11-24 08:00:00"), ("drop", "late"), ("schema", 2),
        ("label", -1), ("stages_ns", {"engine": 0.5}), ("passes", 1), ("camera", None),
    ],
)  # fmt: skip
def test_the_schema_refuses_what_is_wrong(key: str, value: Any) -> None:
    assert not validator.is_valid({**record(accepted(0), context()), key: value})


def test_the_schema_wants_every_key() -> None:
    whole = record(accepted(0), context())
    for key in whole:
        assert not validator.is_valid({name: value for name, value in whole.items() if name != key}), key
    assert validator.is_valid({**whole, "added_later": 1})


def test_numbers_that_are_not_finite_are_null() -> None:
    got = record(accepted(0), context())
    assert got["log_likelihoods"] == {"0": -10.0, "1": -20.5, "3": None}
    assert got["margin"] == -10.5
    got = record(invalid(0), context())
    assert (got["margin"], got["log_likelihoods"]) == (None, {"0": None, "1": -20.5})
    assert record(unguarded(0), context())["margin"] is None


def test_a_drop_has_no_verdict_and_does_not_pass() -> None:
    got = record(dropped(5), context())
    assert (got["decision"], got["passes"], got["label"], got["drop"]) == (None, False, None, "newer frame")
    assert got["stages_ns"] == {}


def test_names_of_classes() -> None:
    got = record(triggered(0), context())
    assert (got["predicted_name"], got["source_name"], got["label_name"]) == ("west", "north", "north")
    other = record(Outcome(accepted(0).frame, Verdict(Decision.UNGUARDED, 9), label=9), context())
    assert (other["predicted"], other["predicted_name"]) == (9, None)  # no such name: never another one's


def test_plain_numbers_of_numpy_are_taken() -> None:
    verdict = Verdict(Decision.TRIGGER, np.int64(3), np.int32(0), np.float32(1.5))  # type: ignore[arg-type]
    outcome = Outcome(accepted(0).frame, verdict, label=np.int64(0), alarm=np.bool_(True))  # type: ignore[arg-type]
    got = json.loads(encode(outcome, context()))
    assert (got["predicted"], got["source"], got["margin"], got["label"], got["alarm"]) == (3, 0, 1.5, 0, True)


def test_one_line_whatever_the_names_hold() -> None:
    outcome = triggered(0, camera='line\n"two"\u2028', name="\udcff\ud800 süd \N{PILE OF POO}")
    line = encode(outcome, context())
    assert len(line.splitlines()) == 1
    got = json.loads(line)
    assert got["camera"] == 'line\n"two"\u2028'
    got["name"].encode()  # no half surrogate, which strict readers refuse
    assert got["name"].endswith(" süd \N{PILE OF POO}")


def test_time_is_utc_with_microseconds() -> None:
    assert timestamp(1_795_507_200_123_456_789) == "2026-11-24T08:00:00.123456Z"
    assert timestamp(1_000_000_000_000_000_000) == "2001-09-09T01:46:40.000000Z"
    assert timestamp(0) is None


def test_flagged_is_judged_and_refused() -> None:
    kinds = (accepted, triggered, unguarded, invalid, unreadable, dropped)
    assert [flagged(make(0)) for make in kinds] == [False, True, False, True, True, False]
