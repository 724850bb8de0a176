"""A bundle as a model repository for NVIDIA Triton Inference Server."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from inflight_edge.bundle import Bundle, read_bundle
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.engines.plans import read_described
from inflight_edge.errors import BundleError, InflightError, OptionError
from inflight_edge.serving.config import Word, parameters, tensor, to_pbtxt
from inflight_edge.serving.graph import OUTPUTS, with_verdict

__all__ = ["Form", "Queue", "Runtime", "export_guards", "export_repository"]

Form = Literal["ensemble", "single"]
Runtime = Literal["onnx", "tensorrt", "python"]
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


def export_repository(
    bundle_path: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    form: Form = "ensemble",
    runtime: Runtime = "onnx",
    name: str = "inflight",
    queue: Queue | None = None,
    plans: Mapping[str, str | os.PathLike[str]] | None = None,
    python_path: tuple[str, ...] = (),
    key: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
) -> list[Path]:
    """Write the models of a bundle into a repository folder; returns their folders.

    form         ``single``: one network from the prepared input to the verdict.  ``ensemble``: preprocessing, classifier
                 and scorer, so that frames of any size are taken and the guards can be exchanged alone.
    runtime      what runs the network: the server's ONNX Runtime or TensorRT backend, or its Python backend with
                 ONNX Runtime inside, for servers that have no other.
    plans        for ``tensorrt``: file of each compute capability such as ``8.7``.  Of an ensemble they are those of
                 ``compile``, for this network, precision and batch.  Of the single network they come from trtexec, TF32
                 off; the runtime onnx writes that network.
    precision    of the bundle's precisions.
    python_path  folders in front of the Python models' module path: the server's stub reads no PYTHONPATH.
    key          file of the public key that must have signed the bundle; the server itself trusts the repository.

    Raises BundleError, OptionError, ModelError, and BundleError when a model's folder exists already.
    """
    queue = queue or Queue()
    _check(form, runtime, name, plans)
    whole = read_bundle(bundle_path, key=key)
    bundle = whole.at(precision)
    engine = OnnxRuntimeEngine(bundle.model)
    if engine.fixed_batch is not None and (form == "single" or runtime != "python"):
        raise OptionError(
            f"model.onnx: expected a free batch size, got {engine.fixed_batch}: the server cannot join frames; export the "
            "classifier with a dynamic batch, or use the form ensemble with the runtime python"
        )
    constants = bundle.preprocess
    identity = {
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
        "precision": precision,
    }
    network = bundle.model if form == "ensemble" else with_verdict(bundle)
    outputs = _classifier_outputs(bundle) if form == "ensemble" else _verdict_outputs(bundle)
    network_name = f"{name}_classifier" if form == "ensemble" else name
    input_name = engine.input_name
    models: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    if form == "ensemble":
        _check_plans(plans or {}, identity["classifier"], precision, queue.max_batch)
    files, filenames = _network_files(network, runtime, plans)
    models[network_name] = (
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
    if form == "ensemble":
        models |= _around(bundle, Path(bundle_path), name, queue, identity, input_name, python_path)
    return _write(Path(repository), models, whole, key)


def export_guards(
    bundle_path: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    name: str = "inflight",
    key: str | os.PathLike[str] | None = None,
) -> Path:
    """Add a bundle's guards to an ensemble as a new version of its scorer; returns that version's folder.

    The classifier must be the one that the repository serves.  The server takes the version when it is told to load the
    scorer again, or by itself where it polls.  Raises BundleError for another classifier or no such repository.
    """
    folder = Path(repository) / f"{name}_scorer"
    bundle = read_bundle(bundle_path, key=key)
    try:
        text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(f"{folder}: expected the scorer of an ensemble, got none ({error.strerror})") from error
    served, precision = (_parameter(text, name) for name in ("classifier", "precision"))
    digest = sha256(bundle.at(precision).model).hexdigest()
    if served != digest:
        got = served or "none"
        raise BundleError(f"{folder}: serves the classifier {got}, the bundle's is {digest}; export the whole bundle")
    version = 1 + max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
    newest = folder / str(version - 1)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
        made = Path(temporary, str(version))
        made.mkdir()
        shutil.copyfile(newest / "model.py", made / "model.py")
        _copy_bundle(Path(bundle_path), made / "bundle", bundle, key)
        made.rename(folder / str(version))
    return folder / str(version)


def _check(form: str, runtime: str, name: str, plans: Mapping[str, Any] | None) -> None:
    for what, value, known in (("form", form, get_args(Form)), ("runtime", runtime, get_args(Runtime))):
        if value not in known:
            raise OptionError(f"{what}: expected one of {', '.join(known)}, got {value!r}")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", name):
        raise OptionError(f"name: expected letters, digits, _ and -, beginning with a letter, got {name!r}")
    if (runtime == "tensorrt") != bool(plans):
        raise OptionError(
            "--plan CC=FILE: expected one file for each compute capability with the runtime tensorrt, and only there"
        )
    for capability in plans or {}:
        if not re.fullmatch(r"\d{1,2}\.\d", capability):
            raise OptionError(f"plan: expected a compute capability such as 8.7, got {capability!r}")


def _classifier_outputs(bundle: Bundle) -> list[dict[str, Any]]:
    return [tensor("logits", "FP32", [len(bundle.class_names)]), tensor("features", "FP32", [bundle.n_features])]


def _verdict_outputs(bundle: Bundle) -> list[dict[str, Any]]:
    return [tensor(name, kind, [width or len(bundle.class_names)]) for name, kind, width in OUTPUTS]


def _network_files(
    network: bytes, runtime: Runtime, plans: Mapping[str, str | os.PathLike[str]] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Files of the network's version folder, and the configuration's entries that name them."""
    if runtime != "tensorrt":
        return {"1/model.onnx": network}, {}
    names = {capability: f"model.sm_{capability.replace('.', '')}.plan" for capability in plans or {}}
    files = {f"1/{names[capability]}": Path(path) for capability, path in (plans or {}).items()}
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
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
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


