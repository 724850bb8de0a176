"""Tables of inspections, ablation and robustness, against what can be counted by hand."""

from __future__ import annotations

from benchmarks.paper.further_tables import ablation, inspections, robustness


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


def test_inspections_count_targets_and_false_alarms() -> None:
    cases = [
        ("mnist-lenet5-none-none-to9-0", [], []),
        ("mnist-lenet5-none-none-to9-1", [], [3, 4]),
        ("mnist-lenet5-WB-multi-to9-0", [9], [9]),
        ("mnist-lenet5-WB-multi-to9-1", [9], [2]),
        ("mnist-lenet5-WB-all-to9-0", list(range(10)), [9, *range(9)]),
        ("mnist-lenet5-WB-all-to9-1", list(range(10)), list(range(9))),
    ]
    found = rows(inspections([{"case": case, "targets": targets, "suspects": s} for case, targets, s in cases]))
    by_name = {row[0]: row[1:] for row in found}
    assert by_name["MNIST, WB multi-class"] == [
        "2", "1 of 2 [0.013, 0.987]", "1 of 2 [0.013, 0.987]", "1 of 18 [0.001, 0.273]",
    ]  # fmt: skip
    assert by_name["MNIST, WB all to all"] == ["2", "1 of 2 [0.013, 0.987]", "0 of 2 [0.000, 0.842]", "-"]
    assert by_name["no attack, all"] == ["2", "-", "1 of 2 [0.013, 0.987]", "2 of 20 [0.012, 0.317]"]
    assert by_name["MNIST, no attack"] == by_name["no attack, all"]


def test_ablation_has_a_row_for_each_idea_and_a_column_for_each_case() -> None:
    def record(dataset: str, idea: str, sia: float) -> dict[str, object]:
        errors = {"held_out_error": 0.01, "held_out_source_error": 0.2}
        return {
            "dataset": dataset,
            "attack": "WB",
            "setting": "multi",
            "idea": idea,
            "tpr": 1.0,
            "fpr": 0.0,
            "sia": sia,
        } | errors

    text = ablation(
        [record("mnist", "plain", 0.9), record("fashion_mnist", "plain", 0.8), record("mnist", "shared", 0.95)]
    )
    assert rows(text) == [
        ["plain", "0.0100 / 0.2000", "1.0000 / 0.0000 / 0.8000", "0.0100 / 0.2000", "1.0000 / 0.0000 / 0.9000"],
        ["shared", "-", "-", "0.0100 / 0.2000", "1.0000 / 0.0000 / 0.9500"],
    ]


def test_robustness_shows_the_worst_of_each_change_and_every_count() -> None:
    def record(change: str, amount: float, tpr: float | None) -> dict[str, object]:
        return {
            "dataset": "mnist",
            "attack": "WB",
            "setting": "single",
            "change": change,
            "amount": amount,
            "acc": 1.0,
            "asr": 1.0,
            "tpr": tpr,
            "fpr": 0.0,
            "sia": tpr,
        }

    text = robustness(
        [record("noise", 0, 1.0), record("noise", 16, 0.5), record("noise", 8, 0.7)]
        + [record("clean images a class", n, None if n == 5 else 0.9) for n in (10, 5)]
    )
    assert {row[0] for row in rows(text)} == {"MNIST, WB single-class"}
    assert [(row[1], row[2], row[5]) for row in rows(text)] == [
        ("none", "0", "1.0000"), ("noise", "16", "0.5000"), ("clean images a class", "10", "0.9000"),
        ("clean images a class", "5", "-"),
    ]  # fmt: skip
    assert robustness([]) == ""
