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
from benchmarks.paper.measure import KEYS, PARTS, Setting, measure_setting, missing, part
from benchmarks.paper.others import other_defences, patching
from inflight_edge import ModelError, OptionError
from inflight_edge.calibration.demo import export_program
from inflight_edge.calibration.train import Recipe

SETTING = Setting("mnist", "WB", "multi")


class Harmless:
    """Shows every image as black, which is one class and not the one that is named."""

    def embed(self, images: Any) -> Any:
        return images * 0


@pytest.fixture(scope="module")
def old(case: Experiment) -> Iterator[list[dict[str, Any]]]:
    """All records of the setting; what else is measured while this lasts is measured on the same classifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "experiment", lambda *_, **__: case)
        patch.setattr(measure, "inspected", lambda *_, **__: poisoned.inspected())
        yield measure_setting(SETTING, Path(), None, progress=False)


def test_a_setting_has_the_records_of_every_defence_and_rate(old: list[dict[str, Any]]) -> None:
    detectors = ["guard", "unlearned", "nc", "nc-target", "b3d", "strip"]
    assert [record["detector"] for record in old] == detectors + ["nc"] * len(RATES)
    assert [record["learning_rate"] for record in old[len(detectors) :]] == list(RATES)
    assert all(set(KEYS) <= set(record) for record in old)
    guard, unlearned, *others = old
    assert min(guard["tpr"], unlearned["tpr"]) > 0.9
    assert guard["suspects"] == [poisoned.TARGET]
    assert [(found["target"], found["method"]) for found in guard["findings"]] == [
        (f.target, f.method) for f in poisoned.inspected().findings
    ]
    assert {(r["dataset"], r["network"], r["attack"], r["setting"], r["seed"]) for r in old} == {
        ("digits", "tiny", "WB", "multi", 0)
    }
    assert all({"recipe", "commit", "python", "measured"} <= set(record) for record in old)
    assert all(record["asr"] == guard["asr"] for record in (unlearned, *others))
    assert unlearned["sia"] != guard["sia"]
    assert set(unlearned["held_out"]) == {"held_out_images", "without", "with"}
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


def test_other_defences_in_bfloat16_tell_what_those_in_float32_do(
    case: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inflight_edge.calibration.train.has_bfloat16", lambda: True)
    model = export_program(case.network, case.preprocess.input_shape, tmp_path / "classifier.pt2")
    exact = other_defences(case, model, poisoned.inspected(), progress=False)
    quick = other_defences(replace(case, recipe=Recipe(1, bfloat16=True)), model, poisoned.inspected(), progress=False)
    assert [record["detector"] for record in quick] == [record["detector"] for record in exact]
    for one, two in zip(quick, exact, strict=True):
        assert one["auroc"] == pytest.approx(two["auroc"], abs=0.1)


def test_copy_that_cannot_be_made_costs_no_other_record(
    old: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = measure._guard

    def guard(*arguments: Any, unlearn: str = "never") -> dict[str, Any]:
        if unlearn == "always":
            raise ModelError("model: unlearning costs too much")
        return real(*arguments)

    monkeypatch.setattr(measure, "_guard", guard)
    records = measure_setting(SETTING, Path(), None, progress=False, only=["guard", "unlearned"])
    assert [record["detector"] for record in records] == ["guard"]
    assert "no copy: model: unlearning costs too much" in capsys.readouterr().err


def test_trigger_that_sends_nothing_to_the_class_named_has_no_source_to_find(case: Experiment) -> None:
    other = (poisoned.TARGET + 1) % 7
    named = replace(poisoned.inspected(), suspects=(other,))
    (record,) = patching(replace(case, trigger=Harmless()), named, (0.1,))
    assert (record["target_class"], record["n_triggered"], record["sia"]) == (other, 0, None)
    assert record["acc_patched"] is not None


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


@pytest.mark.parametrize(
    ("setting", "have", "lacks"),
    [
        (SETTING, (), PARTS),
        (SETTING, ("guard", "strip"), ("unlearned", "patching")),
        (Setting("mnist", "WB", "all"), ("guard",), ("unlearned",)),
        (Setting("faces_standin", "WM", "multi"), ("guard",), ("defences", "patching")),
        (Setting("cifar10", "none", "none"), (), ("guard", "unlearned")),
    ],
)
def test_what_records_lack(setting: Setting, have: tuple[str, ...], lacks: tuple[str, ...]) -> None:
    records = [{"detector": name, "suspects": [9]} for name in have]
    assert missing(setting, records) == lacks
    assert missing(setting, [{"detector": "guard", "suspects": []}]) == ()


def test_a_table_is_resumed_where_records_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guard, strip = ({"detector": name, "suspects": [9]} for name in ("guard", "strip"))
    whole, begun = Setting("faces_standin", "SQ", "multi"), Setting("faces_standin", "WM", "multi")
    nc = {"detector": "nc", "learning_rate": 0.1}
    (tmp_path / whole.file).write_text(json.dumps([guard, strip, nc]))
    (tmp_path / begun.file).write_text(json.dumps([guard, strip]))
    asked: list[Any] = []

    def measured(setting: Setting, *_: Any, only: Any, known: Any, **__: Any) -> list[Any]:
        asked.append((setting, only))
        return [*known, nc]

    monkeypatch.setattr(program, "measure_setting", measured)
    monkeypatch.setattr(program, "TABLES", {1: [whole, begun]})
    line = ["paper", "--table", "1", "--data", "d", "--results", str(tmp_path)]
    for options, expected in (
        (["--resume"], [(begun, ("patching",))]),
        (["--resume"], []),
        (["--only", "guard"], [(whole, ["guard"]), (begun, ["guard"])]),
        ([], [(s, ("guard", "defences", "patching")) for s in (whole, begun)]),
    ):
        monkeypatch.setattr("sys.argv", [*line, *options])
        assert program.main() == 0
        assert asked == expected
        assert f"{len(expected)} of 2 settings to run" in capsys.readouterr().err
        asked.clear()
    (tmp_path / whole.file).unlink()
    monkeypatch.setattr("sys.argv", [*line, "--only", "guard"])
    assert program.main() == 2
    assert f"--only: expected records to keep in {tmp_path / whole.file}" in capsys.readouterr().err
