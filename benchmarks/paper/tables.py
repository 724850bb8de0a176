"""The tables of README and of benchmarks/paper/README from benchmarks/results: ``python -m benchmarks.paper.tables``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.paper import published
from benchmarks.paper.cells import (
    average,
    best_patching,
    by_case,
    by_name,
    by_rate,
    cell,
    figures,
    joined,
    label,
    markdown,
    mean,
    named,
    ratios,
    seeds,
    spread,
    verdict_cells,
)
from benchmarks.paper.further_tables import ablation, inspections, robustness
from benchmarks.paper.targets import targets, unlearned

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SUMMARY_HEADER = (
    "data, attack",
    "TPR: guard / with a copy / paper",
    "FPR: guard / with a copy / paper",
    "SIA: guard / with a copy / NC's patching / paper",
    "SIA / ACC of the source classes: guard / with a copy",
    "copies that `--unlearn auto` joins",
    "TPR at an FPR of 5 %: NC's filter / its second reading / B3D / STRIP",
)
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
    "TPR / FPR at an alpha of .05",
    "paper's TPR / FPR / SIA",
    "SIA of NC's patching at its best rate tried: here / in the paper",
)


def summary(records: list[dict[str, Any]]) -> str:
    """A Markdown table with a row for each attack: guard, guard with a copy, other defences and the paper."""
    rows = []
    for case, found in sorted(by_case(records).items()):
        if case[4] == "none":
            continue
        by_detector = by_name(found)
        guards = [by_detector["guard"], by_detector["unlearned"]]
        tpr, fpr, sia = (
            [*(mean(group, key) for group in guards), cell(paper)]
            for key, paper in zip(
                ("tpr", "fpr", "sia"),
                published.VERDICTS.get((case[0], case[3], case[4]), (None, None, None)),
                strict=True,
            )
        )
        sia.insert(2, cell(best_patching(found)))
        ratio = (cell(average(ratios(group))) for group in guards)
        cells = map(" / ".join, (tpr, fpr, sia, ratio))
        kept = joined(by_detector["unlearned"])
        their_tpr = (mean(by_detector[name], "tpr_at_fpr05") for name in ("nc", "nc-target", "b3d", "strip"))
        rows.append((label(case[0], "", "", *case[3:]), *cells, kept, " / ".join(their_tpr)))
    return markdown(SUMMARY_HEADER, rows)


def classifiers(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the classifiers, what the inspection names and its pattern: means over the seeds."""
    rows = []
    for case, group in sorted(by_case(r for r in records if r["detector"] == "guard").items()):
        paper = published.CLASSIFIERS.get((case[0], case[3], case[4]))
        rows.append(
            (
                label(*case),
                seeds(group),
                "; ".join(sorted({named(sorted(record["suspects"])) for record in group})),
                *(spread([record.get(key) for record in group]) for key in ("acc", "asr", "asr_estimated")),
                figures(paper),
            )
        )
    return markdown(CLASSIFIERS_HEADER, rows)


def verdicts(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the guards: mean over the seeds, the lowest and highest; of rates of frames the 95 % interval."""
    rows = []
    for case, found in sorted(by_case(records).items()):
        group = [record for record in found if record["detector"] == "guard"]
        if not group or case[4] == "none":
            continue
        paper = published.VERDICTS.get((case[0], case[3], case[4]))
        theirs = published.NC_BEST.get((case[3], case[4])) if case[0] == "cifar10" else None
        best = cell(best_patching(found))
        rows.append(
            (
                label(*case),
                seeds(group),
                *verdict_cells(group),
                figures(paper),
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
    rows = []
    for case, found in sorted(by_case(records).items()):
        by_detector = by_name(found)
        guard = by_detector["guard"]
        for detector in sorted(OTHERS.keys() & by_detector.keys()):
            group = by_detector[detector]
            paper = published.OTHERS.get((case[3], case[4], detector.removesuffix("-target")))
            rows.append(
                (
                    label(*case),
                    OTHERS[detector],
                    seeds(group),
                    *(mean(group, key) for key in ("tpr", "fpr", "tpr_at_fpr05", "auroc")),
                    f"{mean(guard, 'tpr')} / {mean(guard, 'fpr')}",
                    figures(paper if case[0] == "cifar10" else None),
                )
            )
    return markdown(OTHERS_HEADER, rows)


def patching(records: list[dict[str, Any]]) -> str:
    """A Markdown table of Neural Cleanse's patching: source accuracy at each learning rate, means over the seeds."""
    groups = by_case(record for record in records if record.get("learning_rate") is not None)
    if not groups:
        return ""
    rates = sorted(published.PATCHING, reverse=True)
    rows = []
    for case, group in sorted(groups.items()):
        swept = by_rate(group)
        rows.append((label(*case), *(mean(swept[rate], "sia") for rate in rates)))
    rows.append(("the paper, CIFAR-10, WB multi-class", *(f"{published.PATCHING[rate]:.4f}" for rate in rates)))
    return markdown(("SIA at learning rate", *(f"{rate:g}" for rate in rates)), rows)


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Every table, as Markdown, of the records in a folder; empty where it has none of a table's."""

    def read(pattern: str) -> list[dict[str, Any]]:
        return [record for path in sorted(folder.glob(pattern)) for record in json.loads(path.read_text())]

    records = read("paper-*.json")
    return {
        "results": summary(records),
        "classifiers": classifiers(records),
        "verdicts": verdicts(records),
        "others": others(records),
        "patching": patching(records),
        "targets": targets(records),
        "unlearned": unlearned(records),
        "inspections": inspections(read("inspection-*.json")),
        "ablation": ablation(read("ablation-*.json")),
        "robustness": robustness(read("robustness-*.json")),
    }


def documents() -> dict[Path, str]:
    """The text of each document with tables, with those of this project's records between its markers."""
    everything = tables()
    first = {"results": everything.pop("results")}
    parts = {ROOT / "README.md": first, Path(__file__).parent / "README.md": everything}
    return {path: _filled(path.read_text(encoding="utf-8"), own) for path, own in parts.items()}


def _filled(text: str, parts: dict[str, str]) -> str:
    for name, table in parts.items():
        begin, end = (f"<!-- {name}:{edge} -->" for edge in ("begin", "end"))
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the parts between the markers; with --results print the tables of other records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.tables", description=__doc__)
    parser.add_argument("--results", type=Path, metavar="DIR", help="print the tables of these records, change no file")
    folder = parser.parse_args(arguments).results
    if folder is None:
        for path, text in documents().items():
            path.write_text(text, encoding="utf-8")
        return 0
    found = {name: table for name, table in tables(folder).items() if table}
    if not found:
        print(f"benchmarks.paper.tables: error: {folder}: expected records (paper-*.json), got none", file=sys.stderr)
        return 2
    print("\n\n".join(f"## {name}\n\n{table}" for name, table in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