def _write(
    repository: Path,
    models: Mapping[str, tuple[dict[str, Any], dict[str, Any]]],
    bundle: Bundle,
    key: str | os.PathLike[str] | None,
) -> list[Path]:
    """Every model in one step each, the ensemble last; nothing is replaced."""
    for name in models:
        if (repository / name).exists():
            raise BundleError(f"{repository / name}: exists already; remove it, or choose another --name or repository")
    repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=repository, prefix=".new-") as temporary:
        for name, (config, files) in models.items():
            folder = Path(temporary, name)
            (folder / "1").mkdir(parents=True)
            (folder / "config.pbtxt").write_text(to_pbtxt(config), encoding="utf-8")
            for file, content in files.items():
                if isinstance(content, bytes):
                    (folder / file).write_bytes(content)
                elif file.endswith("/bundle"):
                    _copy_bundle(content, folder / file, bundle, key)
                else:
                    _copy_plan(content, folder / file)
        for name in models:
            Path(temporary, name).rename(repository / name)
    return [repository / name for name in models]


def _parameter(text: str, name: str) -> str:
    """A parameter of a configuration's text, "" without it."""
    found = re.search(rf'key: "{name}"\s+value \{{\s+string_value: "([0-9a-z]+)"', text)
    return "" if found is None else found[1]


def _check_plans(plans: Mapping[str, str | os.PathLike[str]], classifier: str, precision: str, max_batch: int) -> None:
    """Refuse a plan of another network, precision, GPU or batch: it would answer, and be judged by the wrong guards."""
    for capability, path in plans.items():
        remedy = f"run `inflight-edge compile BUNDLE --precision {precision} --batch {max_batch}` on that GPU"
        try:
            _, identity, options = read_described(Path(path), remedy)
        except InflightError as error:
            raise OptionError(f"--plan: {error}") from error
        wanted = {"onnx_sha256": classifier, "precision": precision, "compute_capability": capability}
        for name, value in wanted.items():
            if identity[name] != value:
                raise OptionError(f"--plan: {path}: made for {name} {identity[name]}, expected {value}; {remedy}")
        if options.get("batch") != max_batch:
            raise OptionError(
                f"--plan: {path}: made for batches of {options.get('batch')}, expected {max_batch}; {remedy}, or give "
                "--max-batch"
            )


def _copy_bundle(source: Path, target: Path, expected: Bundle, key: str | os.PathLike[str] | None) -> None:
    """Copy, then read the copy: what is served is what was verified, and nothing that took its place meanwhile."""
    shutil.copytree(source, target)
    copied = read_bundle(target, key=key)
    for name in expected.precisions:
        if copied.precisions != expected.precisions or copied.at(name).model != expected.at(name).model:
            raise BundleError(f"{source}: another bundle took its place while it was copied; export it again")


def _copy_plan(source: Path, target: Path) -> None:
    if not source.is_file() or not source.stat().st_size:
        raise OptionError(
            f"{source}: expected a TensorRT plan, got no file or an empty one; run `inflight-edge compile`"
        )
    shutil.copyfile(source, target)
