"""README's tables from benchmarks/results: ``python -m benchmarks.paper.tables``."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from benchmarks.paper.further_tables import ablation, inspections, markdown, robustness

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "faces_standin": "stand-in for PubFig",
}
# Li, Xiang, Miller, Kesidis, ICASSP 2022, tables 2 and 4: TPR, FPR, SIA.
PAPER = {
    ("mnist", "CB", "multi"): (1.0, 0.0033, 0.9413),
    ("mnist", "WB", "multi"): (1.0, 0.0022, 0.9764),
    ("fashion_mnist", "CB", "multi"): (1.0, 0.0023, 0.6948),
    ("fashion_mnist", "WB", "multi"): (0.9951, 0.0127, 0.8039),
    ("cifar10", "CB", "single"): (0.9922, 0.0, 0.8392),
    ("cifar10", "SP", "single"): (0.9813, 0.0, 0.7728),
    ("cifar10", "WB", "single"): (0.9847, 0.0, 0.8607),
    ("cifar10", "CB", "multi"): (0.9997, 0.0, 0.6946),
    ("cifar10", "SP", "multi"): (0.9454, 0.0, 0.632),
    ("cifar10", "WB", "multi"): (0.9992, 0.0, 0.8945),
    ("faces_standin", "SQ", "multi"): (0.9856, 0.1428, 0.7194),
    ("faces_standin", "WM", "multi"): (1.0, 0.1428, 0.5507),
}
HEADER = (
    "data, network, attack",
    "seeds",
    "named",
    "ACC",
    "ASR",
    "TPR",
    "FPR",
    "SIA",
    "SIA / ACC of the source classes",
    "paper's TPR / FPR / SIA",
)


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table: mean over the seeds; the lowest and highest, for rates of frames the 95 % binomial interval."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["detector"] != "guard":
            continue
        groups[_identity(record)].append(record)
    rows = [HEADER, ("---",) * len(HEADER)]
    for case, group in sorted(groups.items()):
        dataset, _, _, attack, setting = case
        paper = PAPER.get((dataset, attack, setting))
        rows.append(
            (
                _case(*case),
                _seeds(group),
                "; ".join(sorted({_named(sorted(record["suspects"])) for record in group})),
                *(_spread([record[key] for record in group]) for key in ("acc", "asr")),
                _rate(group, "tpr", "n_triggered"),
                _rate(group, "fpr", "n_clean"),
                _rate(group, "sia", "n_triggered"),
                _of_readable(group),
                "-" if paper is None else " / ".join(f"{value:.4f}" for value in paper),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


OTHERS = {"nc": "NC neuron filter", "b3d": "B3D", "strip": "STRIP"}
OTHERS_HEADER = (
    "data, network, attack",
    "defence",
    "seeds",
    "TPR",
    "FPR",
    "TPR at FPR 5 %",
    "AUROC",
    "guard's TPR / FPR",
)


def others(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the other defences beside the guard, means over the seeds."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record.get("learning_rate") is None:
            groups[(*_identity(record), record["detector"])].append(record)
    rows = [OTHERS_HEADER, ("---",) * len(OTHERS_HEADER)]
    for (*case, detector), group in sorted(groups.items()):
        if detector not in OTHERS:
            continue
        guard = groups[(*case, "guard")]
        rows.append(
            (
                _case(*case),
                OTHERS[detector],
                _seeds(group),
                *(_mean(group, key) for key in ("tpr", "fpr", "tpr_at_fpr05", "auroc")),
                f"{_mean(guard, 'tpr')} / {_mean(guard, 'fpr')}",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


UNLEARNED_HEADER = (
    "data, network, attack",
    "seeds",
    "guard: SIA",
    "SIA / ACC of the source classes",
    "with an unlearned copy: TPR",
    "FPR",
    "SIA",
    "SIA / ACC of the source classes",
    "NC's patching at its best rate: SIA",
    "paper's SIA",
)


def unlearned(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the source without and with the features of an unlearned copy, means over the same seeds."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[_identity(record)].append(record)
    rows = []
    for case, group in sorted(groups.items()):
        copies = [record for record in group if record["detector"] == "unlearned"]
        if not copies:
            continue
        seeds = {record["seed"] for record in copies}
        guards = [record for record in group if record["detector"] == "guard" and record["seed"] in seeds]
        by_rate: dict[float, list[dict[str, Any]]] = defaultdict(list)
        for record in group:
            if record.get("learning_rate") is not None and record["seed"] in seeds:
                by_rate[record["learning_rate"]].append(record)
        paper = PAPER.get((case[0], case[3], case[4]))
        rows.append(
            (
                _case(*case),
                _seeds(copies),
                _mean(guards, "sia"),
                _of_readable(guards),
                _rate(copies, "tpr", "n_triggered"),
                _rate(copies, "fpr", "n_clean"),
                _rate(copies, "sia", "n_triggered"),
                _of_readable(copies),
                max((_mean(found, "sia") for found in by_rate.values()), default="-"),
                "-" if paper is None else f"{paper[2]:.4f}",
            )
        )
    return markdown(UNLEARNED_HEADER, rows)


PAPER_PATCHING = {10.0: 0.1114, 1.0: 0.4291, 0.1: 0.6033, 0.01: 0.8086, 0.001: 0.7103, 0.0001: 0.6348}


def patching(records: list[dict[str, Any]]) -> str:
    """A Markdown table of Neural Cleanse's patching: source accuracy at each learning rate, means over the seeds."""
    groups: dict[tuple[str, ...], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.get("learning_rate") is not None:
            groups[_identity(record)][record["learning_rate"]].append(record)
    if not groups:
        return ""
    rates = sorted(PAPER_PATCHING, reverse=True)
    rows = [("SIA at learning rate", *(f"{rate:g}" for rate in rates)), ("---",) * (len(rates) + 1)]
    for case, by_rate in sorted(groups.items()):
        rows.append((_case(*case), *(_mean(by_rate[rate], "sia") for rate in rates)))
    rows.append(("the paper, CIFAR-10, WB multi-class", *(f"{PAPER_PATCHING[rate]:.4f}" for rate in rates)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _identity(record: dict[str, Any]) -> tuple[str, ...]:
    """What the seeds of a row share."""
    epochs = f"{record['recipe']['epochs']} epochs" if record.get("recipe") else ""
    return record["dataset"], record["network"], epochs, record["attack"], record["setting"]


def _case(dataset: str, network: str, epochs: str, attack: str, setting: str) -> str:
    what = {"none": "no attack", "all": f"{attack} all to all"}.get(setting, f"{attack} {setting}-class")
    return ", ".join(part for part in (NAMES[dataset], network, epochs, what) if part)


def _named(suspects: list[int]) -> str:
    """The classes, in ascending order, that the inspection takes for targets."""
    if len(suspects) > 2 and suspects == list(range(len(suspects))):
        return f"0 to {len(suspects) - 1}"
    return ", ".join(map(str, suspects)) or "none"


def _seeds(group: list[dict[str, Any]]) -> str:
    return ", ".join(str(seed) for seed in sorted(record["seed"] for record in group))


def _of_readable(group: list[dict[str, Any]]) -> str:
    """Sources found, of those that the classifier reads on clean images."""
    return _spread([_ratio(record.get("sia"), record.get("acc_source")) for record in group])


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _mean(group: list[dict[str, Any]], key: str) -> str:
    known = [record[key] for record in group if record.get(key) is not None]
    return f"{sum(known) / len(known):.4f}" if known else "-"


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{sum(known) / len(known):.4f}"
    return text if len(known) == 1 else f"{text} ({min(known):.4f} to {max(known):.4f})"


def _rate(group: list[dict[str, Any]], key: str, count: str) -> str:
    """Mean over the seeds, and the 95 % interval of the pooled frames (Clopper and Pearson)."""
    group = [record for record in group if record[count] is not None]
    total = sum(record[count] for record in group)
    hits = sum(round(record[key] * record[count]) for record in group if record[count])
    if not total:
        return "-"
    low, high = binomtest(hits, total).proportion_ci(0.95)
    known = [record[key] for record in group if record[count]]
    return f"{sum(known) / len(known):.4f} [{low:.4f}, {high:.4f}]"


def main() -> int:
    """Rewrite the parts of README between the markers."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    records = _read("paper-*.json")
    parts = {
        "results": (table(records), others(records), patching(records)),
        "unlearned": (unlearned(records),),
        "inspections": (inspections(_read("inspection-*.json")),),
        "ablation": (ablation(_read("ablation-*.json")),),
        "robustness": (robustness(_read("robustness-*.json")),),
    }
    for name, tables in parts.items():
        begin, end = (f"<!-- {name}:{edge} -->" for edge in ("begin", "end"))
        before, rest = text.split(begin)
        _, after = rest.split(end)
        joined = "\n\n".join(part for part in tables if part)
        text = f"{before}{begin}\n{joined}\n{end}{after}"
    readme.write_text(text)
    print(f"{len(records)} records")
    return 0


def _read(pattern: str) -> list[dict[str, Any]]:
    return [record for path in sorted(RESULTS.glob(pattern)) for record in json.loads(path.read_text())]


if __name__ == "__main__":
    sys.exit(main())
