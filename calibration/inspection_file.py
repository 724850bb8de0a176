"""patterns.safetensors: what an inspection found, for the calibration; read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from inflight_edge.calibration.datasets import check_names
from inflight_edge.calibration.finding import FOUND_BY, Finding
from inflight_edge.calibration.reversal.estimates import AdditionEstimate, Estimate, PatchEstimate
from inflight_edge.errors import DataError, OptionError
from inflight_edge.preprocess import Preprocess

if TYPE_CHECKING:
    from inflight_edge.calibration.inspection import Inspection

__all__ = ["VERSION", "decode", "encode", "finite", "save_png", "write"]

FORMAT = "inflight-edge-inspection"
VERSION = 3
AGAIN = "run `inflight-edge inspect` again"
Tensors = dict[str, NDArray[np.float32]]


def encode(inspection: Inspection) -> tuple[dict[str, Any], Tensors]:
    """Header and tensors.

    Tensors: for each class c either ``mask.c`` (H, W) and ``pattern.c`` (channels, H, W), float32 in 0..1, or
    ``perturbation.c`` (channels, H, W), float32 in -1..1.  The header's ``classes`` says of each class its kind, norm,
    success, sources and anomaly index; ``findings`` says why the suspects are suspects.
    """
    constants = inspection.preprocess
    tensors: Tensors = {}
    for estimate in inspection.estimates:
        if isinstance(estimate, PatchEstimate):
            tensors[f"mask.{estimate.target}"] = np.ascontiguousarray(estimate.mask)
            tensors[f"pattern.{estimate.target}"] = np.ascontiguousarray(estimate.pattern)
        elif isinstance(estimate, AdditionEstimate):
            tensors[f"perturbation.{estimate.target}"] = np.ascontiguousarray(estimate.perturbation)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "suspects": inspection.suspects,
        "accuracy": inspection.accuracy,
        "feature_layer": inspection.feature_layer,
        "class_names": inspection.class_names,
        "input_shape": constants.input_shape,
        "scale": constants.scale,
        "mean": constants.mean,
        "std": constants.std,
        "classes": [
            {"kind": e.kind, "norm": e.norm, "success": e.success, "sources": e.sources, "anomaly_index": finite(index)}
            for e, index in zip(inspection.estimates, inspection.indices.tolist(), strict=True)
        ],
        "findings": [{"target": f.target, "method": f.method, "score": finite(f.score)} for f in inspection.findings],
    }
    return header, tensors


def write(path: Path, header: dict[str, Any], tensors: Tensors) -> None:
    """Write beside the path, then rename."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(save(tensors, metadata={"inspection": json.dumps(header)}))
    partial.replace(path)


def decode(path: Path) -> dict[str, Any]:
    """The fields of an Inspection.  Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the patterns.safetensors that `inflight-edge inspect` writes")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("inspection", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
            raise DataError(f"{path}: not an inspection of version {VERSION}; {AGAIN}")
        preprocess = Preprocess(
            tuple(header["input_shape"]), header["scale"], tuple(header["mean"]), tuple(header["std"])
        )
        names = tuple(header["class_names"]) if header["class_names"] else None
        suspects = tuple(int(c) for c in header["suspects"])
        accuracy, feature_layer = float(header["accuracy"]), header["feature_layer"]
        texts = [*(names or ()), *([] if feature_layer is None else [feature_layer])]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("class names and feature layer: expected text")
        check_names(names or (), str(path))
        if not all(type(size) is int for size in preprocess.input_shape):
            raise TypeError(f"input_shape: expected whole numbers, got {preprocess.input_shape}")
        n_classes = len(header["classes"])
        wanted = _expected(header["classes"], preprocess.input_shape)
        if set(tensors) != set(wanted):
            odd = sorted(set(tensors) ^ set(wanted))
            raise ValueError(f"missing or unknown tensors: {', '.join(odd)}")
        for name, (shape, low) in wanted.items():
            _check(path, name, tensors[name], shape, low)
        estimates = tuple(_estimate(c, record, tensors, n_classes) for c, record in enumerate(header["classes"]))
        indices = np.array([_number("anomaly_index", record["anomaly_index"], np.nan) for record in header["classes"]])
        findings = tuple(_finding(record, n_classes) for record in header["findings"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, OverflowError, OptionError) as error:
        raise DataError(f"{path}: not a readable inspection ({error}); {AGAIN}") from error
    if not all(0 <= c < n_classes for c in suspects) or (names is not None and len(names) != n_classes):
        raise DataError(f"{path}: suspects or class names do not fit {n_classes} classes; {AGAIN}")
    return {
        "estimates": estimates,
        "indices": indices,
        "suspects": suspects,
        "accuracy": accuracy,
        "preprocess": preprocess,
        "feature_layer": feature_layer,
        "class_names": names,
        "findings": findings,
    }


def _expected(classes: list[dict[str, Any]], shape: tuple[int, int, int]) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape and lowest value of each tensor that the kinds of the classes call for."""
    result: dict[str, tuple[tuple[int, ...], float]] = {}
    for c, record in enumerate(classes):
        if set(record) != {"kind", "norm", "success", "sources", "anomaly_index"}:
            raise ValueError(f"class {c}: missing or unknown keys")
        if record["kind"] == "patch":
            result |= {f"mask.{c}": (shape[1:], 0.0), f"pattern.{c}": (shape, 0.0)}
        elif record["kind"] == "addition":
            result[f"perturbation.{c}"] = (shape, -1.0)
        else:
            raise ValueError(f"class {c}: kind: expected patch or addition, got {record['kind']!r}")
    return result


