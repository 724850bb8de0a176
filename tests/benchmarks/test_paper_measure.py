"""What is measured on one classifier, on a tiny one: the guard's records beside those of other defences."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import poisoned
import pytest

from benchmarks.paper import __main__ as program
from benchmarks.paper import measure
from benchmarks.paper.classifiers import RATES, Experiment
from benchmarks.paper.measure import KEYS, PARTS, Setting, measure_setting, part
from benchmarks.paper.others import other_defences, patching
from inflight_edge import OptionError
from inflight_edge.calibration.train import Recipe

SETTING = Setting("mnist", "WB", "multi")


@pytest.fixture(scope="module")
def old(case: Experiment) -> Iterator[list[dict[str, Any]]]:
    """All records of the setting; what else is measured while this lasts is measured on the same classifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "experiment", lambda *_, **__: case)
        patch.setattr(measure, "inspected", lambda *_, **__: poisoned.inspected())
        yield measure_setting(SETTING, Path(), None, progress=False)


def test_a_setting_has_the_records_of_every_defence_and_rate(old: list[dict[str, Any]]) -> None:
    detectors = ["guard", "unlearned", "nc", "b3d", "strip"]
    assert [record["detector"] for record in old] == detectors + ["nc"] * len(RATES)
    assert [record["learning_rate"] for record in old[len(detectors) :]] == list(RATES)
    assert all(set(KEYS) <= set(record) for record in old)
    guard, unlearned, *others = old
    assert min(guard["tpr"], unlearned["tpr"]) > 0.9
    assert guard["suspects"] == [poisoned.TARGET]
    assert all(record["asr"] == guard["asr"] for record in (unlearned, *others))
    assert unlearned["sia"] != guard["sia"]
    assert max(record["sia"] for record in old[len(detectors) :]) > 0.5


@pytest.mark.parametrize("again", PARTS)
def test_parts_are_measured_again_and_the_others_kept(again: str, old: list[dict[str, Any]]) -> None:
    marked = [{**record, "commit": "old"} for record in old]
    records = measure_setting(SETTING, Path(), None, progress=False, only=[again], known=marked)
    assert [(part(r), r["detector"], r["learning_rate"]) for r in records] == [
        (part(r), r["detector"], r["learning_rate"]) for r in old
    ]
    assert {part(r) for r in records if r["commit"] != "old"} == {again}
    for one, two in zip(records, old, strict=True):
        assert {key: one[key] for key in ("tpr", "fpr", "sia", "n_triggered")} == {
            key: two[key] for key in ("tpr", "fpr", "sia", "n_triggered")
        }


def test_patching_in_bfloat16_unlearns_as_in_float32(case: Experiment) -> None:
    """Autocast may keep a copy of the weights of before the first step."""
    exact = patching(case, poisoned.inspected(), (0.1,))[0]
    quick = patching(replace(case, recipe=Recipe(1, bfloat16=True)), poisoned.inspected(), (0.1,))[0]
    assert quick["sia"] == pytest.approx(exact["sia"], abs=0.1)
    assert quick["acc_patched"] == pytest.approx(exact["acc_patched"], abs=0.1)


def test_nothing_suspected_leaves_the_others_without_records(case: Experiment) -> None:
    clean = replace(poisoned.inspected(), suspects=(), findings=())
    assert patching(case, clean, RATES) == []
    assert other_defences(case, Path(), clean, progress=False) == []


def test_only_needs_records_to_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        program, "measure_setting", lambda *_, **named: given.append((named["only"], named["known"])) or []
    )
    options = argparse.Namespace(only=["guard"], data=Path(), runs=None, quiet=True)
    for file in (None, tmp_path / "none.json"):
        with pytest.raises(OptionError, match="--only: expected records to keep in"):
            program.measured(SETTING, file, options)
    (tmp_path / "some.json").write_text(json.dumps([{"detector": "guard"}]))
    program.measured(SETTING, tmp_path / "some.json", options)
    options.only = None
    program.measured(SETTING, tmp_path / "none.json", options)
    assert given == [(["guard"], [{"detector": "guard"}]), (PARTS, [])]
