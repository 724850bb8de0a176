from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CLASS_NAMES, tiny_bundle, tiny_guard, tiny_model, tiny_self_test, written
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from inflight_edge import BundleError, EngineError, OptionError, Preprocess, read_bundle
from inflight_edge.bundle import sign_bundle
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.engines.plans import Identity, write_plan
from inflight_edge.serving import Queue, export_guards, export_repository
from inflight_edge.serving.config import Word, to_pbtxt
from inflight_edge.serving.models import OnnxModel
from inflight_edge.signing import write_keys


def config(folder: Path) -> Any:
    """The model's configuration, read by the server's own protocol buffers: a misspelt field is an error."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return written(tmp_path / "bundle")


def plans(folder: Path, *capabilities: str) -> dict[str, Path]:
    made = {capability: folder / f"{capability}.plan" for capability in capabilities}
    for path in made.values():
        path.write_bytes(f"plan {path.name}".encode())
    return made


def test_ensemble_on_the_servers_onnx_backend(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    folders = export_repository(bundle, repository)
    assert [folder.name for folder in folders] == [
        "inflight_classifier",
        "inflight_preprocess",
        "inflight_scorer",
        "inflight",
    ]
    configs = {folder.name: config(folder) for folder in folders}
    assert {name: entry.name for name, entry in configs.items()} == {name: name for name in configs}
    classifier, ensemble = configs["inflight_classifier"], configs["inflight"]
    assert (classifier.platform, classifier.max_batch_size) == ("onnxruntime_onnx", 32)
    assert [tuple(entry.dims) for entry in classifier.output] == [(4,), (4,)]
    assert (repository / "inflight_classifier/1/model.onnx").read_bytes() == read_bundle(bundle).model
    steps = ensemble.ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["inflight_preprocess", "inflight_classifier", "inflight_scorer"]
    # Every step's inputs are made before it, and its maps name what its model has.
    known = {entry.name for entry in ensemble.input}
    for step in steps:
        model = configs[step.model_name]
        assert set(step.input_map) == {entry.name for entry in model.input}
        assert set(step.output_map) <= {entry.name for entry in model.output}
        assert set(step.input_map.values()) <= known
        known |= set(step.output_map.values())
    assert {entry.name for entry in ensemble.output} <= known
    assert json.loads(ensemble.parameters["class_names"].string_value) == list(CLASS_NAMES)


def test_every_model_but_the_ensemble_batches_and_rejects_overload(bundle: Path, tmp_path: Path) -> None:
    queue = Queue(max_batch=8, instances=2, delay_us=100, size=5, timeout_us=7000)
    for folder in export_repository(bundle, tmp_path / "repository", queue=queue):
        entry = config(folder)
        assert entry.max_batch_size == 8
        if entry.platform == "ensemble":
            continue
        policy = entry.dynamic_batching.default_queue_policy
        assert entry.dynamic_batching.max_queue_delay_microseconds == 100
        assert (policy.max_queue_size, policy.default_timeout_microseconds) == (5, 7000)
        assert policy.allow_timeout_override
        assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
        assert entry.version_policy.latest.num_versions == 1
        assert entry.instance_group[0].count == 2
        assert set(entry.model_warmup[0].inputs) == {tensor.name for tensor in entry.input}


def test_single_network_on_tensorrt_names_a_plan_for_each_gpu(bundle: Path, tmp_path: Path) -> None:
    made = plans(tmp_path, "8.7", "9.0")
    (folder,) = export_repository(bundle, tmp_path / "repository", form="single", runtime="tensorrt", plans=made)
    entry = config(folder)
    assert entry.platform == "tensorrt_plan"
    assert entry.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert dict(entry.cc_model_filenames) == {"8.7": "model.sm_87.plan", "9.0": "model.sm_90.plan"}
    for capability, name in entry.cc_model_filenames.items():
        assert (folder / "1" / name).read_bytes() == made[capability].read_bytes()
    assert [(tensor.name, tuple(tensor.dims)) for tensor in entry.output] == [
        ("decision", (1,)),
        ("predicted", (1,)),
        ("source", (1,)),
        ("margin", (1,)),
        ("log_likelihoods", (4,)),
    ]
    assert (folder / "network.onnx").stat().st_size > len(read_bundle(bundle).model)


def test_class_names_survive_the_text_format(tmp_path: Path) -> None:
    names = ('quote " and \\', "ünïcode ✓", "a/b {c}", "west")
    bundle = written(tmp_path / "bundle", class_names=names)
    for folder in export_repository(bundle, tmp_path / "repository"):
        assert json.loads(config(folder).parameters["class_names"].string_value) == list(names)


def test_text_format_of_every_kind_of_value() -> None:
    text = to_pbtxt(
        {"name": "a\nb", "max_batch_size": 3, "model_warmup": [{"name": "x", "batch_size": 1}], "input": []}
    )
    entry = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (entry.name, entry.max_batch_size, entry.model_warmup[0].name) == ("a\nb", 3, "x")
    assert to_pbtxt({"kind": Word("KIND_CPU"), "on": True}) == "kind: KIND_CPU\non: true\n"


def test_new_guards_become_the_next_version(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    export_repository(bundle, repository)
    guards = (tiny_guard(1, "full"),)
    other = written(tmp_path / "other", guards=guards, self_test=tiny_self_test(guards))
    folder = export_guards(other, repository)
    assert folder == repository / "inflight_scorer" / "2"
    assert [guard.target for guard in read_bundle(folder / "bundle").guards] == [1]
    assert (folder / "model.py").read_bytes() == (repository / "inflight_scorer/1/model.py").read_bytes()
    assert export_guards(bundle, repository).name == "3"
    assert sorted(path.name for path in (repository / "inflight_scorer").iterdir()) == ["1", "2", "3", "config.pbtxt"]


def test_guards_of_another_classifier_are_refused(bundle: Path, tmp_path: Path) -> None:
    export_repository(bundle, tmp_path / "repository")
    other = written(tmp_path / "other", model=tiny_model(batch=3))
    with pytest.raises(
        BundleError, match=r"serves the classifier [0-9a-f]{64}, the bundle's is [0-9a-f]{64}; export the"
    ):
        export_guards(other, tmp_path / "repository")
    with pytest.raises(BundleError, match="expected the scorer of an ensemble, got none"):
        export_guards(bundle, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"preprocess": Preprocess((1, 2, 2), scale=1 / 128, mean=(0.5,))}, "preprocess"),
        ({"class_names": tuple(reversed(CLASS_NAMES))}, "class_names"),
    ],
)
def test_guards_for_other_preprocessing_or_class_names_are_refused(
    change: dict[str, Any], part: str, bundle: Path, tmp_path: Path
) -> None:
    """The served models around the scorer stay as they are, and the network alone does not tell."""
    export_repository(bundle, tmp_path / "repository")
    other = written(tmp_path / "other", **change)
    assert read_bundle(other).model == read_bundle(bundle).model
    with pytest.raises(BundleError, match=f"serves another {part} than the bundle's .*; export the whole bundle"):
        export_guards(other, tmp_path / "repository")
    assert sorted(path.name for path in (tmp_path / "repository/inflight_scorer").iterdir()) == ["1", "config.pbtxt"]


def test_guards_for_the_same_names_of_any_letters_are_taken(tmp_path: Path) -> None:
    bundle = written(tmp_path / "bundle", class_names=('quote " and \\', "ünïcode ✓", "a/b {c}", "west"))
    export_repository(bundle, tmp_path / "repository")
    assert export_guards(bundle, tmp_path / "repository").name == "2"


@pytest.mark.parametrize("batch", [None, 2])
def test_network_for_the_python_backend_takes_any_number_of_frames(batch: int | None, tmp_path: Path) -> None:
    content = tiny_model(batch=batch)
    (tmp_path / "model.onnx").write_bytes(content)
    model, engine = OnnxModel(), OnnxRuntimeEngine(content)
    model.folder = tmp_path
    model.load()
    for n_frames in (1, 2, 3, 5):
        frames = np.arange(n_frames * 4, dtype=np.float32).reshape(n_frames, 1, 2, 2)
        answer = model.answer({engine.input_name: frames})
        for name, expected in zip(("logits", "features"), engine.run(frames), strict=True):
            np.testing.assert_array_equal(answer[name], expected)
    with pytest.raises(EngineError, match="onnxruntime failed on a batch"):
        model.answer({engine.input_name: np.zeros((1, 3, 2, 2), np.float32)})


def test_nothing_is_overwritten_and_nothing_half_written_stays(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    export_repository(bundle, repository)
    before = sorted(path for path in repository.rglob("*"))
    with pytest.raises(BundleError, match="exists already; remove it, or choose another --name"):
        export_repository(bundle, repository)
    with pytest.raises(OptionError, match=r"9\.0\.plan: expected a TensorRT plan, got no file"):
        export_repository(
            bundle, repository, name="b", form="single", runtime="tensorrt", plans={"9.0": tmp_path / "9.0.plan"}
        )
    assert sorted(path for path in repository.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "both"}, "form: expected one of ensemble, single, got 'both'"),
        ({"runtime": "tpu"}, "runtime: expected one of onnx, tensorrt, python, got 'tpu'"),
        ({"name": "../up"}, "name: expected letters"),
        ({"runtime": "tensorrt"}, "--plan CC=FILE: expected one file for each compute capability"),
        ({"plans": {"8.7": "x"}}, "--plan CC=FILE: expected one file"),
        ({"runtime": "tensorrt", "plans": {"sm_87": "x"}}, "compute capability such as 8.7, got 'sm_87'"),
    ],
)
def test_bad_options_are_refused(bundle: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        export_repository(bundle, tmp_path / "repository", **options)


@pytest.mark.parametrize("field", Queue.__slots__)
@pytest.mark.parametrize("value", [-1, 1.5, True, 2**31])
def test_bad_queue_is_refused(field: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{field}: expected an integer from [01] to 2147483647"):
        Queue(**{field: value})


def test_a_fixed_batch_is_served_by_the_python_backend_alone(tmp_path: Path) -> None:
    bundle = written(tmp_path / "bundle", model=tiny_model(batch=2))
    with pytest.raises(OptionError, match="expected a free batch size, got 2"):
        export_repository(bundle, tmp_path / "repository")
    export_repository(bundle, tmp_path / "repository", runtime="python")


def test_python_models_find_the_folders_they_are_given(bundle: Path, tmp_path: Path) -> None:
    folders = export_repository(bundle, tmp_path / "repository", runtime="python", python_path=("/some where/p'y",))
    codes = [(folder / "1/model.py") for folder in folders if (folder / "1/model.py").exists()]
    assert len(codes) == 3
    for code in codes:
        compile(code.read_text(), str(code), "exec")
        assert """["/some where/p'y"]""" in code.read_text() or '("/some where/p\'y",)' in code.read_text()


def test_a_bundle_that_the_owner_did_not_sign_is_not_exported(bundle: Path, tmp_path: Path) -> None:
    for name in ("private", "other"):
        write_keys(tmp_path / f"{name}.pem", tmp_path / f"{name}-public.pem")
    key = tmp_path / "private-public.pem"
    with pytest.raises(BundleError, match="sign"):
        export_repository(bundle, tmp_path / "repository", key=key)
    sign_bundle(bundle, tmp_path / "other.pem")
    with pytest.raises(BundleError, match="sign"):
        export_repository(bundle, tmp_path / "repository", key=key)
    assert not (tmp_path / "repository").exists()
    sign_bundle(bundle, tmp_path / "private.pem")
    export_repository(bundle, tmp_path / "repository", key=key)
    assert read_bundle(tmp_path / "repository/inflight_scorer/1/bundle", key=key).guards
    assert export_guards(bundle, tmp_path / "repository", key=key).name == "2"


def test_a_served_bundle_is_the_one_that_was_read(bundle: Path, tmp_path: Path) -> None:
    export_repository(bundle, tmp_path / "repository")
    served = tmp_path / "repository/inflight_scorer/1/bundle"
    for path in bundle.iterdir():
        assert (served / path.name).read_bytes() == path.read_bytes()
    assert np.array_equal(read_bundle(served).guards[0].means, tiny_bundle().guards[0].means)


def described(path: Path, model: bytes, **changes: Any) -> Path:
    """A plan as `compile` leaves it."""
    identity = Identity(sha256(model).hexdigest(), "fp32", "10.3.0", "Orin", "8.7")
    write_plan(path, b"plan", replace(identity, **changes), {"batch": 32}, {})
    return path


def test_an_ensemble_takes_only_plans_of_its_network_gpu_and_batch(bundle: Path, tmp_path: Path) -> None:
    model = read_bundle(bundle).model
    good = described(tmp_path / "good.plan", model)
    export_repository(bundle, tmp_path / "good", runtime="tensorrt", plans={"8.7": good})
    assert (tmp_path / "good/inflight_classifier/1/model.sm_87.plan").read_bytes() == b"plan"
    loose = tmp_path / "loose.plan"
    loose.write_bytes(bytes(64))
    wrong = [
        ({"8.7": described(tmp_path / "a.plan", b"another model")}, "made for onnx_sha256"),
        ({"8.7": described(tmp_path / "b.plan", model, precision="fp16")}, "made for precision fp16, expected fp32"),
        ({"9.0": good}, "made for compute_capability 8.7, expected 9.0"),
        ({"8.7": loose}, "expected a plan for TensorRT with its description, got none"),
    ]
    for plans, message in wrong:
        with pytest.raises(OptionError, match=message):
            export_repository(bundle, tmp_path / "bad", runtime="tensorrt", plans=plans)
    with pytest.raises(OptionError, match="made for batches of 32, expected 8"):
        export_repository(bundle, tmp_path / "bad", runtime="tensorrt", plans={"8.7": good}, queue=Queue(max_batch=8))
    assert not (tmp_path / "bad").exists()
