"""The table of results: means, spreads and intervals that can be checked by hand."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.tables import others, table


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
    return {**names, **figures, "n_clean": 10, "n_triggered": n_triggered}


def cells(*records: dict[str, Any]) -> list[str]:
    return [cell.strip() for cell in table(list(records)).splitlines()[2].split("|")[1:-1]]


def test_one_seed_has_an_interval_and_no_spread() -> None:
    # Clopper and Pearson, none of ten: 0 to 1 - .025 ** (1 / 10).
    row = cells(record(0, 0.0, 1.0))
    assert row[1:3] == ["0", "0.5000"]
    assert row[4:7] == ["1.0000 [0.6915, 1.0000]", "0.0000 [0.0000, 0.3085]", "1.0000 [0.6915, 1.0000]"]
    assert row[7] == "1.0000 / 0.0022 / 0.9764"


def test_frames_of_all_seeds_are_pooled() -> None:
    row = cells(record(1, 0.1, 1.0), record(0, 0.0, 0.9))
    assert row[1] == "0, 1"
    assert row[3] == "0.9500 (0.9000 to 1.0000)"
    assert row[5] == "0.0500 [0.0013, 0.2487]"  # one of twenty


def test_rate_without_frames_is_a_dash() -> None:
    assert cells(record(0, 0.0, None, n_triggered=0))[6] == "-"


def test_other_defences_stand_beside_the_guard() -> None:
    strip = {**record(0, 0.0625, None), "detector": "strip", "tpr": 0.125, "tpr_at_fpr05": 0.25, "auroc": 0.5}
    lines = others([record(0, 0.0, 1.0), strip]).splitlines()
    assert len(lines) == 3
    assert [cell.strip() for cell in lines[2].split("|")[2:-1]] == [
        "STRIP", "0", "0.1250", "0.0625", "0.2500", "0.5000", "1.0000 / 0.0000",
    ]  # fmt: skip
    assert "STRIP" not in table([record(0, 0.0, 1.0), strip])
