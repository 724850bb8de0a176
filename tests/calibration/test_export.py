"""ONNX files that compute what torch computes, for any batch size, without a word on the terminal."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
import torch
from networks_for_tests import FlatMLP, GreyMLP, LeNetBN, Residual, Squeeze, ViT, Wrapped, export, shaken
from torch import nn

from inflight_edge import ModelError
from inflight_edge.calibration.export import PARITY_TOLERANCE, check_parity, export_onnx
from inflight_edge.calibration.model import Classifier, classifier_from_program
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine

OWN = {"flat": (FlatMLP, (512,)), "grey": (GreyMLP, (16, 16))}
NETWORKS = {"lenet": LeNetBN, "vit": ViT, "squeeze": Squeeze, "residual": Residual}


def classifier(name: str, batch: int | None = None) -> Classifier:
    kind, shape = OWN.get(name) or (NETWORKS[name], (2, 16, 16))
    program = export(shaken(kind()), torch.zeros(batch or 2, *shape), free=None if batch else {0: "batch"})
    return classifier_from_program(program, image_shape=(1, 16, 16) if name == "grey" else (2, 16, 16))


def images(classifier: Classifier, n_images: int) -> np.ndarray:
    return np.random.default_rng(n_images).normal(size=(n_images, *classifier.input_shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "batch"),
    [("lenet", None), ("vit", None), ("vit", 4), ("squeeze", 1), ("residual", 4), ("flat", 1), ("grey", None)],
)
def test_onnx_computes_what_torch_computes(name: str, batch: int | None, capfd: pytest.CaptureFixture[str]) -> None:
    made = classifier(name, batch)
    capfd.readouterr()
    level = logging.getLogger("torch.onnx").level
    model = export_onnx(made)
    assert capfd.readouterr().out == ""
    assert logging.getLogger("torch.onnx").level == level
    engine = OnnxRuntimeEngine(model, threads=1)
    for n_images in (1, 4, 7):
        batch_of = images(made, n_images)
        with torch.no_grad():
            expected = made(torch.from_numpy(batch_of))
        for got, want in zip(engine.run(batch_of), expected, strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-4)
        assert check_parity(made, model, batch_of) <= PARITY_TOLERANCE
    assert (engine.input_shape, engine.n_classes, engine.n_features) == (made.input_shape, 5, made.n_features)
    graph = onnx.load_from_string(model).graph
    assert [node.name for node in graph.input] == ["input"]
    assert [node.name for node in graph.output] == ["logits", "features"]
    size = graph.input[0].type.tensor_type.shape.dim[0]
    assert size.dim_value == (made.fixed_batch or 0)
    assert bool(size.dim_param) == (made.fixed_batch is None)


def test_closing_softmax_is_not_exported() -> None:
    net = shaken(Residual())
    program = export(Wrapped(net, nn.Softmax(dim=1)), torch.zeros(2, 2, 16, 16), free={0: "batch"})
    made = classifier_from_program(program, image_shape=(2, 16, 16))
    batch = images(made, 3)
    logits, _ = OnnxRuntimeEngine(export_onnx(made), threads=1).run(batch)
    with torch.no_grad():
        np.testing.assert_allclose(logits, net(torch.from_numpy(batch)).numpy(), rtol=1e-4, atol=1e-4)


def test_parity_notices_another_model() -> None:
    made, batch = classifier("residual"), np.ones((3, 2, 16, 16), np.float32)
    model = onnx.load_from_string(export_onnx(made))
    weight = next(t for t in model.graph.initializer if list(t.dims) == [5])
    array = onnx.numpy_helper.to_array(weight).copy()
    array[2] += 0.01
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    message = (
        r"^model: logits differ between torch and ONNX Runtime by 0\.0\d+, allowed 0\.0001; export the model in float32"
    )
    with pytest.raises(ModelError, match=message):
        check_parity(made, model.SerializeToString(), batch)


def test_parity_of_numbers_that_are_not_finite_fails() -> None:
    made = classifier("flat")
    model = export_onnx(made)
    for value in (np.nan, np.inf):
        batch = np.full((2, 2, 16, 16), value, np.float32)
        with np.errstate(invalid="ignore"), pytest.raises(ModelError, match=r"^model: logits differ .* by nan"):
            check_parity(made, model, batch)
