"""Configuration and files of each model of a repository."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from inflight_edge.bundle import Bundle
from inflight_edge.errors import OptionError
from inflight_edge.serving.config import Word, parameters, tensor
from inflight_edge.serving.graph import OUTPUTS, with_verdict

__all__ = ["Model", "Queue", "identity_of", "models_of"]

# The configuration, and by the file's name in the model's folder its bytes, or the path of what is copied there.
Model = tuple[dict[str, Any], dict[str, Any]]
_PLATFORM = {
    "onnx": {"platform": "onnxruntime_onnx"},
    "tensorrt": {"platform": "tensorrt_plan"},
    "python": {"backend": "python"},
}
_MODEL_PY = '''"""Made by inflight-edge export-triton."""

import sys

for folder in {folders!r}:
    if folder not in sys.path:
        sys.path.insert(0, folder)

from inflight_edge.serving.models import {name} as TritonPythonModel
'''


@dataclass(frozen=True, slots=True)
class Queue:
    """How requests wait.

    max_batch  frames the server joins at most.          instances  copies of each model that run at a time.
    delay_us   how long a frame waits for others.        size       requests that wait at most; more are rejected.
    timeout_us how long a request waits at most; a later one is rejected.
    """

    max_batch: int = 32
    instances: int = 1
    delay_us: int = 500
    size: int = 256
    timeout_us: int = 1_000_000

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value, least = getattr(self, name), 0 if name == "delay_us" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise OptionError(f"{name}: expected an integer from {least} to {2**31 - 1}, got {value!r}")


def identity_of(bundle: Bundle) -> dict[str, str]:
    """What every model of a repository says of the bundle (of one precision) that it was made from, as its parameters."""
    constants = bundle.preprocess
    return {
        "class_names": json.dumps(list(bundle.class_names)),
        "preprocess": json.dumps(
            {
                "input_shape": constants.input_shape,
                "scale": constants.scale,
                "mean": constants.mean,
                "std": constants.std,
            }
        ),
        "classifier": sha256(bundle.model).hexdigest(),
        "precision": bundle.precision,
    }


def models_of(
    bundle: Bundle,
    bundle_path: Path,
    input_name: str,
    *,
    form: str,
    runtime: str,
    name: str,
    queue: Queue,
    plans: Mapping[str, str | os.PathLike[str]],
    python_path: tuple[str, ...],
) -> dict[str, Model]:
    """The models by name, the ensemble last; options as of export_repository.

    bundle  of one precision.    input_name  of its ONNX file.
    """
    constants, identity = bundle.preprocess, identity_of(bundle)
    network = bundle.model if form == "ensemble" else with_verdict(bundle)
    outputs = _classifier_outputs(bundle) if form == "ensemble" else _verdict_outputs(bundle)
    network_name = f"{name}_classifier" if form == "ensemble" else name
    files, filenames = _network_files(network, runtime, plans)
    model = (
        _batched(network_name, queue)
        | _PLATFORM[runtime]
        | filenames
        | {"input": [tensor(input_name, "FP32", constants.input_shape)], "output": outputs}
        | {
            "instance_group": [
                {"kind": Word("KIND_GPU" if runtime == "tensorrt" else "KIND_CPU"), "count": queue.instances}
            ]
        }
        | {"model_warmup": [_warm_up({input_name: ("FP32", constants.input_shape)})]}
        | {"parameters": parameters(identity)},
        files | (_model_py("OnnxModel", python_path) if runtime == "python" else {}),
    )
    if form == "single":
        return {network_name: model}
    return {network_name: model} | _around(bundle, bundle_path, name, queue, identity, input_name, python_path)


def _classifier_outputs(bundle: Bundle) -> list[dict[str, Any]]:
    return [tensor("logits", "FP32", [len(bundle.class_names)]), tensor("features", "FP32", [bundle.n_features])]


def _verdict_outputs(bundle: Bundle) -> list[dict[str, Any]]:
    return [tensor(name, kind, [width or len(bundle.class_names)]) for name, kind, width in OUTPUTS]


def _network_files(
    network: bytes, runtime: str, plans: Mapping[str, str | os.PathLike[str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Files of the network's version folder, and the configuration's entries that name them."""
    if runtime != "tensorrt":
        return {"1/model.onnx": network}, {}
    names = {capability: f"model.sm_{capability.replace('.', '')}.plan" for capability in plans}
    files = {f"1/{names[capability]}": Path(path) for capability, path in plans.items()}
    entries = [{"key": capability, "value": file} for capability, file in names.items()]
    # The ONNX file lies beside, so that anybody can compile the plan of one more GPU.
    return {**files, "network.onnx": network}, {"cc_model_filenames": entries}


