"""README's tables from benchmarks/results: ``python -m benchmarks.paper.tables``."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from benchmarks.paper.further_tables import NAMES, ablation, cell, inspections, markdown, robustness

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
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
    **{(faces, "SQ", "multi"): (0.9856, 0.1428, 0.7194) for faces in ("pubfig", "faces_standin")},
    **{(faces, "WM", "multi"): (1.0, 0.1428, 0.5507) for faces in ("pubfig", "faces_standin")},
}
# Table 1: ACC, ASR of the trigger, ASR of the estimated pattern.
PAPER_CLASSIFIERS = {
    ("cifar10", "none", "none"): (0.9387, None, None),
    ("cifar10", "CB", "single"): (0.9360, 0.9955, 1.0),
    ("cifar10", "SP", "single"): (0.9354, 0.9488, 0.99),
    ("cifar10", "WB", "single"): (0.9324, 0.9411, 0.997),
    ("cifar10", "CB", "multi"): (0.9381, 0.9954, 0.9876),
    ("cifar10", "SP", "multi"): (0.9337, 0.9565, 0.9953),
    ("cifar10", "WB", "multi"): (0.9340, 0.9497, 0.9354),
}
# Table 2, of the threshold with the best TPR for an FPR around 5 %: TPR, FPR.
PAPER_OTHERS = {
    ("CB", "single", "nc"): (0.9855, 0.0488),
    ("SP", "single", "nc"): (0.8088, 0.0544),
    ("WB", "single", "nc"): (0.0, 0.0522),
    ("CB", "multi", "nc"): (0.9962, 0.0533),
    ("SP", "multi", "nc"): (0.9043, 0.0511),
    ("WB", "multi", "nc"): (0.8644, 0.0522),
    ("CB", "single", "b3d"): (0.0788, 0.0511),
    ("SP", "single", "b3d"): (0.5333, 0.1066),
    ("WB", "single", "b3d"): (0.0011, 0.05),
    ("CB", "multi", "b3d"): (0.9872, 0.9955),
    ("SP", "multi", "b3d"): (0.1814, 0.0522),
    ("WB", "multi", "b3d"): (0.0535, 0.0511),
    ("CB", "single", "strip"): (0.0822, 0.0533),
    ("SP", "single", "strip"): (0.1333, 0.0588),
    ("WB", "single", "strip"): (0.0088, 0.0588),
    ("CB", "multi", "strip"): (0.0218, 0.0555),
    ("SP", "multi", "strip"): (0.1555, 0.0588),
    ("WB", "multi", "strip"): (0.0011, 0.0633),
}
# Table 2, SIA of Neural Cleanse's patching at its best learning rate.
PAPER_NC_BEST = {
    ("CB", "single"): 0.9444,
    ("SP", "single"): 0.8833,
    ("WB", "single"): 0.8667,
    ("CB", "multi"): 0.8765,
    ("SP", "multi"): 0.8963,
    ("WB", "multi"): 0.8086,
}
CLASSIFIERS_HEADER = (
    "data, network, attack",
    "seeds",
    "named",
    "ACC",
    "ASR",
    "ASR of the estimated pattern",
    "paper's ACC / ASR / ASR of the estimated pattern",
)
HEADER = (
    "data, network, attack",
    "seeds",
    "TPR",
    "FPR",
    "SIA",
    "SIA / ACC of the source classes",
    "paper's TPR / FPR / SIA",
    "SIA of NC's patching at its best rate tried: here / in the paper",
)
Groups = dict[tuple[str, ...], list[dict[str, Any]]]


def classifiers(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the classifiers, what the inspection names and its pattern: means over the seeds."""
    rows = []
    for case, group in sorted(_by_case(r for r in records if r["detector"] == "guard").items()):
        paper = PAPER_CLASSIFIERS.get((case[0], case[3], case[4]))
        rows.append(
            (
                _case(*case),
                _seeds(group),
                "; ".join(sorted({_named(sorted(record["suspects"])) for record in group})),
                *(_spread([record.get(key) for record in group]) for key in ("acc", "asr", "asr_estimated")),
                _figures(paper),
            )
        )
    return markdown(CLASSIFIERS_HEADER, rows)


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the guards: mean over the seeds, the lowest and highest; of rates of frames the 95 % interval."""
    rows = []
    for case, found in sorted(_by_case(records).items()):
        group = [record for record in found if record["detector"] == "guard"]
        if not group or case[4] == "none":
            continue
        paper = PAPER.get((case[0], case[3], case[4]))
        theirs = PAPER_NC_BEST.get((case[3], case[4])) if case[0] == "cifar10" else None
        best = cell(_best_patching(found))
        rows.append(
            (
                _case(*case),
                _seeds(group),
                _rate(group, "tpr", "n_triggered"),
                _rate(group, "fpr", "n_clean"),
                _rate(group, "sia", "n_triggered"),
                _of_readable(group),
                _figures(paper),
                best if theirs is None else f"{best} / {theirs:.4f}",
            )
        )
    return markdown(HEADER, rows)


OTHERS = {
    "nc": "NC neuron filter",
    "nc-target": "NC neuron filter, above the target's",
    "b3d": "B3D",
    "strip": "STRIP",
}
OTHERS_HEADER = (
    "data, network, attack",
    "defence",
    "seeds",
    "TPR",
    "FPR",
    "TPR at FPR 5 %",
    "AUROC",
    "guard's TPR / FPR",
    "paper's TPR / FPR",
)


def others(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the other defences beside the guard, means over the seeds."""
    groups: Groups = defaultdict(list)
    for record in records:
        if record.get("learning_rate") is None:
            groups[(*_identity(record), record["detector"])].append(record)
    rows = []
    for (*case, detector), group in sorted(groups.items()):
        if detector not in OTHERS:
            continue
        guard = groups[(*case, "guard")]
        paper = PAPER_OTHERS.get((case[3], case[4], detector.removesuffix("-target"))) if case[0] == "cifar10" else None
        rows.append(
            (
                _case(*case),
                OTHERS[detector],
                _seeds(group),
                *(_mean(group, key) for key in ("tpr", "fpr", "tpr_at_fpr05", "auroc")),
                f"{_mean(guard, 'tpr')} / {_mean(guard, 'fpr')}",
                _figures(paper),
            )
        )
    return markdown(OTHERS_HEADER, rows)


