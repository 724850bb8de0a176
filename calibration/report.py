"""A bundle's report: one HTML file without anything outside it, for people who must decide whether to trust a guard."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from inflight_edge.bundle import Bundle
from inflight_edge.calibration.evaluate import MEANING
from inflight_edge.errors import DataError

__all__ = ["render"]

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --text: #16202c; --soft: #566373; --line: #d5dbe3; }
@media (prefers-color-scheme: dark) { :root { --ground: #11161c; --card: #1a212a; --text: #e8edf3; --soft: #9fb0c2;
--line: #313c49; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--ground); color: var(--text);
font: 16px/1.45 system-ui, sans-serif; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 0 0 .5rem; } h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
p { margin: .3rem 0; overflow-wrap: anywhere; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem .2rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 400; }
.chosen td { font-weight: 700; } .row { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
.pictures img { width: 10rem; image-rendering: pixelated; border: 1px solid var(--line); display: block; }
.chart { background: #fff; border-radius: .3rem; } .chart svg { max-width: 100%; height: auto; display: block; }
.confusion td, .confusion th { text-align: right; padding: .15rem .4rem; border: 1px solid var(--line); }
"""


def render(bundle: Bundle, *, name: str, evaluation: Mapping[str, Any] | None = None) -> str:
    """The report as HTML.

    name        of the bundle, for the title.
    evaluation  figures of `inflight-edge evaluate --json` on held-out frames; without them the report has the calibration's
                own held-out figures alone, and says so.
    Raises DataError for an evaluation that is none, and for a bundle whose metrics are not those of `calibrate`.
    """
    parts = [_head(bundle, name), _measured(evaluation)]
    guards = bundle.metrics.get("guards")
    try:
        parts.append(_inspection(bundle))
        parts += [_guard(bundle, entry) for entry in (guards if isinstance(guards, list) else [])]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"bundle: metrics: expected those that `inflight-edge calibrate` writes, got others "
            f"({type(error).__name__}: {error}); calibrate it anew"
        ) from error
    parts.append(_made(bundle))
    title = escape(f"inflight-edge: {name}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def _head(bundle: Bundle, name: str) -> str:
    metrics, shape = bundle.metrics, bundle.preprocess.input_shape
    targets = ", ".join(bundle.class_names[guard.target] for guard in bundle.guards)
    facts = [
        ("guarded classes", targets),
        ("classes", str(len(bundle.class_names))),
        ("input", f"{shape[0]} x {shape[1]} x {shape[2]}"),
        ("features", f"{bundle.n_features}, {bundle.feature_layer}"),
        *_layers(metrics.get("feature_layers")),
        *_unlearned(metrics.get("unlearned")),
        ("clean images used", _number(metrics.get("n_images"))),
        ("clean accuracy on them", _number(metrics.get("accuracy"))),
    ]
    return _section("The bundle", _table(("", ""), facts))


def _layers(tried: object) -> list[tuple[str, str]]:
    """The feature layers that were compared, where there were several."""
    if not isinstance(tried, list) or len(tried) < 2:
        return []
    texts = [
        f"{entry.get('feature_layer')}: "
        + str(entry.get("error") or f"{_number(entry.get('verdict_error'))}, {_number(entry.get('source_error'))}")
        for entry in tried
        if isinstance(entry, dict)
    ]
    return [("feature layers compared: held-out error of the verdict, of the source", "; ".join(texts))]


def _unlearned(gain: object) -> list[tuple[str, str]]:
    """What the copy that has unlearned the patterns is good for, where there is one."""
    if not isinstance(gain, dict):
        return []
    if "reason" in gain:
        return [("unlearned copy", f"left out, {gain['reason']}")]
    texts = [
        f"{name} it {_number(errors.get('verdict_error'))}, {_number(errors.get('source_error'))}"
        for name in ("without", "with")
        if isinstance(errors := gain.get(name), dict)
    ]
    images = _number(gain.get("held_out_images"))
    return [
        (
            f"unlearned copy: error of the verdict, of the source on {images} images that neither it nor a guard was fitted to",
            "; ".join([*texts, "joined" if gain.get("joined", True) else "left out"]),
        )
    ]


def _measured(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        text = (
            "No held-out frames were given. What follows are the calibration's own held-out folds: clean images of the "
            "defender and the estimated pattern. How the guard does on the true trigger they cannot tell."
        )
        return _section("Measured on held-out frames", f"<p>{text}</p>")
    known = [(MEANING[key], _number(value)) for key, value in evaluation.items() if key in MEANING]
    if not known:
        raise DataError("evaluation: expected the output of `inflight-edge evaluate --json`, got other keys")
    return _section("Measured on held-out frames", _table(("", ""), known))


def _inspection(bundle: Bundle) -> str:
    rows = bundle.metrics.get("inspection")
    if not isinstance(rows, list) or not rows:
        return ""
    keys = [key for key in rows[0] if key not in ("class", "name", "suspect")]
    header = ("class", *(key.replace("_", " ") for key in keys), "suspect")
    body = [
        (str(row.get("name")), *(_number(row.get(key)) for key in keys), "yes" if row.get("suspect") else "")
        for row in rows
    ]
    text = "<p>What the search for a backdoor found for every class, the most anomalous first.</p>"
    return _section(
        "Inspection", text + _table(header, body, chosen=[i for i, row in enumerate(rows) if row.get("suspect")])
    )


def _guard(bundle: Bundle, entry: Mapping[str, Any]) -> str:
    target = bundle.class_names[entry["target"]]
    density = entry["density"]
    parts = [
        f"<p>The estimated pattern sends {entry['asr_estimated']:.1%} of the images of {_sources(bundle, entry['target'])} to "
        f"{escape(target)}, those it was searched with among them.{_samples(entry.get('samples'))}</p>"
    ]
    if _has_copy(bundle):
        parts.append(
            "<p>The unlearned copy was trained on these very images, so that what is called held-out here, which is held out of "
            "the densities alone, flatters this guard; what the copy is good for is in the first table.</p>"
        )
    kept = entry.get("evidence")
    if kept:
        captions = {
            "clean": "an image of another class",
            "triggered": "with the estimated pattern",
            "difference": "the difference, stretched around grey",
        }
        figures = "".join(
            f'<figure><img alt="{text}" src="data:image/png;base64,{escape(kept["pictures"][key])}">'
            f"<figcaption>{text}</figcaption></figure>"
            for key, text in captions.items()
        )
        parts.append(f'<h3>Pattern</h3><div class="row pictures">{figures}</div>')
        parts.append(f"<h3>Margins of held-out images</h3>{_margins(kept['margins'])}")
        parts.append(f"<h3>Features</h3>{_projection(bundle, kept['projection'], entry['target'])}")
        parts.append(f"<h3>Inferred source of triggered images</h3>{_confusion(bundle, kept['confusion'])}")
    parts.append(f"<h3>Density</h3><p>{escape(density['reason'])}.</p>{_trials(density['trials'])}")
    return _section(f"Guard of {target}", "".join(parts))


def _has_copy(bundle: Bundle) -> bool:
    """Whether an unlearned copy is joined."""
    gain = bundle.metrics.get("unlearned")
    return isinstance(gain, dict) and bool(gain.get("joined", True))


def _sources(bundle: Bundle, target: int) -> str:
    """The classes that the pattern was searched from, in words."""
    rows = bundle.metrics.get("inspection") or []
    sources = next((row.get("sources") for row in rows if row.get("class") == target), None)
    if not isinstance(sources, list):
        return "all other classes"
    return ", ".join(escape(bundle.class_names[c]) for c in sources)


def _samples(samples: Mapping[str, Any] | None) -> str:
    if samples is None:
        return ""
    return (
        f" The guard was fitted to {samples['n']:d} samples: the pattern at {len(samples['places'])} place(s), each image in "
        f"{1 + len(samples['views'])} view(s)."
    )


def _margins(margins: Mapping[str, Sequence[float]]) -> str:
    groups = {name: np.asarray(margins[name], np.float64) for name in ("clean", "triggered")}
    everything = np.arcsinh(np.concatenate(list(groups.values())))
    edges = np.linspace(everything.min(), everything.max() + 1e-9, 61)

    def draw(axes: Any) -> None:
        for (label, values), colour in zip(groups.items(), ("#0b6e4f", "#b3261e"), strict=True):
            axes.hist(np.arcsinh(values), edges, alpha=0.6, color=colour, label=f"{label} ({len(values)})")
        axes.axvline(0.0, color="black", linewidth=1)
        # Whole powers of ten in nats, as far apart as they can be read.
        largest = int(max(1, math.log10(max(1.0, np.sinh(np.abs(everything).max())))))
        steps = range(0, largest + 1, max(1, largest // 3))
        ticks = sorted({sign * 10.0**k for k in steps for sign in (-1, 1)} | {0.0})
        axes.set_xticks(np.arcsinh(ticks), [f"{tick:g}" for tick in ticks])
        axes.set_xlabel("margin, nats (scale asinh); from 0 on a frame is a trigger")
        axes.set_ylabel("images")
        axes.legend(loc="upper center")  # where it fits best is looked for slowly, with a warning

    clean, triggered = groups["clean"], groups["triggered"]
    text = (
        f"{int((clean >= 0).sum())} of {len(clean)} clean images of the target would be flagged, "
        f"{int((triggered < 0).sum())} of {len(triggered)} triggered ones missed."
    )
    return _chart(draw, text, (8, 3))


def _projection(bundle: Bundle, projection: Mapping[str, Any], target: int) -> str:
    x, y, labels = (np.asarray(projection[key]) for key in ("x", "y", "class"))

    def draw(axes: Any) -> None:
        classes = np.unique(labels)
        for i, label in enumerate(classes):
            own = labels == label
            colour = f"C{i % 10}"
            # A space before it: matplotlib leaves out what begins with an underscore.  A dollar begins a formula.
            name = " " + bundle.class_names[label].replace("$", r"\$") + (" (clean)" if label == target else "")
            axes.scatter(x[own], y[own], s=8 if label != target else 16, color="black" if label == target else colour,
                         marker="x" if label == target else "o", linewidths=0.8, label=name)  # fmt: skip
        if len(classes) <= 20:
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second")

    share = "" if not projection["variance"] else f"{sum(projection['variance']):.0%} of the variance"
    text = f"Standardised features of {len(labels)} images by true class, {share}. Black crosses: clean images of the target."
    return _chart(draw, text, (8, 4.5))


def _confusion(bundle: Bundle, confusion: Mapping[str, Any]) -> str:
    classes, counts = confusion["classes"], confusion["counts"]
    if not classes:
        return '<p class="soft">Too many classes for a table.</p>'
    names = [bundle.class_names[label] for label in classes]
    rows = [(name, row) for name, row in zip(names, counts, strict=True) if sum(row)]
    total, right = sum(map(sum, counts)), sum(row[i] for i, row in enumerate(counts))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("true \\ inferred", *names, "missed"))
    body = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(_cell(value, value / sum(row)) for value in row) + "</tr>"
        for name, row in rows
    )
    text = f"Held-out images with the estimated pattern: the source is right for {right} of {total}."
    return f'<p>{text}</p><div class="wide"><table class="confusion"><tr>{head}</tr>{body}</table></div>'


def _cell(value: int, share: float) -> str:
    colour = "#fff" if share > 0.5 else "inherit"
    return f'<td style="background: rgb(47 93 158 / {share:.2f}); color: {colour}">{value}</td>'


def _trials(trials: Sequence[Mapping[str, Any]]) -> str:
    keys = ("verdict_error", "false_alarms", "missed", "source_error")
    rows = []
    for trial in trials:
        form = trial["candidate"]
        detail = f"{form['kind']}, {form['n_components']}, {form['regularisation']:g}, {form['shrinkage']:g}"
        rows.append((detail, *(_number(trial[key]) for key in keys)))
    header = ("kind, components, regularisation, shrinkage", *(key.replace("_", " ") for key in keys))
    return _table(header, rows, chosen=[0])


def _made(bundle: Bundle) -> str:
    constants = bundle.preprocess
    facts = [
        ("preprocessing", f"(pixel x {constants.scale:g} - {constants.mean}) / {constants.std}"),
        ("largest difference between torch and ONNX Runtime", _number(bundle.metrics.get("parity"))),
        *sorted(bundle.versions.items()),
    ]
    limits = (
        "Everything here rests on the inspection: a backdoor that it does not see has no guard, and the inferred source is "
        "as good as the estimated pattern. Attacks made with this detector in mind are not covered."
    )
    return _section("How it was made", f"{_table(('', ''), facts)}<p>{limits}</p>")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, chosen: Sequence[int] = ()) -> str:
    head = (
        "" if not any(header) else f"<thead><tr>{''.join(f'<th>{escape(text)}</th>' for text in header)}</tr></thead>"
    )
    body = "".join(
        f"<tr{' class=chosen' if i in chosen else ''}>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _chart(draw: Any, text: str, size: tuple[float, float]) -> str:
    """A drawing of matplotlib as SVG inside the page, with its caption."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": text, "font.size": 9}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(text)}" ', 1)
    return f'<figure><div class="chart">{svg}</div><figcaption>{escape(text)}</figcaption></figure>'
