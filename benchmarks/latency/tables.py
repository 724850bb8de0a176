"""README tables and SVG plots from the records: python -m benchmarks.latency.tables [FILE] [--readme FILE]."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.latency.cases import Case
from benchmarks.latency.plots import draw

__all__ = ["fill", "render"]

BEGIN, END = "<!-- latency:begin -->", "<!-- latency:end -->"
_HERE = Path(__file__).parent
_PERCENTILES = ("p50_ns", "p99_ns", "p999_ns", "max_ns")
_SHAPE = ("kind", "classes", "components", "features", "batch")
_HEADER = ("p50", "p99", "p99.9", "max")
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Write the tables between the markers of the README and the plots beside it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency.tables", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=_HERE.parent / "results" / "latency.json")
    parser.add_argument("--readme", type=Path, default=_HERE / "README.md")
    options = parser.parse_args(arguments)
    try:
        result = json.loads(options.file.read_text(encoding="utf-8"))
        readme = options.readme.read_text(encoding="utf-8")
        pruning = options.file.with_name("pruning.json")  # of benchmarks.latency.pruning, which needs a data set
        result["pruning"] = json.loads(pruning.read_text(encoding="utf-8")) if pruning.exists() else []
    except OSError as error:
        print(
            f"benchmarks.latency.tables: error: {error}; run `python -m benchmarks.latency --json FILE`",
            file=sys.stderr,
        )
        return 2
    plots = draw(result, options.readme.parent)
    options.readme.write_text(fill(readme, render(result, plots)), encoding="utf-8")
    return 0


def fill(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the markers.  Raises ValueError when they are not there once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README: expected {BEGIN} and then {END}, once each")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def render(result: dict[str, Any], plots: Sequence[str] = ()) -> str:
    """All tables of a run, as Markdown."""
    records = result["records"]
    parts = ["**A quick run: these figures mean nothing.**"] if result["quick"] else []
    parts += [_environment(result)]
    parts += [_scorer(records, kind) for kind in ("diagonal", "shared", "full")]
    parts += [_verdict(records), _pruning(result.get("pruning", []))]
    parts += [_bandwidth(records), _compute(records), *_frames(records)]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in plots]
    if result["notes"]:
        parts.append("\n".join(f"- {note}" for note in result["notes"]))
    if result["skipped"]:
        parts.append(
            "Not measured:\n\n" + "\n".join(f"- {entry['what']}: {entry['reason']}" for entry in result["skipped"])
        )
    return "\n\n".join(part for part in parts if part)


def table(header: Sequence[str], rows: Iterable[Sequence[object]], title: str) -> str:
    """Markdown table, "" without rows."""
    body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if not body:
        return ""
    return "\n".join([f"{title}\n", f"| {' | '.join(header)} |", "|" + "---|" * len(header), *body])


def duration(nanoseconds: float) -> str:
    """Nanoseconds with three figures and a unit."""
    units = ((1e3, 1.0, "ns"), (1e6, 1e3, "us"), (1e9, 1e6, "ms"), (math.inf, 1e9, "s"))
    divisor, unit = next((divisor, unit) for limit, divisor, unit in units if nanoseconds < limit)
    value = nanoseconds / divisor
    return f"{value:.{0 if value >= 100 or unit == 'ns' else 1 if value >= 10 else 2}f} {unit}"


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _durations(record: Record) -> list[str]:
    return [duration(record[key]) for key in _PERCENTILES]


def _select(records: list[Record], group: str, **wanted: object) -> list[Record]:
    return [r for r in records if r["group"] == group and all(r[key] == value for key, value in wanted.items())]


def _shape(record: Record) -> str:
    return f"C={record['classes']}, K={record['components']}, D={record['features']}"


def _environment(result: dict[str, Any]) -> str:
    e = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    jetson = "".join(f", {key}: {e[key]}" for key in ("device", "nvpmodel", "jetson_clocks") if e[key])
    load = "unknown" if e["load"] is None else f"{e['load'][0]:.2f}"
    return (
        f"{e['cpu']}, {e['usable_cores']} cores, governor {e['governor'] or 'unknown'}, load {load} at the start{jetson}; "
        f"instruction set {e['instruction_set']}; {e['system']}, Python {e['python']}; {versions}; commit {e['commit']}."
    )


def _scorer(records: list[Record], kind: str) -> str:
    chosen = _select(records, "scorer", kind=kind)
    base = {tuple(r[key] for key in _SHAPE): r["p50_ns"] for r in chosen if r["backend"] == "capi"}
    rows = []
    for r in chosen:
        reference = base.get(tuple(r[key] for key in _SHAPE))
        ratio = _ratio(r["p50_ns"] / reference) if reference else "-"
        rows.append((_shape(r), r["batch"], r["backend"], *_durations(r), ratio))
    header = ("guard", "frames a call", "backend", *_HEADER, "p50 / capi")
    return table(header, rows, f"Log-likelihoods, {kind}:")


def _verdict(records: list[Record]) -> str:
    rows = [(r["kind"], _shape(r), r["backend"], *_durations(r)) for r in _select(records, "verdict")]
    return table(("kind", "guard", "backend", *_HEADER), rows, "Verdict (`ife_judge`), one frame:")


def _pruning(records: list[Record]) -> str:
    rows = [
        (
            f"{record['kind']}, C={record['classes']}, K=1, D={record['features']}",
            f"{record['plain_bytes']:,}",
            f"{record['verdict_bytes']:,}",
            f"{record['share']:.1%}",
            f"{record['rows_in_full']:.1f}",
        )
        for record in records
    ]
    header = ("guard", "bytes of all log-likelihoods", "bytes of the verdict", "share", "rows read in full")
    title = (
        "Bytes that an exact verdict reads of a guard of many classes, mean of 500 test images, on trained features:"
    )
    return table(header, rows, title)


def _bandwidth(records: list[Record]) -> str:
    probes = [(r["bytes"], r["bytes"] / max(1, r["p50_ns"])) for r in _select(records, "roofline", kind="read")]
    rows = []
    for r in _select(records, "scorer", backend="capi", batch=1) if probes else []:
        case = Case(**{key: r[key] for key in _SHAPE})
        size, limit = min(probes, key=lambda probe: abs(math.log(probe[0] / case.working_set)))
        reached = r["bytes"] / max(1, r["p50_ns"])
        share = f"{100 * reached / limit:.0f} %"
        rows.append((r["kind"], _shape(r), r["bytes"], f"{reached:.1f}", f"{limit:.1f} ({size} bytes)", share))
    header = ("kind", "guard", "bytes", "GB/s", "probe GB/s", "share")
    return table(header, rows, "Roofline, one frame: bytes per second against a read of the same working set:")


def _compute(records: list[Record]) -> str:
    probes = _select(records, "roofline", kind="multiply_add")
    rows = []
    for r in [r for r in _select(records, "scorer", backend="capi") if r["batch"] > 1 and probes]:
        peak, reached = (p["flops"] / max(1, p["p50_ns"]) for p in (probes[0], r))
        rows.append(
            (r["kind"], _shape(r), r["batch"], f"{reached:.1f}", f"{peak:.1f}", f"{100 * reached / peak:.0f} %")
        )
    header = ("kind", "guard", "frames", "Gflop/s", "peak Gflop/s", "share")
    return table(header, rows, "Roofline, batches: operations per second against multiply-adds in registers, one core:")


def _frames(records: list[Record]) -> list[str]:
    chosen = _select(records, "frame")
    parts = []
    for network in dict.fromkeys(r["kind"].partition("/")[0] for r in chosen):
        named = {r["kind"].partition("/")[2]: r for r in chosen if r["kind"].startswith(f"{network}/")}
        whole = {name.partition("/")[0]: r for name, r in named.items() if name.endswith("/whole")}
        whole.pop("alone", None)
        bare = whole["bare"]["p50_ns"]
        rows = [(name, *_durations(r), _ratio(r["p50_ns"] / max(1, bare))) for name, r in sorted(
            whole.items(), key=lambda item: item[1]["p50_ns"])]  # fmt: skip
        parts.append(table(("defence", *_HEADER, "p50 / bare"), rows, f"Whole frame, {network}:"))
        for loop, where in (("alone", "in a loop of its own, as on a device"), ("guard", "between the other defences")):
            stages = {name.partition("/")[2]: r for name, r in named.items() if name.startswith(f"{loop}/")}
            engine = max(1, stages["engine"]["p50_ns"]) if stages else 1
            rows = [(name, *_durations(r), *(f"{100 * r[key] / engine:.2f} %" for key in ("p50_ns", "p99_ns")))
                    for name, r in stages.items()]  # fmt: skip
            header = ("stage", *_HEADER, "p50 / engine's p50", "p99 / engine's p50")
            parts.append(table(header, rows, f"Stages of the guarded classifier, {network}, {where}:"))
    return parts


if __name__ == "__main__":
    sys.exit(main())