UNLEARNED_HEADER = (
    "data, network, attack",
    "seeds",
    "guard: SIA",
    "SIA / ACC of the source classes",
    "with an unlearned copy: TPR",
    "FPR",
    "SIA",
    "SIA / ACC of the source classes",
    "NC's patching at its best rate tried: SIA",
    "paper's SIA",
)


def unlearned(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the source without and with the logits of an unlearned copy, means over the same classifiers."""
    rows = []
    for case, group in sorted(_by_case(records).items()):
        copies = [record for record in group if record["detector"] == "unlearned"]
        if not copies:
            continue
        same = _with_a_copy(group)
        guards = [record for record in same if record["detector"] == "guard"]
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
                cell(_best_patching(same)),
                "-" if paper is None else f"{paper[2]:.4f}",
            )
        )
    return markdown(UNLEARNED_HEADER, rows)


TARGETS_HEADER = (
    "data, network, attack",
    "TPR at least the paper's",
    "FPR at most .005",
    "SIA at least the paper's",
    "SIA at least .95 of the source classes' ACC",
    "SIA at least that of NC's patching here",
)


def targets(records: list[dict[str, Any]]) -> str:
    """A Markdown table of what the guards meet, alone / with an unlearned copy, by the means over the seeds."""
    words = {True: "yes", False: "**no**", None: "-"}
    alone, copied, rows = [], [], []
    for case, found in sorted(_by_case(records).items()):
        if case[4] == "none":
            continue
        alone.append(_met(case, "guard", found))
        copied.append(_met(case, "unlearned", _with_a_copy(found)))
        rows.append((_case(*case), *_beside((words[met] for met in alone[-1]), (words[met] for met in copied[-1]))))
    if rows:
        rows.append(("met", *_beside(_counts(alone), _counts(copied))))
    return markdown(TARGETS_HEADER, rows)


def _met(case: tuple[str, ...], detector: str, records: list[dict[str, Any]]) -> list[bool | None]:
    """In the order of TARGETS_HEADER; None where something is not measured or the paper has no figure.

    In the four decimals of the paper's figures.
    """
    group = [record for record in records if record["detector"] == detector]
    tpr, fpr, sia = (_average([record[key] for record in group]) for key in ("tpr", "fpr", "sia"))
    paper_tpr, _, paper_sia = PAPER.get((case[0], case[3], case[4]), (None, None, None))
    pairs = (
        (tpr, paper_tpr),
        (0.005, fpr),
        (sia, paper_sia),
        (_average(_ratios(group)), 0.95),
        (sia, _best_patching(records)),
    )
    return [None if a is None or b is None else round(a, 4) >= round(b, 4) for a, b in pairs]


def _beside(alone: Iterable[str], copied: Iterable[str]) -> list[str]:
    return [" / ".join(both) for both in zip(alone, copied, strict=True)]


def _counts(rows: list[list[bool | None]]) -> list[str]:
    """Of each column, how many are met of those that are known."""
    columns = ([met for met in column if met is not None] for column in zip(*rows, strict=True))
    return [f"{sum(known)} of {len(known)}" for known in columns]


PAPER_PATCHING = {10.0: 0.1114, 1.0: 0.4291, 0.1: 0.6033, 0.01: 0.8086, 0.001: 0.7103, 0.0001: 0.6348}


def patching(records: list[dict[str, Any]]) -> str:
    """A Markdown table of Neural Cleanse's patching: source accuracy at each learning rate, means over the seeds."""
    groups = _by_case(record for record in records if record.get("learning_rate") is not None)
    if not groups:
        return ""
    rates = sorted(PAPER_PATCHING, reverse=True)
    rows = []
    for case, group in sorted(groups.items()):
        by_rate = _by_rate(group)
        rows.append((_case(*case), *(_mean(by_rate[rate], "sia") for rate in rates)))
    rows.append(("the paper, CIFAR-10, WB multi-class", *(f"{PAPER_PATCHING[rate]:.4f}" for rate in rates)))
    return markdown(("SIA at learning rate", *(f"{rate:g}" for rate in rates)), rows)


def _by_case(records: Iterable[dict[str, Any]]) -> Groups:
    groups: Groups = defaultdict(list)
    for record in records:
        groups[_identity(record)].append(record)
    return groups


def _by_rate(records: list[dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    """Records of Neural Cleanse's patching at each learning rate."""
    by_rate: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record.get("learning_rate") is not None:
            by_rate[record["learning_rate"]].append(record)
    return by_rate


def _best_patching(records: list[dict[str, Any]]) -> float | None:
    """The highest mean SIA that Neural Cleanse's patching has at one of its learning rates; None without patching."""
    means = (_average([record["sia"] for record in found]) for found in _by_rate(records).values())
    return max((mean for mean in means if mean is not None), default=None)


def _with_a_copy(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All records of those classifiers of which an unlearned copy was measured."""
    trained = {_training(record) for record in records if record["detector"] == "unlearned"}
    return [record for record in records if _training(record) in trained]


def _figures(values: Iterable[float | None] | None) -> str:
    """Figures of the paper; a dash where it has none."""
    return "-" if values is None else " / ".join(cell(value) for value in values)


def _identity(record: dict[str, Any]) -> tuple[str, ...]:
    """What the seeds of a row share."""
    epochs = f"{record['recipe']['epochs']} epochs" if record.get("recipe") else ""
    return record["dataset"], record["network"], epochs, record["attack"], record["setting"]


def _training(record: dict[str, Any]) -> tuple[int, float, float]:
    """What tells a classifier from another of its row: on several threads two trainings from one seed differ."""
    return record["seed"], record["acc"], record["asr"]


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
    return _spread(_ratios(group))


def _ratios(group: list[dict[str, Any]]) -> list[float | None]:
    return [_ratio(record.get("sia"), record.get("acc_source")) for record in group]


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _mean(group: list[dict[str, Any]], key: str) -> str:
    return cell(_average([record.get(key) for record in group]))


def _average(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _spread(values: list[float | None]) -> str:
    """Mean, and the lowest and highest of several."""
    known = [value for value in values if value is not None]
    text = cell(_average(values))
    return text if len(known) < 2 else f"{text} ({min(known):.4f} to {max(known):.4f})"


def _rate(group: list[dict[str, Any]], key: str, count: str) -> str:
    """Mean over the seeds, their lowest and highest, and the 95 % interval of the pooled frames (Clopper and Pearson)."""
    group = [record for record in group if record[count] is not None]
    total = sum(record[count] for record in group)
    hits = sum(round(record[key] * record[count]) for record in group if record[count])
    if not total:
        return "-"
    low, high = binomtest(hits, total).proportion_ci(0.95)
    return f"{_spread([record[key] for record in group if record[count]])} [{low:.4f}, {high:.4f}]"


def main() -> int:
    """Rewrite the parts of README between the markers."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    records = _read("paper-*.json")
    parts = {
        "results": (classifiers(records), table(records), others(records), patching(records)),
        "targets": (targets(records),),
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
