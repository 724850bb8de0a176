"""float16 and int8: only the backbone changes, nothing leaves its range unseen, and the verdicts stay."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import poisoned
import pytest
import torch
from bundles import tiny_model
from networks_for_tests import LeNetBN, Residual, Squeeze, ViT, export, shaken
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn, zeros

from inflight_edge import Decision, Detector, read_bundle, write_bundle
from inflight_edge.calibration.calibrate import calibrate
from inflight_edge.calibration.export import export_onnx
from inflight_edge.calibration.model import classifier_from_program
from inflight_edge.calibration.precision import backbone, to_fp16, to_int8
from inflight_edge.cli import main
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.errors import ModelError, OptionError
from inflight_edge.verify import verify


@functools.cache
def model() -> bytes:
    return export_onnx(poisoned.classifier())


@functools.cache
def inputs() -> np.ndarray[Any, np.dtype[np.float32]]:
    return poisoned.PREPROCESS.normalise(poisoned.poisoned().defence.pixels(poisoned.PREPROCESS))


def types(data: bytes) -> dict[str, int]:
    """Element type of every value."""
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(data)).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def residual() -> bytes:
    program = export(shaken(Residual()), zeros(2, 2, 8, 8), free={0: "batch"})
    return export_onnx(classifier_from_program(program, image_shape=(2, 8, 8), feature_layer="penultimate"))


def test_backbone_ends_before_the_layers_of_the_features() -> None:
    chosen = backbone(onnx.load_from_string(model()))
    assert [node.op_type for node in chosen if node.op_type in ("Conv", "Gemm")] == ["Conv", "Conv"]
    assert "ReduceMean" not in {node.op_type for node in backbone(onnx.load_from_string(residual()))}
    assert [node.op_type for node in backbone(onnx.load_from_string(residual()))].count("Conv") == 2


def test_layers_after_a_map_that_gives_the_features_are_converted_too() -> None:
    program = export(shaken(LeNetBN()), zeros(2, 2, 16, 16), free={0: "batch"})
    data = export_onnx(classifier_from_program(program, image_shape=(2, 16, 16), feature_layer="body.1"))
    nodes = backbone(onnx.load_from_string(data))
    assert [node.op_type for node in nodes if node.op_type in ("Conv", "Gemm")] == ["Conv", "Conv", "Gemm", "Gemm"]
    assert "ReduceMean" not in {node.op_type for node in nodes}
    images = np.random.default_rng(0).random((5, 2, 16, 16), np.float32)
    engine = OnnxRuntimeEngine(data)
    for convert in (to_fp16, to_int8):
        for got, expected in zip(OnnxRuntimeEngine(convert(data, images)).run(images), engine.run(images), strict=True):
            assert 0 < np.abs(got - expected).max() < 0.1 * (1 + np.abs(expected).max())


@pytest.mark.parametrize("layer", ["penultimate", "patches"])
def test_attention_is_converted(layer: str) -> None:
    program = export(shaken(ViT()), zeros(2, 2, 16, 16), free={0: "batch"})
    data = export_onnx(classifier_from_program(program, image_shape=(2, 16, 16), feature_layer=layer))
    images = np.random.default_rng(0).random((5, 2, 16, 16), np.float32)
    engine = OnnxRuntimeEngine(data)
    for convert in (to_fp16, to_int8):
        for got, expected in zip(OnnxRuntimeEngine(convert(data, images)).run(images), engine.run(images), strict=True):
            assert np.abs(got - expected).max() < 0.2 * (1 + np.abs(expected).max())


class Heads(nn.Module):
    """Logits of two layers on the image's average, together over their length."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        pooled = torch.relu(self.body(images)).mean((2, 3))
        summed = self.first(pooled) + self.second(pooled)
        return summed / summed.norm(dim=1, keepdim=True)


