"""SVG plots of a run: histograms of the latencies, and how the scorer scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]

_BASE = {"classes": 10, "components": 1, "features": 512, "batch": 1}
_LABELS = {
    "classes": "classes C",
    "components": "components per class K",
    "features": "features D",
    "batch": "frames N",
}


def draw(result: dict[str, Any], folder: Path) -> list[str]:
    """Write the plots that the records allow; their file names.  The same records give the same bytes."""
    import matplotlib

    names = []
    with matplotlib.rc_context({"svg.hashsalt": "inflight-edge", "svg.fonttype": "none"}):
        for name, make in (
            ("latency_scorer.svg", _scorer),
            ("latency_frame.svg", _frame),
            ("latency_scaling.svg", _scaling),
        ):
            figure = make(result)
            if figure is not None:
                figure.savefig(folder / name, format="svg", metadata={"Date": None})
                names.append(name)
    return names


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * columns, 3.6), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _histograms(result: dict[str, Any], group: str) -> list[tuple[dict[str, Any], list[list[int]]]]:
    pairs = [(result["records"][h["record"]], h["buckets"]) for h in result["histograms"]]
    return [(record, buckets) for record, buckets in pairs if record["group"] == group]


def _plot_histogram(axes: Any, label: str, buckets: list[list[int]]) -> None:
    """Share of calls in each of 12 bins a decade: the stored buckets are finer than a line can show."""
    import numpy as np

    low, counts = np.array(buckets, np.float64).T
    bins = np.floor(12 * np.log10(np.maximum(low, 1.0))).astype(int)
    positions = np.arange(bins.min() - 1, bins.max() + 2)
    shares = np.array([counts[bins == position].sum() for position in positions]) / counts.sum()
    axes.plot(10.0 ** ((positions + 0.5) / 12) / 1000, shares, drawstyle="steps-mid", label=label)


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _scorer(result: dict[str, Any]) -> Any:
    """Latency of one frame by backend, one panel a kind, at the first shape of that kind."""
    found = _histograms(result, "scorer")
    kinds = list(dict.fromkeys(record["kind"] for record, _ in found))
    if not kinds:
        return None
    figure, panels = _figure(len(kinds))
    for axes, kind in zip(panels, kinds, strict=True):
        own = [(record, buckets) for record, buckets in found if record["kind"] == kind]
        shape = [own[0][0][key] for key in _BASE]
        for record, buckets in own:
            if [record[key] for key in _BASE] == shape:
                _plot_histogram(axes, record["backend"], buckets)
        _finish(axes, f"{kind}, C={shape[0]}, K={shape[1]}, D={shape[2]}", "us, one frame", "share of calls")
    return figure


def _frame(result: dict[str, Any]) -> Any:
    """Latency of a whole frame by defence, one panel a network."""
    found = [(record["kind"].split("/"), buckets) for record, buckets in _histograms(result, "frame")]
    networks = list(dict.fromkeys(names[0] for names, _ in found))
    if not networks:
        return None
    figure, panels = _figure(len(networks))
    for axes, network in zip(panels, networks, strict=True):
        for names, buckets in found:
            if names[0] == network and names[2] == "whole":
                _plot_histogram(axes, names[1], buckets)
        _finish(axes, network, "us, whole frame", "share of frames")
    return figure


def _scaling(result: dict[str, Any]) -> Any:
    """Median over each axis, the others at their base; a batch counts per frame."""
    records = [record for record in result["records"] if record["group"] == "scaling"]
    if not records:
        return None
    figure, panels = _figure(len(_BASE))
    for axes, axis in zip(panels, _BASE, strict=True):
        fixed = {key: value for key, value in _BASE.items() if key != axis}
        for kind in ("diagonal", "shared", "full"):
            for backend, style in (("capi", "-o"), ("numpy", ":x")):
                points = sorted(
                    (record[axis], record["p50_ns"] / record["batch"] / 1000)
                    for record in records
                    if (record["kind"], record["backend"]) == (kind, backend)
                    and all(record[key] == value for key, value in fixed.items())
                )
                if points:
                    axes.plot(*zip(*points, strict=True), style, markersize=3, label=f"{kind}, {backend}")
        axes.set_yscale("log")
        _finish(axes, ", ".join(f"{key} {value}" for key, value in fixed.items()), _LABELS[axis], "us per frame, p50")
    return figure
