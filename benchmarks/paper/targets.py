"""Tables of what an unlearned copy changes, and of what was aimed at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.paper import published
from benchmarks.paper.cells import (
    average,
    best_patching,
    by_case,
    by_name,
    cell,
    chosen,
    held_out,
    joined,
    label,
    markdown,
    mean,
    of_readable,
    ratios,
    seeds,
    verdict_cells,
    with_a_copy,
)

__all__ = ["targets", "unlearned"]

UNLEARNED_HEADER = (
    "data, network, attack",
    "seeds",
    "guard: SIA",
    "SIA / ACC of the source classes",
    "with an unlearned copy: TPR",
    "FPR",
    "SIA",
    "SIA / ACC of the source classes",
    "TPR / FPR at an alpha of .05",
    "held-out error of the source: without / with; joined by `auto`",
    "NC's patching at its best rate tried: SIA",
    "paper's SIA",
)


def unlearned(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the source without and with the logits of an unlearned copy, means over the same classifiers."""
    rows = []
    for case, group in sorted(by_case(records).items()):
        copies = by_name(group)["unlearned"]
        if not copies:
            continue
        same = with_a_copy(group)
        guards = by_name(same)["guard"]
        paper = published.VERDICTS.get((case[0], case[3], case[4]))
        rows.append(
            (
                label(*case),
                seeds(copies),
                mean(guards, "sia"),
                of_readable(guards),
                *verdict_cells(copies),
                _held_out(copies),
                cell(best_patching(same)),
                "-" if paper is None else f"{paper[2]:.4f}",
            )
        )
    return markdown(UNLEARNED_HEADER, rows)


def _held_out(copies: list[dict[str, Any]]) -> str:
    """The errors by which ``--unlearn auto`` decides, means over the seeds, and how many copies it joins."""
    known = held_out(copies)
    errors = (cell(average([gain[name]["source_error"] for gain in known])) for name in ("without", "with"))
    return f"{' / '.join(errors)}; {joined(copies)}" if known else "-"


TARGETS_HEADER = (
    "data, network, attack",
    "TPR at least the paper's",
    "FPR at most .005",
    "SIA at least the paper's",
    "SIA at least .95 of the source classes' ACC",
    "SIA at least that of NC's patching here",
)


def targets(records: list[dict[str, Any]]) -> str:
    """A Markdown table of what the guards meet, alone / --unlearn auto / always, by the means over the seeds."""
    words = {True: "yes", False: "**no**", None: "-"}
    met: list[list[list[bool | None]]] = [[], [], []]
    rows = []
    for case, found in sorted(by_case(records).items()):
        if case[4] == "none":
            continue
        by_detector = by_name(found)
        same = with_a_copy(found)
        groups = ((by_detector["guard"], found), (chosen(found), same), (by_detector["unlearned"], same))
        row = [_met(case, *group) for group in groups]
        for column, one in zip(met, row, strict=True):
            column.append(one)
        rows.append((label(*case), *_beside([words[one] for one in column] for column in row)))
    if rows:
        rows.append(("met", *_beside(map(_counts, met))))
    return markdown(TARGETS_HEADER, rows)


def _met(case: tuple[str, ...], group: list[dict[str, Any]], records: list[dict[str, Any]]) -> list[bool | None]:
    """In the order of TARGETS_HEADER; None where something is not measured or the paper has no figure.

    group    the guards' records, compared in the four decimals of the paper's figures.     records  all of their classifiers.
    """
    tpr, fpr, sia = (average([record[key] for record in group]) for key in ("tpr", "fpr", "sia"))
    paper_tpr, _, paper_sia = published.VERDICTS.get((case[0], case[3], case[4]), (None, None, None))
    pairs = (
        (tpr, paper_tpr),
        (0.005, fpr),
        (sia, paper_sia),
        (average(ratios(group)), 0.95),
        (sia, best_patching(records)),
    )
    return [None if a is None or b is None else round(a, 4) >= round(b, 4) for a, b in pairs]


def _beside(columns: Iterable[list[str]]) -> list[str]:
    return list(map(" / ".join, zip(*columns, strict=True)))


def _counts(rows: list[list[bool | None]]) -> list[str]:
    """Of each column, how many are met of those that are known."""
    columns = ([met for met in column if met is not None] for column in zip(*rows, strict=True))
    return [f"{sum(known)} of {len(known)}" for known in columns]
