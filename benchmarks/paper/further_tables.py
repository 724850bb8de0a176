"""Markdown of what stands behind the results: inspections, the ablation, robustness."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from scipy.stats import binomtest

from benchmarks.paper.cells import NAMES, cell, markdown

__all__ = ["ablation", "inspections", "robustness"]

Record = dict[str, Any]
N_CLASSES = 10


def inspections(records: list[Record]) -> str:
    """Per kind of attack: how often all its targets are named, and other classes; 95 % intervals (Clopper and Pearson)."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        dataset, _, attack, setting, *_ = record["case"].split("-")
        attacked = f"{attack} all to all" if setting == "all" else f"{attack} {setting}-class"
        groups[dataset, "no attack" if attack == "none" else attacked].append(record)
    clean = [record for record in records if not record["targets"]]
    if clean:
        groups["", "no attack, all"] = clean
    rows = []
    for (dataset, what), group in sorted(groups.items()):
        n_targets = len(group[0]["targets"])
        right = sum(set(record["targets"]) <= set(record["suspects"]) for record in group)
        wrong = [len(set(record["suspects"]) - set(record["targets"])) for record in group]
        others = len(group) * (N_CLASSES - n_targets)
        cells = (
            ", ".join(part for part in (NAMES.get(dataset, ""), what) if part),
            str(len(group)),
            _share(right, len(group)) if n_targets else "-",
            _share(sum(count > 0 for count in wrong), len(group)),
            _share(sum(wrong), others) if others else "-",
        )
        rows.append(cells)
    header = ("LeNet-5 on", "models", "target named", "models with a class named wrongly", "classes named wrongly")
    return markdown(header, rows)


def ablation(records: list[Record]) -> str:
    """Each idea alone, the winner and the plain mixture: the errors that choose, and the figures that no choice sees."""
    groups: dict[str, dict[tuple[str, ...], Record]] = defaultdict(dict)
    cases = sorted({(r["dataset"], r["attack"], r["setting"]) for r in records})
    for record in records:
        groups[record["idea"]][record["dataset"], record["attack"], record["setting"]] = record
    header = ["idea"]
    for dataset, attack, setting in cases:
        where = f"{NAMES[dataset]}, {attack} {setting}-class"
        header += [f"{where}: held-out error of the verdict / of the source", "TPR / FPR / SIA"]
    rows = []
    for idea, by_case in groups.items():
        row = [idea]
        for case in cases:
            found = by_case.get(case)
            row += (
                ["-", "-"]
                if found is None
                else [
                    " / ".join(cell(found[key]) for key in ("held_out_error", "held_out_source_error")),
                    " / ".join(cell(found[key]) for key in ("tpr", "fpr", "sia")),
                ]
            )
        rows.append(row)
    return markdown(header, rows)


def robustness(records: list[Record]) -> str:
    """Without a change, each change where the source is found least often, few clean images, a wrong target."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[f"{NAMES[record['dataset']]}, {record['attack']} {record['setting']}-class"].append(record)
    rows = []
    for data, own in sorted(groups.items()):
        plain = next((record for record in own if record["change"] != "jpeg" and record["amount"] == 0), None)
        shown = [] if plain is None else [{**plain, "change": "none"}]
        for change in dict.fromkeys(record["change"] for record in own):
            group = [record for record in own if record["change"] == change]
            few = change == "clean images a class"
            shown += group if few else [min(group, key=lambda record: 1.0 if record["sia"] is None else record["sia"])]
        for record in shown:
            cells = (cell(record[key]) for key in ("acc", "asr", "tpr", "fpr", "sia"))
            rows.append((data, record["change"], f"{record['amount']:g}", *cells))
    return markdown(("data, attack", "change", "amount", "ACC", "ASR", "TPR", "FPR", "SIA"), rows)


def _share(hits: int, total: int) -> str:
    low, high = binomtest(hits, total).proportion_ci(0.95)
    return f"{hits} of {total} [{low:.3f}, {high:.3f}]"