def _check(path: Path, name: str, values: NDArray[Any], shape: tuple[int, ...], low: float) -> None:
    if values.shape != shape or not np.isfinite(values).all():
        raise DataError(f"{path}: {name}: expected finite numbers of shape {shape}, got shape {values.shape}; {AGAIN}")
    if values.dtype != np.float32 or not ((values >= low) & (values <= 1.0)).all():
        raise DataError(
            f"{path}: {name}: expected float32 from {low:g} to 1, got {values.dtype} from "
            f"{values.min():g} to {values.max():g}; {AGAIN}"
        )


def _estimate(target: int, record: dict[str, Any], tensors: Tensors, n_classes: int) -> Estimate:
    norm, success, sources = float(record["norm"]), float(record["success"]), tuple(record["sources"])
    if not 1e-12 <= norm < np.inf or not 0.0 <= success <= 1.0:
        raise ValueError(f"class {target}: expected norm > 0 and success in 0..1, got {norm} and {success}")
    if not all(type(s) is int and 0 <= s < n_classes and s != target for s in sources) or not sources:
        raise ValueError(f"class {target}: sources: expected other classes, got {sources}")
    if record["kind"] == "patch":
        return PatchEstimate(target, tensors[f"mask.{target}"], tensors[f"pattern.{target}"], norm, success, sources)
    return AdditionEstimate(target, tensors[f"perturbation.{target}"], norm, success, sources)


def _number(name: str, value: Any, missing: float) -> float:
    """What ``finite`` wrote; ``missing`` for null."""
    if value is not None and type(value) not in (int, float):
        raise ValueError(f"{name}: expected a number or null, got {value!r}")
    return missing if value is None else float(value)


def _finding(record: dict[str, Any], n_classes: int) -> Finding:
    target, method, score = (record[key] for key in ("target", "method", "score"))
    if method not in FOUND_BY or type(target) is not int or not 0 <= target < n_classes:
        raise ValueError(f"findings: got {record}")
    return Finding(target, method, _number("findings: score", score, np.inf))


def finite(value: float) -> float | None:
    """A number for JSON, None where it is not finite."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def save_png(path: Path, planes: NDArray[np.float32]) -> None:
    """Save (channels, H, W) in 0..1 as a picture, enlarged to at least 256 pixels; the first 3 channels as colour."""
    from PIL import Image

    image = np.rint(np.clip(planes, 0, 1) * 255).astype(np.uint8)
    array = image[0] if len(image) < 3 else image[:3].transpose(1, 2, 0)
    factor = max(1, -(-256 // max(array.shape[:2])))
    Image.fromarray(array).resize((array.shape[1] * factor, array.shape[0] * factor), Image.Resampling.NEAREST).save(
        path
    )
