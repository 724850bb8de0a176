"""Other ways to the same log-likelihoods: each prepares what it can once, and then maps features to rows.

A peer is made from a guard whose standardiser is the identity, and returns a function (N, D) float32 -> (N, R).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.latency.cases import unpack
from inflight_edge.guard import FloatArray, Guard
from inflight_edge.scoring.reference import component_constants

__all__ = ["PEERS", "Score", "missing"]

Score = Callable[[FloatArray], NDArray[np.floating]]


def sklearn(guard: Guard) -> Score:
    """One fitted GaussianMixture per class, its score_samples."""
    mixtures = [_mixture(guard, row) for row in range(guard.classes.size)]

    def score(features: FloatArray) -> NDArray[np.floating]:
        return np.stack([mixture.score_samples(features) for mixture in mixtures], axis=1)

    return score


def scipy(guard: Guard) -> Score:
    """multivariate_normal.logpdf per component, with a factored covariance; logsumexp where a class has several."""
    from scipy.special import logsumexp
    from scipy.stats import Covariance, multivariate_normal

    normals = []
    for m in range(guard.n_components):
        if guard.kind == "diagonal":
            covariance = Covariance.from_diagonal(guard.whitener[m].astype(np.float64) ** -2)
        else:
            w = _whitener(guard, m).astype(np.float64)
            inverse = np.linalg.inv(w)
            covariance = Covariance.from_cholesky(np.linalg.cholesky(inverse @ inverse.T))
        normals.append(multivariate_normal(guard.means[m].astype(np.float64), covariance))
    weights = guard.log_weights.astype(np.float64)
    bounds = list(zip(guard.offsets[:-1], guard.offsets[1:], strict=True))
    single = all(end - start == 1 for start, end in bounds)

    def score(features: FloatArray) -> NDArray[np.floating]:
        parts = np.stack([np.atleast_1d(normal.logpdf(features)) for normal in normals], axis=1) + weights
        if single:
            return parts
        return np.stack([logsumexp(parts[:, start:end], axis=1) for start, end in bounds], axis=1)

    return score


def numpy(guard: Guard) -> Score:
    """float32, matrix products by BLAS; diagonal and the distances of shared in the expanded form."""
    constants = component_constants(guard).astype(np.float32)
    squares, linear, offset, origin, whitener = _expanded(guard)
    starts, counts = guard.offsets[:-1], np.diff(guard.offsets)
    single = bool((counts == 1).all())
    means = guard.means

    def components(features: FloatArray) -> FloatArray:
        if guard.kind == "diagonal":
            distances = (features * features) @ squares - features @ linear + offset
        elif guard.kind == "shared":
            white = (features - origin) @ whitener.T
            distances = (white * white).sum(axis=1, keepdims=True) - white @ linear + offset
        else:
            centred = features[None, :, :] - means[:, None, :]
            white = np.matmul(centred, whitener.transpose(0, 2, 1))
            distances = np.einsum("mnd,mnd->nm", white, white)
        return constants - np.float32(0.5) * distances

    def score(features: FloatArray) -> NDArray[np.floating]:
        parts = components(features)
        if single:
            return parts
        largest = np.maximum.reduceat(parts, starts, axis=1)
        sums = np.add.reduceat(np.exp(parts - np.repeat(largest, counts, axis=1)), starts, axis=1)
        return largest + np.log(sums)

    return score


def torch(guard: Guard) -> Score:
    """The same formulas as NumPy's in eager torch, float32."""
    return _torch(guard, compiled=False)


def torch_compile(guard: Guard) -> Score:
    """The same, through torch.compile."""
    return _torch(guard, compiled=True)


def skl2onnx(guard: Guard) -> Score:
    """scikit-learn's mixtures exported by skl2onnx, one ONNX Runtime session per class."""
    import onnxruntime
    from skl2onnx import to_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    example = np.zeros((1, guard.n_features), np.float32)
    sessions, names = [], []
    for row in range(guard.classes.size):
        mixture = _mixture(guard, row)
        model = to_onnx(mixture, example, options={id(mixture): {"score_samples": True}}).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        sessions.append((session, session.get_inputs()[0].name))
        names = [session.get_outputs()[-1].name]

    def score(features: FloatArray) -> NDArray[np.floating]:
        return np.stack([s.run(names, {name: features})[0].reshape(-1) for s, name in sessions], axis=1)

    return score


