"""What the tables share: records of one row, their means and spreads, cells of Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from scipy.stats import binomtest

from inflight_edge.calibration.calibrate import copy_helps

NAMES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "faces_standin": "stand-in for PubFig",
    "pubfig": "PubFig",
}
Record = dict[str, Any]
Key = TypeVar("Key")


def by_case(records: Iterable[Record]) -> defaultdict[tuple[str, ...], list[Record]]:
    """Records of each row."""
    return _grouped(records, identity)


def by_name(records: Iterable[Record]) -> defaultdict[str, list[Record]]:
    """Records of each detector; without those of patching, which detects nothing."""
    return _grouped((r for r in records if r.get("learning_rate") is None), lambda record: str(record["detector"]))


def by_rate(records: Iterable[Record]) -> defaultdict[float, list[Record]]:
    """Records of Neural Cleanse's patching at each learning rate."""
    patched = (r for r in records if r.get("learning_rate") is not None)
    return _grouped(patched, lambda record: float(record["learning_rate"]))


def _grouped(records: Iterable[Record], key: Callable[[Record], Key]) -> defaultdict[Key, list[Record]]:
    groups: defaultdict[Key, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups


def best_patching(records: list[Record]) -> float | None:
    """The highest mean SIA that Neural Cleanse's patching has at one of its learning rates; None without patching."""
    means = (average([record["sia"] for record in found]) for found in by_rate(records).values())
    return max((mean for mean in means if mean is not None), default=None)


def with_a_copy(records: list[Record]) -> list[Record]:
    """All records of those classifiers of which an unlearned copy was measured."""
    trained = {training(record) for record in records if record["detector"] == "unlearned"}
    return [record for record in records if training(record) in trained]


def chosen(records: list[Record]) -> list[Record]:
    """What ``--unlearn auto`` ships of each classifier with a guard and a copy that has held-out errors: the one or the other."""
    copies = {training(record): record for record in records if record["detector"] == "unlearned"}
    guards = {training(record): record for record in records if record["detector"] == "guard"}
    known = {trained: copy for trained, copy in copies.items() if "held_out" in copy and trained in guards}
    return [copy if copy_helps(copy["held_out"]) else guards[trained] for trained, copy in known.items()]


def held_out(copies: list[Record]) -> list[dict[str, Any]]:
    """The errors by which ``--unlearn auto`` decides, of the copies that have them."""
    return [copy["held_out"] for copy in copies if "held_out" in copy]


def joined(copies: list[Record]) -> str:
    """How many copies ``--unlearn auto`` joins, of those with held-out errors."""
    known = held_out(copies)
    return f"{sum(map(copy_helps, known))} of {len(known)}" if known else "-"


def figures(values: Iterable[float | None] | None) -> str:
    """Figures of the paper; a dash where it has none."""
    return "-" if values is None else " / ".join(cell(value) for value in values)


def identity(record: Record) -> tuple[str, ...]:
    """What the seeds of a row share."""
    epochs = f"{record['recipe']['epochs']} epochs" if record.get("recipe") else ""
    return record["dataset"], record["network"], epochs, record["attack"], record["setting"]


def training(record: Record) -> tuple[int, float, float]:
    """What tells a classifier from another of its row: on several threads two trainings from one seed differ."""
    return record["seed"], record["acc"], record["asr"]


def label(dataset: str, network: str, epochs: str, attack: str, setting: str) -> str:
    what = {"none": "no attack", "all": f"{attack} all to all"}.get(setting, f"{attack} {setting}-class")
    return ", ".join(part for part in (NAMES[dataset], network, epochs, what) if part)


def named(suspects: list[int]) -> str:
    """The classes, in ascending order, that the inspection takes for targets."""
    if len(suspects) > 2 and suspects == list(range(len(suspects))):
        return f"0 to {len(suspects) - 1}"
    return ", ".join(map(str, suspects)) or "none"


def seeds(group: list[Record]) -> str:
    return ", ".join(str(seed) for seed in sorted(record["seed"] for record in group))


def of_readable(group: list[Record]) -> str:
    """Sources found, of those that the classifier reads on clean images."""
    return spread(ratios(group))


def ratios(group: list[Record]) -> list[float | None]:
    return [_ratio(record.get("sia"), record.get("acc_source")) for record in group]


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def mean(group: list[Record], key: str) -> str:
    return cell(average([record.get(key) for record in group]))


def average(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def with_alpha(group: list[Record]) -> str:
    """TPR and FPR at an alpha of .05: means over the seeds, the lowest and highest FPR."""
    fpr = spread([record.get("fpr_alpha05") for record in group])
    return "-" if fpr == "-" else f"{mean(group, 'tpr_alpha05')} / {fpr}"


def spread(values: list[float | None]) -> str:
    """Mean, and the lowest and highest of several."""
    known = [value for value in values if value is not None]
    text = cell(average(values))
    return text if len(known) < 2 else f"{text} ({min(known):.4f} to {max(known):.4f})"


def rate_with_interval(group: list[Record], key: str, count: str) -> str:
    """Mean over the seeds, their lowest and highest, and the 95 % interval of the pooled frames (Clopper and Pearson)."""
    group = [record for record in group if record[count] is not None]
    total = sum(record[count] for record in group)
    hits = sum(round(record[key] * record[count]) for record in group if record[count])
    if not total:
        return "-"
    low, high = binomtest(hits, total).proportion_ci(0.95)
    return f"{spread([record[key] for record in group if record[count]])} [{low:.4f}, {high:.4f}]"


def verdict_cells(group: list[Record]) -> tuple[str, ...]:
    """TPR, FPR, SIA, SIA over what is readable, and TPR and FPR at an alpha: what every table of guards has in this order."""
    return (
        rate_with_interval(group, "tpr", "n_triggered"),
        rate_with_interval(group, "fpr", "n_clean"),
        rate_with_interval(group, "sia", "n_triggered"),
        of_readable(group),
        with_alpha(group),
    )


def cell(value: float | None) -> str:
    """Four decimals; a dash where nothing was measured."""
    return "-" if value is None else f"{value:.4f}"


def markdown(header: Any, rows: list[Any]) -> str:
    """A Markdown table; nothing where there are no rows."""
    if not rows:
        return ""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))
