"""What a calibration keeps for its report: pictures, held-out margins and sources, features in two dimensions."""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA

from inflight_edge._contents import dump_json
from inflight_edge.calibration.samples import Samples
from inflight_edge.calibration.selection import Choice

__all__ = ["guard_evidence", "trimmed"]

# A bundle's manifest holds at most a megabyte: so many points and confusion counts of all guards together, and pictures
# of so many pixels' edge for up to ten guards.  What is too much all the same goes, the last guards' first.
POINTS, COUNTS, LONGEST = 4000, 40_000, 64
# A confusion table of more classes could not be read.
MAX_CONFUSION = 40


def guard_evidence(
    clean: NDArray[np.float32],
    triggered: NDArray[np.float32],
    samples: Samples,
    target: int,
    choice: Choice,
    *,
    n_guards: int,
    seed: int,
) -> dict[str, Any]:
    """Plain values for the bundle's metrics.

    clean, triggered  (channels, H, W) float32 in 0..255: one image of another class, and with the estimated pattern.
    samples  what the guard was fitted to, in the order of the choice's held-out figures; one of each image is shown.

    Keys: pictures (PNG, base64), margins (held-out, nats: the clean ones of the target, some of the triggered ones),
    projection (x, y and class of some features on their first two principal components, standardised), confusion (rows: true
    class).
    """
    one_each = samples.one_each
    features, labels = samples.features[one_each], samples.labels[one_each]
    held_out_margins, sources = choice.margins[one_each], choice.sources[one_each]
    longest = max(8, int(LONGEST * min(1.0, (10 / n_guards) ** 0.5)))
    rng = np.random.default_rng(seed)
    shown = np.sort(rng.permutation(len(labels))[: max(50, POINTS // n_guards)])
    deviations = features.std(axis=0)
    standard = (features - features.mean(axis=0)) / np.where(deviations > 0, deviations, 1.0)
    plane = PCA(2, random_state=0, svd_solver="full") if min(standard.shape) >= 2 else None
    points = np.zeros((len(labels), 2)) if plane is None else plane.fit_transform(standard.astype(np.float64))
    of_target = labels == target
    return {
        "pictures": {name: _png(image, longest) for name, image in _pictures(clean, triggered).items()},
        "margins": {
            "clean": _numbers(held_out_margins[of_target]),
            "triggered": _numbers(held_out_margins[~of_target & _among(shown, labels)]),
        },
        "projection": {
            "x": [round(float(v), 3) for v in points[shown, 0]],
            "y": [round(float(v), 3) for v in points[shown, 1]],
            "class": labels[shown].tolist(),
            "variance": [] if plane is None else [round(float(v), 4) for v in plane.explained_variance_ratio_],
        },
        "confusion": _confusion(labels[~of_target], sources[~of_target], held_out_margins[~of_target], n_guards),
    }


def trimmed(metrics: dict[str, Any], limit: int) -> dict[str, Any]:
    """The metrics with what their JSON has room for in so many bytes: evidence, then trials go, of the last guards first."""
    result = copy.deepcopy(metrics)
    entries = [entry for report in (result, *result.get("precisions", {}).values()) for entry in report["guards"]]
    strips: tuple[Callable[[dict[str, Any]], Any], ...] = (
        lambda entry: entry.pop("evidence", None),
        lambda entry: entry["density"].update(trials=[]),
    )
    for strip in strips:
        for entry in reversed(entries):
            if len(dump_json(result) or b"") <= limit:
                return result
            strip(entry)
    return result


def _among(shown: NDArray[np.intp], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = np.zeros(len(labels), bool)
    mask[shown] = True
    return mask


def _pictures(clean: NDArray[np.float32], triggered: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """A clean image, the same with the pattern, and their difference around grey, stretched to the full range."""
    difference = triggered - clean
    largest = float(np.abs(difference).max())
    stretched = 127.5 + difference * np.float32(127.5 / largest if largest > 0 else 0.0)
    return {"clean": clean, "triggered": triggered, "difference": stretched}


def _png(planes: NDArray[np.float32], longest: int) -> str:
    pixels = np.rint(np.clip(planes, 0, 255)).astype(np.uint8)
    image = Image.fromarray(pixels[0] if len(pixels) < 3 else pixels[:3].transpose(1, 2, 0))
    image.thumbnail((longest, longest))
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def _numbers(values: NDArray[np.float32]) -> list[float]:
    """Numbers for JSON: five digits, infinities cut to the largest float32."""
    limited = np.nan_to_num(values.astype(np.float64), posinf=3e38, neginf=-3e38)
    return [float(f"{value:.5g}") for value in limited]


def _confusion(
    labels: NDArray[np.int64], sources: NDArray[np.int64], margins: NDArray[np.float32], n_guards: int
) -> dict[str, Any]:
    """Counts of held-out triggered images: true class against inferred class; the last column is `missed`."""
    classes = np.unique(np.concatenate([labels, sources]))
    if len(classes) > MAX_CONFUSION or len(classes) ** 2 * n_guards > COUNTS:
        return {"classes": [], "counts": []}
    counts = np.zeros((len(classes), len(classes) + 1), np.int64)
    columns = np.where(margins >= 0, np.searchsorted(classes, sources), len(classes))
    np.add.at(counts, (np.searchsorted(classes, labels), columns), 1)
    return {"classes": classes.tolist(), "counts": counts.tolist()}
