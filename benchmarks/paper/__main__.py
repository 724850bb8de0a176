"""The experiments of the paper: one setting, or all of a table.

A table's settings run where joblib is told to (joblib.parallel_config), one after another unless told; each finished one
is a file in the results' folder, so that an interrupted run goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from benchmarks.paper.classifiers import DATASETS, RECIPES, SETTINGS
from benchmarks.paper.measure import PARTS, TABLES, Setting, measure_setting, missing
from benchmarks.paper.tables import RESULTS
from inflight_edge.calibration.attacks import ATTACKS
from inflight_edge.calibration.commands import print_figures
from inflight_edge.errors import InflightError, OptionError

# Of a record, what a person wants to see.
_HIDDEN = ("recipe", "suspects", "findings", "commit", "python", "measured", "held_out")


def main() -> int:
    """Run one setting and write its records, or a table's settings."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=int, choices=sorted(TABLES), help="every setting of a table of the paper")
    what.add_argument("--dataset", choices=sorted(DATASETS), help="one setting of this data set")
    parser.add_argument("--attack", choices=(*ATTACKS, "none"), default="WB")
    parser.add_argument("--setting", choices=SETTINGS, default="multi")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", choices=RECIPES, default="fast", help="of training: paper takes 150 epochs")
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets in their standard layouts")
    parser.add_argument("--runs", type=Path, help="folder that keeps trained classifiers and resumes their training")
    parser.add_argument("--resume", action="store_true", help="with --table: leave out what has records already")
    parser.add_argument("--results", type=Path, default=RESULTS, help="with --table: folder of the results")
    parser.add_argument("--json", type=Path, help="file for the records of one setting")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, help="measure these again and keep the other records of the file"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    try:
        if options.table is not None:
            return run_table(options)
        records = run(options)
    except InflightError as error:
        print(f"benchmarks.paper: error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        write(records, options.json)
    show(records)
    return 0


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of the one setting that the options name."""
    none = "none" in (options.attack, options.setting)
    setting = Setting(
        options.dataset,
        "none" if none else options.attack,
        "none" if none else options.setting,
        options.seed,
        options.recipe,
    )
    return measured(setting, options.json, options)


def measured(setting: Setting, file: Path | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of a setting; with --only those of the file stay but for the named parts."""
    only, known = options.only or PARTS, [] if options.only is None else to_keep(file)
    return measure_setting(setting, options.data, options.runs, progress=not options.quiet, only=only, known=known)


def to_keep(file: Path | None) -> list[dict[str, Any]]:
    """The records that --only adds to.  Raises OptionError where there are none."""
    if file is None or not file.exists():
        raise OptionError(f"--only: expected records to keep in {file}; measure everything first")
    return list(json.loads(file.read_text()))


def run_table(options: argparse.Namespace) -> int:
    """Run what is missing of a table; the first failure ends it, what was finished stays."""
    wanted = []
    for setting in (replace(setting, recipe=options.recipe) for setting in TABLES[options.table]):
        file = options.results / setting.file
        known = to_keep(file) if options.only or (options.resume and file.exists()) else []
        if parts := options.only or missing(setting, known):
            wanted.append((setting, parts, known))
    print(f"table {options.table}: {len(wanted)} of {len(TABLES[options.table])} settings to run", file=sys.stderr)
    options.results.mkdir(parents=True, exist_ok=True)
    Parallel()(delayed(run_to_file)(*row, options) for row in wanted)
    return 0


def run_to_file(
    setting: Setting, parts: Sequence[str], known: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    """What is missing of one setting of a table, in this process or another."""
    records = measure_setting(setting, options.data, options.runs, progress=not options.quiet, only=parts, known=known)
    write(records, options.results / setting.file)
    show(records)


def write(records: list[dict[str, Any]], path: Path) -> None:
    """Records to a file in one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(records, indent=1) + "\n")
    partial.replace(path)


def show(records: list[dict[str, Any]]) -> None:
    """Records for people."""
    for record in records:
        print_figures({key: value for key, value in record.items() if value is not None and key not in _HIDDEN})


if __name__ == "__main__":
    sys.exit(main())