# Name, library, and what it is; in the order of the tables.
PEERS: dict[str, tuple[str, Callable[[Guard], Score]]] = {
    "numpy": ("numpy", numpy),
    "torch": ("torch", torch),
    "torch_compile": ("torch", torch_compile),
    "skl2onnx": ("skl2onnx", skl2onnx),
    "sklearn": ("sklearn", sklearn),
    "scipy": ("scipy", scipy),
}


def missing(library: str) -> bool:
    """True when a library is not installed."""
    return importlib.util.find_spec(library) is None


def _whitener(guard: Guard, component: int) -> FloatArray:
    """Lower triangle (D, D) of a component."""
    packed = guard.whitener if guard.kind == "shared" else guard.whitener[component]
    return unpack(packed, guard.n_features)


def _mixture(guard: Guard, row: int) -> Any:
    """scikit-learn's mixture with the parameters of one density row, as if fitted."""
    from sklearn.mixture import GaussianMixture

    rows = slice(int(guard.offsets[row]), int(guard.offsets[row + 1]))
    kinds = {"diagonal": "diag", "shared": "tied", "full": "full"}
    mixture = GaussianMixture(rows.stop - rows.start, covariance_type=kinds[guard.kind])
    weights = np.exp(guard.log_weights[rows].astype(np.float64))
    mixture.weights_ = weights / weights.sum()
    mixture.means_ = guard.means[rows].astype(np.float64)
    if guard.kind == "diagonal":
        factor = guard.whitener[rows].astype(np.float64)
        mixture.covariances_ = factor**-2
    elif guard.kind == "shared":
        factor = _whitener(guard, rows.start).T.astype(np.float64)
        mixture.covariances_ = np.linalg.inv(factor @ factor.T)
    else:
        factor = np.stack([_whitener(guard, m).T for m in range(rows.start, rows.stop)]).astype(np.float64)
        mixture.covariances_ = np.linalg.inv(factor @ factor.transpose(0, 2, 1))
    mixture.precisions_cholesky_ = factor
    mixture.precisions_ = factor**2 if guard.kind == "diagonal" else factor @ np.swapaxes(factor, -1, -2)
    mixture.n_features_in_ = guard.n_features
    mixture.converged_, mixture.n_iter_, mixture.lower_bound_ = True, 1, 0.0
    return mixture


def _expanded(guard: Guard) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """Arrays squares (D, M), linear (D, M), offset (M,), origin (D,) and whitener.

    |y - c|^2 = y^2 squares - y linear + offset, with y = whitener (z - origin) for the shared kind.
    """
    empty = np.empty(0, np.float32)
    if guard.kind == "full":
        return empty, empty, empty, empty, np.stack([_whitener(guard, m) for m in range(guard.n_components)])
    means = guard.means.astype(np.float64)
    if guard.kind == "diagonal":
        precision = guard.whitener.astype(np.float64) ** 2
        origin, whitener = empty, empty
    else:
        origin, whitener = means.mean(axis=0).astype(np.float32), _whitener(guard, 0)
        means = (means - origin) @ whitener.T.astype(np.float64)
        precision = np.ones_like(means)
    parts = precision.T, 2.0 * (means * precision).T, (means * means * precision).sum(axis=1)
    squares, linear, offset = (np.ascontiguousarray(part, dtype=np.float32) for part in parts)
    return squares, linear, offset, origin, whitener


def _torch(guard: Guard, *, compiled: bool) -> Score:
    import torch as library

    constants = library.from_numpy(component_constants(guard).astype(np.float32))
    squares, linear, offset, origin, whitener = (library.from_numpy(part) for part in _expanded(guard))
    means, kind = library.from_numpy(guard.means.copy()), guard.kind
    n_rows, n_each = guard.classes.size, int(np.diff(guard.offsets)[0])

    def compute(features: Any) -> Any:
        if kind == "diagonal":
            distances = (features * features) @ squares - features @ linear + offset
        elif kind == "shared":
            white = (features - origin) @ whitener.T
            distances = (white * white).sum(1, keepdim=True) - white @ linear + offset
        else:
            centred = features[None] - means[:, None]
            distances = library.bmm(centred, whitener.transpose(1, 2)).square().sum(2).T
        parts = constants - 0.5 * distances
        return parts if n_each == 1 else library.logsumexp(parts.reshape(-1, n_rows, n_each), 2)

    function = library.compile(compute, dynamic=False) if compiled else compute

    def score(features: FloatArray) -> NDArray[np.floating]:
        with library.inference_mode():
            result: NDArray[np.floating] = function(library.from_numpy(features)).numpy()
        return result

    return score