def test_what_makes_the_logits_stays_float32() -> None:
    cases: list[tuple[nn.Module, str, list[str]]] = [
        (Heads(), "body.0", ["Conv", "Conv"]),
        (Squeeze(), "body.0", ["Conv", "Conv"]),
        (Squeeze(), "penultimate", ["Conv", "Conv"]),
    ]
    for network, layer, expected in cases:
        program = export(shaken(network), zeros(2, 2, 16, 16), free={0: "batch"})
        data = export_onnx(classifier_from_program(program, image_shape=(2, 16, 16), feature_layer=layer))
        nodes = [node.op_type for node in backbone(onnx.load_from_string(data))]
        assert [name for name in nodes if name in ("Conv", "Gemm", "MatMul", "ReduceMean")] == expected


def test_half_precision_is_in_the_backbone_and_nowhere_else() -> None:
    for data in (model(), residual()):
        shape = [d.dim_value for d in onnx.load_from_string(data).graph.input[0].type.tensor_type.shape.dim][1:]
        images = np.random.default_rng(0).random((5, *shape), np.float32)
        half = to_fp16(data, images)
        graph, found = onnx.load_from_string(half).graph, types(half)
        for node in graph.node:
            first = found[node.input[0]]
            if node.op_type == "Conv":
                assert {found[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}
            elif node.op_type in ("Gemm", "ReduceMean"):
                assert first == TensorProto.FLOAT
        assert {found[value.name] for value in (*graph.input, *graph.output)} == {TensorProto.FLOAT}
        for got, expected in zip(OnnxRuntimeEngine(half).run(images), OnnxRuntimeEngine(data).run(images), strict=True):
            assert 0 < np.abs(got - expected).max() < 2e-3 * (1 + np.abs(expected).max())


def test_a_fixed_batch_stays_fixed() -> None:
    proto = onnx.load_from_string(model())
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    for data in (to_fp16(proto.SerializeToString(), inputs()[:7]), to_int8(proto.SerializeToString(), inputs()[:7])):
        assert onnx.load_from_string(data).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


def test_a_last_batch_that_is_too_small_is_filled_and_not_replaced() -> None:
    """The last images may be the only ones of their class, and the only ones beyond float16's range."""
    proto = onnx.load_from_string(model())
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    images = inputs()[:7]
    images[6] *= 1e5
    with pytest.raises(ModelError, match=r"model: activations up to .* leave float16's range"):
        to_fp16(proto.SerializeToString(), images)


def test_activations_beyond_half_precision_are_refused() -> None:
    proto = onnx.load_from_string(model())
    first = next(t for t in proto.graph.initializer if len(t.dims) == 4)
    first.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(first) * np.float32(1e5), first.name))
    with pytest.raises(ModelError, match=r"model: activations up to .* leave float16's range; leave fp16 out of"):
        to_fp16(proto.SerializeToString(), inputs())


def test_int8_is_symmetric_per_channel_and_explicit() -> None:
    data = to_int8(model(), inputs())
    graph = onnx.load_from_string(data).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert [node.op_type for node in layers if made_by.get(node.input[0], node).op_type == "DequantizeLinear"] == [
        "Conv"
    ] * 2
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert tensors[node.input[2]].dtype == np.int8
            assert not tensors[node.input[2]].any()
    for node in layers[:2]:
        scale = tensors[made_by[node.input[1]].input[1]]
        assert scale.shape == (tensors[made_by[made_by[node.input[1]].input[0]].input[0]].shape[0],)
        assert tensors[node.input[2]].dtype == np.float32  # the bias


def test_models_without_a_backbone_or_with_control_flow_are_refused() -> None:
    with pytest.raises(
        ModelError, match="expected layers with weights before those of the features, got none; keep fp32"
    ):
        to_fp16(tiny_model(), np.ones((1, 1, 2, 2), np.float32))
    proto = onnx.load_from_string(model())
    branch = helper.make_graph([], "nothing", [], [])
    proto.graph.node.append(helper.make_node("If", ["input"], ["x"], then_branch=branch, else_branch=branch))
    with pytest.raises(ModelError, match="expected a graph without control flow, got If; keep fp32"):
        backbone(proto)


