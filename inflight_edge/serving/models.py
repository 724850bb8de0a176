"""Models for Triton's Python backend: preprocessing, scorer, and ONNX Runtime where the server has no backend for it.

A repository's ``model.py`` imports one of these classes as ``TritonPythonModel``.  Only the server's Python processes
import this module; it must not need more than the device's side.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._contents import DECISIONS
from inflight_edge._layout import MANIFEST, names_of
from inflight_edge._optional import require
from inflight_edge.bundle import read_bundle
from inflight_edge.detector import Detector, NoEngine
from inflight_edge.engines._signature import by_chunks
from inflight_edge.engines.onnxruntime import OnnxSession
from inflight_edge.errors import BundleError, InflightError
from inflight_edge.preprocess import Preprocess
from inflight_edge.serving.graph import OUTPUTS
from inflight_edge.verdict import Verdict

__all__ = ["OnnxModel", "PreprocessModel", "ScorerModel", "records"]

Arrays = dict[str, NDArray[Any]]


class _Model:
    """One request's arrays in, one answer's arrays out; an InflightError is that request's error alone."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called by the server once; an exception here makes the model fail to load, with its text."""
        self._utils = require("triton_python_backend_utils", "this class runs inside Triton's Python backend only")
        config = json.loads(args["model_config"])
        self.parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self.folder = Path(args["model_repository"], args["model_version"])
        self.inputs = [entry["name"] for entry in config["input"]]
        self.load()

    def load(self) -> None:
        """Read what the model needs."""
        raise NotImplementedError

    def answer(self, arrays: Arrays) -> Arrays:
        """Output arrays by name.  Raises InflightError."""
        raise NotImplementedError

    def execute(self, requests: list[Any]) -> list[Any]:
        """The server's call: one response a request, in order."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        utils = self._utils
        try:
            tensors = {name: utils.get_input_tensor_by_name(request, name) for name in self.inputs}
            arrays = {name: self._array(name, tensor) for name, tensor in tensors.items()}
            outputs = [utils.Tensor(name, np.ascontiguousarray(array)) for name, array in self.answer(arrays).items()]
            return utils.InferenceResponse(output_tensors=outputs)
        except InflightError as error:
            return utils.InferenceResponse(output_tensors=[], error=utils.TritonError(str(error)))

    @staticmethod
    def _array(name: str, tensor: Any) -> NDArray[Any]:
        array: NDArray[Any] = tensor.as_numpy()
        # Servers before 24.08 hand empty arrays to NumPy 2, without an error.
        if array.nbytes == 0:
            raise InflightError(
                f"{name}: got no bytes; this server's Python backend needs numpy < 2, or the request is empty"
            )
        return array


class PreprocessModel(_Model):
    """Frames (N, H, W, channels) uint8 -> the network's input (N, channels, height, width) float32."""

    def load(self) -> None:
        """Constants from the configuration."""
        constants = json.loads(self.parameters["preprocess"])
        self._preprocess = Preprocess(
            tuple(constants["input_shape"]), constants["scale"], tuple(constants["mean"]), tuple(constants["std"])
        )

    def answer(self, arrays: Arrays) -> Arrays:
        """See the class."""
        return {"input": np.stack([self._preprocess(frame) for frame in arrays["frame"]])}


class OnnxModel(_Model):
    """An exported network by ONNX Runtime on the CPU, for servers without a backend for it.

    Any number of frames: a fixed batch size is met by chunks, the last padded.
    """

    def load(self) -> None:
        """The model beside this version's model.py."""
        self._session = OnnxSession((self.folder / "model.onnx").read_bytes())
        self._outputs = [output.name for output in self._session.outputs]
        size = self._session.inputs[0].shape[0]
        self._batch_size = size if isinstance(size, int) else None

    def answer(self, arrays: Arrays) -> Arrays:
        """Every output of the model."""
        ((name, batch),) = arrays.items()

        def call(part: NDArray[Any]) -> list[NDArray[Any]]:
            return self._session.run(self._outputs, {name: part})

        results = call(batch) if self._batch_size is None else by_chunks(batch, self._batch_size, call)
        return dict(zip(self._outputs, results, strict=True))


class ScorerModel(_Model):
    """Logits (N, C) and features (N, D) float32 -> verdicts, by the bundle in this version's folder.

    Loading verifies the bundle's self-test with this scorer, so that a guard that would judge otherwise here never
    takes over.  Every answer names the guards that made it, by the SHA-256 of the bundle's detector.safetensors.
    """

    def load(self) -> None:
        """Read and verify the bundle."""
        precision = self.parameters["precision"]
        bundle = read_bundle(self.folder / "bundle").at(precision)
        self._detector = Detector(bundle, engine=NoEngine())
        manifest = json.loads((self.folder / "bundle" / MANIFEST).read_bytes())
        self._guard = manifest["files"][names_of(precision)[0]]["sha256"]
        test = bundle.self_test
        for i, (decision, source) in enumerate(zip(test.decisions, test.sources, strict=True)):
            verdict = self._detector.score(test.features[i], test.logits[i])
            if (verdict.decision.value, -1 if verdict.source is None else verdict.source) != (decision, source):
                raise BundleError(
                    f"self-test frame {i}: expected {decision}, got {verdict.decision.value}; calibrate again"
                )

    def answer(self, arrays: Arrays) -> Arrays:
        """See the class."""
        logits, features = arrays["logits"], arrays["features"]
        verdicts = [self._detector.score(*pair) for pair in zip(features, logits, strict=True)]
        n = len(verdicts)
        return records(verdicts, len(self._detector.class_names)) | {
            "reason": np.array([[v.reason.encode()] for v in verdicts], np.object_).reshape(n, 1),
            "guard": np.full((n, 1), self._guard.encode(), np.object_),
        }


def records(verdicts: list[Verdict], n_classes: int) -> Arrays:
    """Verdicts as the arrays of graph.OUTPUTS."""
    integers: dict[str, Callable[[Verdict], int | None]] = {
        "decision": lambda v: DECISIONS.index(v.decision),
        "predicted": lambda v: v.predicted,
        "source": lambda v: v.source,
    }
    arrays: Arrays = {}
    for name, value in integers.items():
        numbers = [value(verdict) for verdict in verdicts]
        arrays[name] = np.array([[-1 if number is None else number] for number in numbers], np.int32).reshape(-1, 1)
    arrays["margin"] = np.array([[v.margin] for v in verdicts], np.float32).reshape(-1, 1)
    rows = np.full((len(verdicts), n_classes), np.nan, np.float32)
    for row, verdict in zip(rows, verdicts, strict=True):
        row[verdict.classes] = verdict.log_likelihoods
    arrays["log_likelihoods"] = rows
    assert list(arrays) == [name for name, _, _ in OUTPUTS]
    return arrays
