"""A bundle as a model repository for NVIDIA Triton Inference Server."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from inflight_edge.bundle import Bundle, read_bundle
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.engines.plans import read_described
from inflight_edge.errors import BundleError, InflightError, OptionError
from inflight_edge.serving.config import parameters, to_pbtxt
from inflight_edge.serving.model_files import Model, Queue, identity_of, models_of

__all__ = ["Form", "Queue", "Runtime", "export_guards", "export_repository"]

Form = Literal["ensemble", "single"]
Runtime = Literal["onnx", "tensorrt", "python"]


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
    if form == "ensemble":
        _check_plans(plans or {}, sha256(bundle.model).hexdigest(), precision, queue.max_batch)
    models = models_of(
        bundle,
        Path(bundle_path),
        engine.input_name,
        form=form,
        runtime=runtime,
        name=name,
        queue=queue,
        plans=plans or {},
        python_path=python_path,
    )
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
    identity = identity_of(bundle.at(precision))
    digest = identity["classifier"]
    if served != digest:
        got = served or "none"
        raise BundleError(
            f"{folder}: serves the classifier {got}, the bundle's is {digest}; export the whole bundle, or calibrate with the "
            "--feature-layer of the served one"
        )
    # The served preprocessing and class names stay: guards that were made with others would judge wrongly, or be misread.
    for part in ("preprocess", "class_names"):
        if to_pbtxt({"parameters": parameters({part: identity[part]})}).strip() not in text:
            raise BundleError(
                f"{folder}: serves another {part} than the bundle's {identity[part]}; export the whole bundle"
            )
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


def _write(
    repository: Path,
    models: Mapping[str, Model],
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
