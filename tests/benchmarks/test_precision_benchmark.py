"""The benchmark of precisions: its figures on a small classifier, and README's table is its records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import poisoned
import pytest

ROOT = Path(__file__).parents[2]
NAMES = {"MNIST": "mnist", "Fashion-MNIST": "fashion_mnist"}


def test_small_classifier_keeps_its_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.precision import compare

    victim = poisoned.poisoned()
    figures = compare(poisoned.bundle_of_precisions(), victim.test, victim.triggered, poisoned.TARGET)["precisions"]
    assert list(figures) == ["fp32", "fp16", "int8"]
    assert (figures["fp32"]["top1"], figures["fp32"]["verdict"]) == (1.0, 1.0)
    for name, least in (("fp16", 0.995), ("int8", 0.98)):
        assert figures[name]["top1"] >= least
        assert figures[name]["verdict"] >= least
        assert figures[name]["tpr"] > 0.5 > figures[name]["fpr"]
    assert figures["int8"]["n_verdict"] > 80
    assert figures["int8"]["n_top1"] == len(victim.test)


@pytest.mark.parametrize("data", NAMES)
def test_table_of_the_readme_is_the_record(data: str) -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / f"precision-{NAMES[data]}.json").read_text())
    rows = re.findall(rf"^\| {data}, (\w+) \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(record["precisions"])
    for name, cells in rows:
        figures = record["precisions"][name]
        expected = [figures[key] for key in ("accuracy", "top1", "verdict", "tpr", "fpr")]
        shown = [f"{value:.4f}" if name != "fp32" or i not in (1, 2) else "" for i, value in enumerate(expected)]
        assert [cell.strip() for cell in cells.split("|")] == shown
        if name != "fp32":
            assert figures["verdict"] >= {"fp16": 0.995, "int8": 0.98}[name]