def _around(
    bundle: Bundle,
    bundle_path: Path,
    name: str,
    queue: Queue,
    identity: dict[str, str],
    input_name: str,
    python_path: tuple[str, ...],
) -> dict[str, Model]:
    """Preprocessing, scorer and the ensemble of the three."""
    shape = bundle.preprocess.input_shape
    frame = tensor("frame", "UINT8", [-1, -1, -1])
    prepared = tensor("input", "FP32", shape)
    between, answers = _classifier_outputs(bundle), _verdict_outputs(bundle)
    answers += [tensor("reason", "STRING", [1]), tensor("guard", "STRING", [1])]
    python = {"backend": "python", "instance_group": [{"kind": Word("KIND_CPU"), "count": queue.instances}]}
    step = {
        f"{name}_preprocess": ({"frame": "frame"}, {"input": "input"}),
        f"{name}_classifier": ({input_name: "input"}, {"logits": "logits", "features": "features"}),
        f"{name}_scorer": (
            {"logits": "logits", "features": "features"},
            {answer["name"]: answer["name"] for answer in answers},
        ),
    }
    ensemble = {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": queue.max_batch,
        "input": [frame],
        "output": answers,
        "ensemble_scheduling": {
            "step": [
                {"model_name": model, "model_version": -1, "input_map": _map(ins), "output_map": _map(outs)}
                for model, (ins, outs) in step.items()
            ]
        },
        "parameters": parameters(identity),
    }
    warm = {key["name"]: ("FP32", key["dims"]) for key in between}
    return {
        f"{name}_preprocess": (
            _batched(f"{name}_preprocess", queue)
            | python
            | {"input": [frame], "output": [prepared], "parameters": parameters(identity)}
            | {"model_warmup": [_warm_up({"frame": ("UINT8", [shape[1], shape[2], shape[0]])})]},
            _model_py("PreprocessModel", python_path),
        ),
        f"{name}_scorer": (
            _batched(f"{name}_scorer", queue)
            | python
            | {"input": between, "output": answers, "parameters": parameters(identity)}
            | {"model_warmup": [_warm_up(warm)]},
            _model_py("ScorerModel", python_path) | {"1/bundle": bundle_path},
        ),
        name: (ensemble, {}),
    }


def _map(names: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in names.items()]


def _batched(name: str, queue: Queue) -> dict[str, Any]:
    """What every model but the ensemble has: batches, a bounded queue, the newest version alone."""
    return {
        "name": name,
        "max_batch_size": queue.max_batch,
        "version_policy": {"latest": {"num_versions": 1}},
        "dynamic_batching": {
            "max_queue_delay_microseconds": queue.delay_us,
            "default_queue_policy": {
                "timeout_action": Word("REJECT"),
                "default_timeout_microseconds": queue.timeout_us,
                "allow_timeout_override": True,  # by a shorter one of the request
                "max_queue_size": queue.size,
            },
        },
    }


def _warm_up(inputs: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    entries = [
        {"key": name, "value": {"data_type": Word(f"TYPE_{kind}"), "dims": list(dims), "zero_data": True}}
        for name, (kind, dims) in inputs.items()
    ]
    return {"name": "zeros", "batch_size": 1, "inputs": entries}


def _model_py(name: str, python_path: tuple[str, ...]) -> dict[str, bytes]:
    return {"1/model.py": _MODEL_PY.format(folders=list(python_path), name=name).encode()}
