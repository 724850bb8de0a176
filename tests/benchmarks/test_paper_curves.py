"""Robustness and ablation on a classifier of seconds: what is measured, not how well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import poisoned
import pytest

from benchmarks.paper import ablation, classifiers, robustness
from benchmarks.paper.classifiers import Experiment
from inflight_edge.calibration.inspection import Inspection


@pytest.fixture
def known_inspection(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: object, **__: object) -> Inspection:
        return poisoned.inspected()

    monkeypatch.setattr(classifiers, "inspect", found)


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)


def test_changes_do_what_their_name_says() -> None:
    frames = images()
    assert np.array_equal(robustness.brightness(frames, 0), frames)
    assert robustness.brightness(frames, 40).astype(int).sum() > frames.astype(int).sum()
    assert np.array_equal(robustness.noise(frames, 0), frames)
    assert np.array_equal(robustness.noise(frames, 8), robustness.noise(frames, 8))
    assert np.array_equal(robustness.shift(frames, 1)[:, 1:, 1:], frames[:, :-1, :-1])
    assert robustness.blur(frames, 1.0).std() < frames.std()
    assert np.array_equal(robustness.blur(frames, 0), frames)
    errors = [np.abs(robustness.jpeg(frames, q).astype(int) - frames).mean() for q in (95, 20)]
    assert 0 < errors[0] < errors[1]
    colour = np.repeat(frames, 3, axis=3)
    assert robustness.jpeg(colour, 80).shape == colour.shape


@pytest.mark.usefixtures("known_inspection")
def test_robustness_has_a_record_for_every_change(
    case: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(robustness, "CLEAN_COUNTS", (40,))
    few = {name: (change, amounts[:2]) for name, (change, amounts) in robustness.CHANGES.items()}
    monkeypatch.setattr(robustness, "CHANGES", few)
    records = robustness.measure(case, ("frames", "clean"))
    assert {record["change"] for record in records} == {*robustness.CHANGES, "clean images a class"}
    records += robustness.measure(case, ("target",))
    assert [record["change"] for record in records[-2:]] == ["wrong target", "wrong target too"]
    unchanged = [r for r in records if (r["change"], r["amount"]) in (("noise", 0), ("blur", 0), ("shift", 0))]
    assert len({(r["tpr"], r["fpr"], r["sia"]) for r in unchanged}) == 1
    assert unchanged[0]["tpr"] > 0.9
    (missed,) = (r for r in records if r["change"] == "wrong target")
    assert missed["n_triggered"] < unchanged[0]["n_triggered"] / 2  # frames of the true target pass unguarded
    robustness.plot([{**classifiers.identity(case), **record} for record in records], tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().count("axes_") >= 6


def test_only_some_parts_keep_the_other_records_of_the_file(
    case: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def records(of: tuple[str, ...], value: float) -> list[dict[str, Any]]:
        figures = dict.fromkeys(("acc", "asr", "tpr", "fpr", "sia"), value)
        return [{"change": change, "amount": 1.0, **figures} for change in of]

    file = tmp_path / "records.json"
    file.write_text(json.dumps(records(("noise", "clean images a class", "wrong target too"), 0.0)))
    monkeypatch.setattr(classifiers, "experiment", lambda *_, **__: case)
    monkeypatch.setattr(robustness, "measure", lambda _, only: records(("noise", "wrong target"), float(len(only))))
    named = ["--dataset", "mnist", "--data", "d", "--json", str(file)]
    assert robustness.main([*named, "--only", "frames", "target"]) == 0
    found = [(record["change"], record["sia"]) for record in json.loads(file.read_text())]
    assert found == [("noise", 2.0), ("clean images a class", 0.0), ("wrong target", 2.0)]
    assert robustness.main(named) == 0
    assert [record["sia"] for record in json.loads(file.read_text())] == [3.0, 3.0]


@pytest.mark.usefixtures("known_inspection")
def test_every_idea_is_judged_on_held_out_estimates_and_true_triggers(
    case: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from networks_for_tests import export
    from torch import zeros

    from inflight_edge.calibration.model import classifier_from_program

    def load(program: object, *, image_shape: tuple[int, int, int], feature_layer: str | None) -> object:
        exported = export(case.network, zeros(2, 1, 12, 12), free={0: "batch"})
        return classifier_from_program(exported, image_shape=image_shape, feature_layer=feature_layer)

    monkeypatch.setattr(ablation, "export_program", lambda *_: Path())
    monkeypatch.setattr(ablation, "load_classifier", load)
    records = ablation.measure(case)
    assert [record["idea"] for record in records] == [idea.name for idea in ablation.IDEAS]
    *judged, copy = records
    errors = ("held_out_error", "held_out_source_error")
    assert [copy[key] for key in errors] == [None, None]  # it was trained on what would judge it
    assert all(0.0 <= record[key] <= 1.0 for record in judged for key in errors)
    assert all(0.0 <= record[key] <= 1.0 for record in records for key in ("tpr", "fpr", "sia"))
    plain, shipped, midway = (
        next(record for record in records if record["idea"].startswith(name))
        for name in ("plain", "shipped:", "boundary")
    )
    assert shipped["tpr"] > 0.95
    assert shipped["held_out_error"] <= plain["held_out_error"]
    assert (midway["tpr"], midway["fpr"]) != (plain["tpr"], plain["fpr"])
    assert "unlearned." in copy["feature_layer"]


@pytest.mark.usefixtures("known_inspection")
def test_an_inspection_is_kept_beside_the_checkpoint(
    case: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = replace(case, runs=tmp_path)
    first = classifiers.inspected(kept, poisoned.classifier())
    assert len(list(tmp_path.glob("digits.inspection-*/patterns.safetensors"))) == 1
    monkeypatch.setattr(classifiers, "inspect", lambda *_, **__: pytest.fail("inspected again"))
    again = classifiers.inspected(kept, poisoned.classifier())
    assert again.suspects == first.suspects
    np.testing.assert_array_equal(again.estimates[poisoned.TARGET].mask, first.estimates[poisoned.TARGET].mask)
    monkeypatch.setattr(classifiers, "inspect", lambda *_, **__: first)
    classifiers.inspected(replace(kept, defence=kept.defence.subset(np.arange(50))), poisoned.classifier())
    assert len(list(tmp_path.glob("digits.inspection-*"))) == 2


@pytest.mark.parametrize("program", [ablation, robustness], ids=["ablation", "robustness"])
def test_the_classifier_that_the_arguments_name_is_measured(
    program: ModuleType, case: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures = ("acc", "asr", "tpr", "fpr", "sia", "held_out_error", "held_out_source_error")
    record = {"idea": "one", "change": "one", "amount": 1.0, **dict.fromkeys(figures, 0.5)}
    asked: list[Any] = []

    def trained(*named: Any, **places: Any) -> Experiment:
        asked.append((*named, *places.values()))
        return case

    monkeypatch.setattr(classifiers, "experiment", trained)
    monkeypatch.setattr(program, "measure", lambda given, *_: [record] if given is case else [])
    named = ["--dataset", "mnist", "--attack", "CB", "--setting", "single", "--seed", "3", "--data", "d", "--runs", "r"]
    assert program.main([*named, "--json", str(tmp_path / "records.json")]) == 0
    assert asked == [("mnist", "CB", "single", 3, Path("d"), Path("r"))]
    assert json.loads((tmp_path / "records.json").read_text())[0].items() >= record.items()


@pytest.mark.parametrize("program", [ablation, robustness], ids=["ablation", "robustness"])
def test_data_that_is_not_there_is_one_line(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--dataset", "mnist", "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{program.__name__}: error: {tmp_path}")
    assert error.count("\n") == 1