def test_verdicts_of_each_precision_are_those_of_fp32() -> None:
    """Frames predicted as the target, half of them triggered: the guards are fitted to each precision's features."""
    clean, triggered = poisoned.poisoned().test, poisoned.poisoned().triggered
    frames = [list(np.asarray(part.images)) for part in (clean, triggered)]
    expected = [Detector(poisoned.bundle_of_precisions()).run(part) for part in frames]
    chosen = [[i for i, v in enumerate(part) if v.predicted == poisoned.TARGET] for part in expected]
    count = min(map(len, chosen))
    assert count > 40
    for precision, least in (("fp16", 0.995), ("int8", 0.98)):
        got = [Detector(poisoned.bundle_of_precisions().at(precision)).run(part) for part in frames]
        same = [got[k][i].decision is expected[k][i].decision for k in (0, 1) for i in chosen[k][:count]]
        assert np.mean(same) >= least
        assert np.mean([a.predicted == b.predicted for a, b in zip(got[0], expected[0], strict=True)]) >= least
        assert any(got[1][i].decision is Decision.TRIGGER for i in chosen[1])


def test_half_arithmetic_done_to_the_letter_reaches_the_same_verdicts() -> None:
    """ONNX Runtime may keep float32 between layers on a CPU; NumPy rounds every value, as a GPU does."""
    half = poisoned.bundle_of_precisions().at("fp16")
    images = [*np.asarray(poisoned.poisoned().test.images)[:60], *np.asarray(poisoned.poisoned().triggered.images)[:60]]
    batch = np.stack([half.preprocess(image) for image in images])
    logits, features = ReferenceEvaluator(onnx.load_from_string(half.model)).run(
        ["logits", "features"], {"input": batch}
    )
    expected = OnnxRuntimeEngine(half.model).run(batch)[1]
    assert 0 < np.abs(features - expected).max() < 0.03 * (1 + np.abs(expected).max())
    detector = Detector(half)
    got = [detector.score(*pair).decision for pair in zip(features, logits, strict=True)]
    assert np.mean([a is b.decision for a, b in zip(got, detector.run(images), strict=True)]) >= 0.99


def test_bundle_holds_what_each_precision_needs(tmp_path: Path) -> None:
    write_bundle(poisoned.bundle_of_precisions(), tmp_path / "bundle")
    back = read_bundle(tmp_path / "bundle")
    assert back.precisions == ("fp32", "fp16", "int8")
    assert back.metrics["precisions"].keys() == {"fp16", "int8"}
    assert back.metrics["precisions"]["int8"]["top1_agreement"] > 0.9
    assert len({back.at(name).model for name in back.precisions}) == 3
    for name in back.precisions:
        one = back.at(name)
        logits, features = OnnxRuntimeEngine(one.model).run(
            np.stack([one.preprocess(frame) for frame in one.self_test.frames])
        )
        np.testing.assert_allclose(features, one.self_test.features, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(logits, one.self_test.logits, rtol=1e-3, atol=1e-3)
        assert not np.array_equal(one.guards[0].mean, back.guards[0].mean) or name == "fp32"
    failed = [check for check in verify(tmp_path / "bundle") if not check.passed]
    assert failed == []


def test_unknown_precision_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="precision: expected any of fp32, fp16, int8, got 'fp8'"):
        calibrate(poisoned.classifier(), poisoned.poisoned().defence, poisoned.inspected(), precisions=("fp8",))
    with pytest.raises(SystemExit):
        main(["calibrate", "m.pt2", "--data", "d.npz", "--precision", "fp16,int4"])
    assert "expected any of fp32, fp16, int8, separated by commas, got 'int4'" in capsys.readouterr().err
