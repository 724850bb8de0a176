"""The table of results: means, spreads and intervals that can be checked by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.cells import chosen
from benchmarks.paper.tables import classifiers, documents, main, others, patching, summary, verdicts
from benchmarks.paper.targets import targets, unlearned


def record(seed: int, fpr: float, sia: float | None, n_triggered: int = 10) -> dict[str, Any]:
    names = {
        "dataset": "mnist",
        "network": "lenet5",
        "attack": "WB",
        "setting": "multi",
        "seed": seed,
        "detector": "guard",
    }
    figures = {"acc": 0.5, "asr": 1.0 - seed / 10, "tpr": 1.0, "fpr": fpr, "sia": sia}
    return {**names, **figures, "suspects": [9], "n_clean": 10, "n_triggered": n_triggered}


def cells(*records: dict[str, Any], of: Callable[[list[dict[str, Any]]], str] = verdicts) -> list[str]:
    return [cell.strip() for cell in of(list(records)).splitlines()[2].split("|")[1:-1]]


def test_one_seed_has_an_interval_and_no_spread() -> None:
    # Clopper and Pearson, none of ten: 0 to 1 - .025 ** (1 / 10).
    row = cells(record(0, 0.0, 1.0))
    assert row[:2] == ["MNIST, lenet5, WB multi-class", "0"]
    assert row[2:5] == ["1.0000 [0.6915, 1.0000]", "0.0000 [0.0000, 0.3085]", "1.0000 [0.6915, 1.0000]"]
    assert row[5:] == ["-", "-", "1.0000 / 0.0022 / 0.9764", "-"]
    assert cells(record(0, 0.0, 1.0), of=classifiers)[1:] == ["0", "9", "0.5000", "1.0000", "-", "-"]


def test_frames_of_all_seeds_are_pooled() -> None:
    row = cells(record(1, 0.1, 1.0), record(0, 0.0, 0.9))
    assert row[1] == "0, 1"
    assert cells(record(1, 0.1, 1.0), record(0, 0.0, 0.9), of=classifiers)[4] == "0.9500 (0.9000 to 1.0000)"
    assert row[3] == "0.0500 (0.0000 to 0.1000) [0.0013, 0.2487]"  # one of twenty


def test_rate_without_frames_is_a_dash() -> None:
    assert cells(record(0, 0.0, None, n_triggered=0))[4] == "-"


def test_other_defences_stand_beside_the_guard() -> None:
    strip = {**record(0, 0.0625, None), "detector": "strip", "tpr": 0.125, "tpr_at_fpr05": 0.25, "auroc": 0.5}
    lines = others([record(0, 0.0, 1.0), strip]).splitlines()
    assert len(lines) == 3
    assert [cell.strip() for cell in lines[2].split("|")[2:-1]] == [
        "STRIP", "0", "0.1250", "0.0625", "0.2500", "0.5000", "1.0000 / 0.0000", "-",
    ]  # fmt: skip
    assert "STRIP" not in verdicts([record(0, 0.0, 1.0), strip])


def test_source_accuracy_is_set_against_the_classifiers_own() -> None:
    row = cells({**record(0, 0.0, 0.9), "acc_source": 0.95}, {**record(1, 0.0, 0.8), "acc_source": 0.8})
    assert row[5] == "0.9737 (0.9474 to 1.0000)"


def test_clean_classifier_has_a_row_among_the_classifiers_alone() -> None:
    nothing = dict.fromkeys(("asr", "tpr", "fpr", "sia", "n_clean", "n_triggered"))
    clean = {**record(0, 0.0, None), **nothing, "attack": "none", "setting": "none", "suspects": []}
    row = cells(clean, of=classifiers)
    assert row == ["MNIST, lenet5, no attack", "0", "none", "0.5000", "-", "-", "-"]
    assert cells({**clean, "dataset": "cifar10"}, of=classifiers)[6] == "0.9387 / - / -"
    assert verdicts([clean]) == ""


def test_classes_that_the_inspections_named() -> None:
    assert cells({**record(0, 0.0, 1.0), "suspects": [1, 2, 0]}, of=classifiers)[2] == "0 to 2"
    assert cells(record(0, 0.0, 1.0), {**record(1, 0.0, 1.0), "suspects": [9, 3]}, of=classifiers)[2] == "3, 9; 9"


def test_the_papers_figures_of_cifar10_stand_beside() -> None:
    guard = {**record(0, 0.0, 1.0), "dataset": "cifar10", "asr_estimated": 0.75}
    assert cells(guard, of=classifiers)[5:] == ["0.7500", "0.9340 / 0.9497 / 0.9354"]
    patched = {**guard, "detector": "nc", "learning_rate": 0.1, "sia": 0.25}
    assert cells({**guard, "tpr_alpha05": 0.5, "fpr_alpha05": 0.0625}, patched)[6:] == [
        "0.5000 / 0.0625",
        "0.9992 / 0.0000 / 0.8945",
        "0.2500 / 0.8086",
    ]
    assert cells(guard, {**guard, "detector": "strip"}, of=others)[-1] == "0.0011 / 0.0633"


def test_patching_has_a_column_for_each_rate_and_is_no_filter() -> None:
    rates = [{**record(seed, 0.0, sia), "detector": "nc", "learning_rate": 0.1} for seed, sia in ((0, 0.5), (1, 0.75))]
    lines = patching(rates).splitlines()
    assert lines[0] == "| SIA at learning rate | 10 | 1 | 0.1 | 0.01 | 0.001 | 0.0001 |"
    assert lines[2] == "| MNIST, lenet5, WB multi-class | - | - | 0.6250 | - | - | - |"
    assert "0.8086" in lines[3]
    assert others(rates) == ""
    assert patching([record(0, 0.0, 1.0)]) == ""


def test_sources_with_an_unlearned_copy_stand_beside_those_without_and_the_best_patching_of_the_same_classifiers() -> (
    None
):
    accuracy = {"acc_source": 0.8}
    guards = [{**record(seed, 0.0, sia), **accuracy} for seed, sia in ((0, 0.6), (1, 0.1))]
    copy = {**record(0, 0.1, 0.7), **accuracy, "detector": "unlearned"}
    swept = ((0, 1.0, 0.5), (0, 0.1, 0.75), (1, 0.1, 1.0))
    patched = [
        {**record(seed, 0.0, sia), **accuracy, "detector": "nc", "learning_rate": rate} for seed, rate, sia in swept
    ]
    lines = unlearned([*guards, copy, *patched]).splitlines()
    assert len(lines) == 3
    row = [cell.strip() for cell in lines[2].split("|")[2:-1]]
    assert row[:3] == ["0", "0.6000", "0.7500"]  # seed 1 has no copy
    assert (row.pop(7), row.pop(7)) == ("-", "-")  # no alpha, no held-out errors
    assert [cell.split(" ")[0] for cell in row[3:]] == ["1.0000", "0.1000", "0.7000", "0.8750", "0.7500", "0.9764"]
    again = {**guards[0], "asr": 0.9, "sia": 0.2}  # another training from seed 0
    assert unlearned([*guards, again, copy, *patched]).splitlines() == lines
    assert unlearned(guards) == ""
    assert others([*guards, copy]) == ""
    assert len(verdicts([*guards, copy]).splitlines()) == 3


def test_targets_are_met_by_the_means_alone_and_with_a_copy_of_the_same_classifier() -> None:
    read = {"acc_source": 1.0}
    guards = [{**record(seed, fpr, sia), **read} for seed, fpr, sia in ((0, 0.0, 0.96), (1, 0.0102, 0.98))]
    copy = {**record(0, 0.005, 0.99), **read, "detector": "unlearned", "tpr": 0.99}
    patched = [{**record(seed, 0.0, 0.98), **read, "detector": "nc", "learning_rate": 0.1} for seed in (0, 1)]
    lines = targets([*guards, copy, *patched]).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[2:-1]] == [
        "yes / - / **no**", "**no** / - / yes", "**no** / - / yes", "yes / - / yes", "**no** / - / yes",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        "met", *(f"{alone} of 1 / 0 of 0 / {copied} of 1" for alone, copied in ((1, 0), (0, 1), (0, 1), (1, 1), (0, 1))),
    ]  # fmt: skip
    worse = {"held_out_images": 9, **{k: {"verdict_error": 0.0, "source_error": 0.1} for k in ("without", "with")}}
    left_out = targets([*guards, {**copy, "held_out": worse}, *patched]).splitlines()
    assert [cell.strip() for cell in left_out[2].split("|")[2:-1]] == [
        "yes / yes / **no**", "**no** / yes / yes", "**no** / **no** / yes", "yes / yes / yes", "**no** / **no** / yes",
    ]  # fmt: skip
    alone = targets([{**guards[0], "setting": "all"}]).splitlines()
    assert [cell.strip() for cell in alone[2].split("|")[2:-1]] == ["- / - / -", "yes / - / -"] * 2 + ["- / - / -"]
    assert alone[3].split("|")[2].strip() == "0 of 0 / 0 of 0 / 0 of 0"
    assert targets([{**guards[0], "setting": "none"}]) == ""


def test_summary_has_guard_copy_patching_the_other_defences_and_the_paper_in_one_row() -> None:
    guards = [{**record(seed, fpr, sia), "acc_source": 0.8} for seed, fpr, sia in ((0, 0.0, 0.6), (1, 0.1, 0.4))]
    copy = {**guards[0], "detector": "unlearned", "tpr": 0.25, "sia": 0.8}
    patched = [
        {**guards[0], "detector": "nc", "learning_rate": rate, "sia": sia} for rate, sia in ((1.0, 0.7), (0.1, 0.3))
    ]
    b3d = {**guards[0], "detector": "b3d", "tpr_at_fpr05": 0.125}
    lines = summary([*guards, copy, *patched, b3d, {**record(0, 0.0, None), "setting": "none"}]).splitlines()
    assert len(lines) == 3
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "MNIST, WB multi-class",
        "1.0000 / 0.2500 / 1.0000",
        "0.0500 / 0.0000 / 0.0022",
        "0.5000 / 0.8000 / 0.7000 / 0.9764",
        "0.6250 / 1.0000",
        "-",
        "- / - / 0.1250 / -",
    ]  # fmt: skip


def test_held_out_errors_say_which_copies_are_joined() -> None:
    guards = [record(seed, 0.0, 0.5) for seed in (0, 1)]
    copies = [{**guard, "detector": "unlearned", "sia": 0.75} for guard in guards]
    for copy, source_error in zip(copies, (0.25, 0.5), strict=True):
        errors = {"without": (0.0, 0.375), "with": (0.0, source_error)}
        copy["held_out"] = {
            "held_out_images": 200,
            **{name: {"verdict_error": v, "source_error": s} for name, (v, s) in errors.items()},
        }
    row = unlearned([*guards, *copies]).splitlines()[2].split("|")
    assert row[10].strip() == "0.3750 / 0.3750; 1 of 2"
    shown = summary([*guards, *copies]).splitlines()[2].split("|")
    assert [shown[i].strip() for i in (4, 6)] == ["0.5000 / 0.7500 / - / 0.9764", "1 of 2"]
    assert [r["sia"] for r in chosen([*guards, *copies])] == [0.75, 0.5]  # of seed 0 the copy's, of seed 1 the guard's


def test_copy_of_a_classifier_without_a_guards_record_is_no_choice() -> None:
    errors = {"verdict_error": 0.0, "source_error": 0.2}
    copy = {**record(0, 0.0, 0.9), "detector": "unlearned", "held_out": {"held_out_images": 200, "without": errors}}
    copy["held_out"]["with"] = errors
    other = {**record(1, 0.0, 0.8), "acc": 0.5}
    assert chosen([copy, other]) == []
    assert chosen([copy, record(0, 0.0, 0.8)]) == [record(0, 0.0, 0.8)]


def test_tables_of_other_records_are_printed_and_the_documents_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--results", str(tmp_path)]) == 2
    assert "expected records (paper-*.json), got none" in capsys.readouterr().err
    (tmp_path / "paper-mnist-WB-multi-0.json").write_text(json.dumps([record(0, 0.25, 0.9)]))
    before = [path.read_bytes() for path in documents()]
    assert main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "## verdicts" in printed
    assert "0.2500" in printed
    assert "## robustness" not in printed
    assert [path.read_bytes() for path in documents()] == before
