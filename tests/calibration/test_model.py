"""Exported programs of many shapes become classifiers that compute what the eager model computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks_for_tests import (
    IMAGE_SHAPE,
    N_CLASSES,
    FlatMLP,
    GreyMLP,
    LeNetBN,
    Residual,
    Squeeze,
    ViT,
    Wrapped,
    export,
    saved,
    shaken,
)
from torch import Tensor, nn

from inflight_edge.calibration import graph as module
from inflight_edge.calibration.model import (
    Classifier,
    classifier_from_program,
    input_channels,
    input_pixels,
    load_classifier,
)
from inflight_edge.errors import ModelError

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet": LeNetBN,
    "vit": ViT,
    "squeeze": Squeeze,
    "residual": Residual,
    "flat": FlatMLP,
    "grey": GreyMLP,
}
# What the features are by default: outputs ("out") of hidden layers, or the input ("in") of the last one.
FEATURES = {
    "lenet": [("hidden2", "out"), ("hidden1", "out")],
    "vit": [("head", "in")],
    "squeeze": [("head", "in")],
    "residual": [("head", "in")],
    "flat": [("hidden", "out")],
    "grey": [("hidden", "out")],
}
OWN_SHAPE = {"flat": (512,), "grey": (16, 16)}
ZEROS = torch.zeros(2, *IMAGE_SHAPE)


def image_shape(name: str) -> tuple[int, int, int]:
    return (1, 16, 16) if name == "grey" else IMAGE_SHAPE


@functools.cache
def network(name: str) -> nn.Module:
    return shaken(NETWORKS[name]())


@functools.cache
def program(name: str, batch: int | None, decompose: bool = False) -> Any:
    shape = OWN_SHAPE.get(name, IMAGE_SHAPE)
    free = {0: "batch"} if batch is None else None
    return export(network(name), torch.zeros(batch or 2, *shape), free=free, decompose=decompose)


def images(n_images: int, shape: tuple[int, int, int] = IMAGE_SHAPE) -> Tensor:
    return torch.randn(n_images, *shape, generator=torch.Generator().manual_seed(n_images))


def activations(name: str, batch: Tensor) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
    """Logits of the eager network, and what went into and came out of each module."""
    seen: dict[tuple[str, str], Tensor] = {}

    def remember(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, given: Any, output: Any) -> None:
            if given and isinstance(output, Tensor):
                seen[path, "in"], seen[path, "out"] = given[0].clone(), output.clone()

        return hook

    handles = [child.register_forward_hook(remember(path)) for path, child in network(name).named_modules() if path]
    try:
        with torch.no_grad():
            logits = network(name)(batch.reshape(len(batch), *OWN_SHAPE.get(name, IMAGE_SHAPE)))
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


def pooled(value: Tensor) -> Tensor:
    return value.mean((2, 3)) if value.ndim == 4 else value.mean(1) if value.ndim == 3 else value


def check(classifier: Classifier, name: str, parts: list[tuple[str, str]]) -> None:
    """Logits and features of 1 and 7 images equal the eager network's."""
    for n_images in (1, 7):
        batch = images(n_images, image_shape(name))
        expected, seen = activations(name, batch)
        with torch.no_grad():
            logits, features = classifier(batch)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        joined = torch.cat([pooled(seen[part]) for part in parts], 1)
        torch.testing.assert_close(features, joined, rtol=1e-4, atol=1e-4)
    assert (classifier.n_classes, classifier.n_features) == (N_CLASSES, joined.shape[1])
    assert classifier.input_shape == image_shape(name)


@pytest.mark.parametrize(("batch", "decompose"), [(1, False), (4, False), (None, False), (4, True), (None, True)])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_features_are_the_eager_networks(name: str, batch: int | None, decompose: bool) -> None:
    classifier = classifier_from_program(program(name, batch, decompose), image_shape=image_shape(name))
    # Attention folds the batch into another axis, so a fixed batch cannot be lifted there.
    assert classifier.fixed_batch == (batch if name == "vit" else None)
    check(classifier, name, FEATURES[name])


def test_gradients_of_a_fixed_batch_are_the_eager_networks() -> None:
    classifier = classifier_from_program(program("vit", 4), image_shape=IMAGE_SHAPE)
    batch, same = images(7).requires_grad_(), images(7).requires_grad_()
    classifier(batch)[0].square().sum().backward()
    network("vit")(same).square().sum().backward()
    assert batch.grad is not None
    torch.testing.assert_close(batch.grad, same.grad, rtol=1e-3, atol=1e-3)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda logits: logits.softmax(1),
    "log_softmax": lambda logits: logits.log_softmax(-1),
    "module_softmax": nn.Softmax(dim=1),
    "both": lambda logits: logits.softmax(1).log_softmax(1),
    "tuple": lambda logits: (logits.sum(), logits),
    "list": lambda logits: [logits.softmax(1)],
    "dict": lambda logits: {"loss": logits.mean((0, 1)), "logits": logits},
    "none": lambda logits: (None, logits),
}


@pytest.mark.parametrize(
    ("change", "decompose"),
    [*((change, False) for change in CHANGES), ("softmax", True), ("both", True), ("dict", True)],
)
def test_logits_are_found_behind_softmax_and_inside_containers(change: str, decompose: bool) -> None:
    wrapped = Wrapped(network("residual"), CHANGES[change])
    made = export(wrapped, ZEROS, free={0: "batch"}, decompose=decompose)
    classifier = classifier_from_program(made, image_shape=IMAGE_SHAPE)
    batch = images(7)
    with torch.no_grad():
        torch.testing.assert_close(classifier(batch)[0], network("residual")(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("free", [{0: "batch", 2: "height", 3: "width"}, {2: "height", 3: "width"}])
def test_open_height_and_width_are_the_datas(free: dict[int, str]) -> None:
    classifier = classifier_from_program(export(network("residual"), ZEROS, free=free), image_shape=(2, 20, 24))
    assert classifier.input_shape == (2, 20, 24)
    batch = images(7, (2, 20, 24))
    with torch.no_grad():
        torch.testing.assert_close(classifier(batch)[0], network("residual")(batch), rtol=1e-4, atol=1e-4)


def test_size_of_the_program_wins_over_the_datas() -> None:
    assert classifier_from_program(program("residual", None), image_shape=(1, 50, 60)).input_shape == IMAGE_SHAPE


@pytest.mark.parametrize(
    ("name", "layer", "parts", "node"),
    [
        ("lenet", "penultimate", [("drop", "out")], "dropout"),
        ("lenet", "hidden1", [("hidden1", "out")], "linear"),
        ("lenet", "linear_1", [("hidden2", "out")], "linear_1"),
        ("lenet", "body.4", [("body.4", "out")], "conv2d_1"),
        ("lenet", "body", [("body", "out")], "max_pool2d_1"),
        ("lenet", "hidden1+hidden2", [("hidden1", "out"), ("hidden2", "out")], "linear+linear_1"),
        ("lenet", "body.0+linear", [("body.0", "out"), ("hidden1", "out")], "conv2d+linear"),
        ("vit", "norm", [("norm", "out")], "layer_norm_2"),
        ("vit", "mlp.0", [("mlp.0", "out")], "linear_2"),
        ("squeeze", "penultimate", [("head", "in")], "relu_1"),
    ],
)
def test_named_feature_layer(name: str, layer: str, parts: list[tuple[str, str]], node: str) -> None:
    classifier = classifier_from_program(program(name, None), image_shape=IMAGE_SHAPE, feature_layer=layer)
    assert classifier.feature_layer == node
    check(classifier, name, parts)


ALTERNATIVES = {
    "lenet": [[("hidden2", "out")], [("out", "in")], [("body.5", "out")], [("body.1", "out")]],
    "vit": [[("patches", "out")]],
    "squeeze": [[("body.2", "out")], [("body.0", "out")]],
    "residual": [[("sum", "out")]],
    "flat": [[("out", "in")]],
}


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("name", ALTERNATIVES)
def test_other_feature_layers_are_offered_unless_one_is_asked_for(name: str, decompose: bool) -> None:
    classifier = classifier_from_program(program(name, None, decompose), image_shape=image_shape(name))
    for other, parts in zip(classifier.alternatives, ALTERNATIVES[name], strict=True):
        check(other, name, parts)
        assert (other.alternatives, other.together) == ((), None)
    assert classifier.together is not None
    check(classifier.together, name, [*FEATURES[name], *(part for parts in ALTERNATIVES[name] for part in parts)])
    named = classifier_from_program(
        program(name, None, decompose), image_shape=image_shape(name), feature_layer=classifier.feature_layer
    )
    assert (named.alternatives, named.together) == ((), None)


class Narrowing(nn.Module):
    """Maps of five sizes, the first with more channels than are offered; a gate and a sum that are no maps."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(2, module.MAX_JOINED_FEATURES + 1, 1)
        self.body = nn.ModuleList(nn.Conv2d(2, 2, 3, 1) for _ in range(5))
        self.gate, self.out = nn.Conv2d(2, 2, 1), nn.Linear(2, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        values = images + self.wide(images).mean(1, keepdim=True)
        for layer in self.body:
            values = torch.relu(layer(values))
        gated = values * self.gate(values.mean((2, 3), keepdim=True))
        return self.out((gated.permute(0, 2, 3, 1) + 1.0).mean((1, 2)))


class Twice(nn.Module):
    """Every image and its mirrored one, so that the first axis of the maps is not the images'."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Conv2d(2, 4, 3), nn.Linear(4, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        both = self.body(torch.cat([images, images.flip(3)])).mean((2, 3))
        first, second = both.chunk(2)
        return self.out(first + second)


class Whole(nn.Module):
    """A sum of integers beside the map."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Conv2d(2, 4, 3), nn.Linear(4, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        count = (images > 0.5).long() + (images > 0.2).long()
        return self.out(self.body(images + count).mean((2, 3)))


class Hourglass(nn.Module):
    """Down and up again with a join; branches joined after their activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.up = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 2, 2), nn.Conv2d(3, 3, 1)
        self.out = nn.Linear(6, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        large = torch.relu(self.first(images))
        small = torch.relu(self.down(large))
        again = torch.relu(self.up(nn.functional.interpolate(small, scale_factor=2)))
        return self.out(torch.cat([large, again], 1).mean((2, 3)))


@pytest.mark.parametrize(
    ("made", "layers"),
    [
        (Narrowing, ["conv2d_5", "conv2d_4", "conv2d_3", "conv2d_4+conv2d_3"]),
        (Twice, []),
        (Whole, ["conv2d"]),
        (Hourglass, ["cat", "conv2d_1"]),
    ],
)
def test_maps_of_the_last_sizes_are_offered(made: type[nn.Module], layers: list[str]) -> None:
    classifier = classifier_from_program(export(made().eval(), ZEROS), image_shape=IMAGE_SHAPE)
    assert [other.feature_layer for other in classifier.alternatives] == layers


class Head(nn.Module):
    """Two hidden layers with an activation of choice."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.hidden1, self.hidden2, self.out = nn.Linear(512, 6), nn.Linear(6, 4), nn.Linear(4, N_CLASSES)
        self.activation = activation

    def forward(self, batch: Tensor) -> Tensor:
        first = self.activation(self.hidden1(batch.flatten(1)))
        return self.out(self.activation(self.hidden2(first)))


ACTIVATIONS = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.ELU()]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, nn.Hardswish(), nn.Identity()], ids=str)
def test_default_features_lie_before_the_activation(activation: nn.Module) -> None:
    head = shaken(Head(activation))
    classifier = classifier_from_program(export(head, ZEROS, free={0: "batch"}), image_shape=IMAGE_SHAPE)
    batch = images(7)
    with torch.no_grad():
        first = head.hidden1(batch.flatten(1))
        second = head.hidden2(activation(first))
        torch.testing.assert_close(classifier(batch)[1], torch.cat([second, first], 1), rtol=1e-4, atol=1e-4)


def test_default_features_lie_before_an_activation_in_place() -> None:
    head = shaken(Head(nn.ReLU(inplace=True)))
    classifier = classifier_from_program(export(head, ZEROS, free={0: "batch"}), image_shape=IMAGE_SHAPE)
    batch = images(7)
    with torch.no_grad():
        first = head.hidden1(batch.flatten(1))
        second = head.hidden2(first.relu())
        torch.testing.assert_close(classifier(batch)[1], torch.cat([second, first], 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("limit", "layer"), [(32, "linear_1+linear"), (31, "linear_1"), (1, "linear_1")])
def test_earlier_hidden_layer_is_left_out_where_both_are_wide(
    monkeypatch: pytest.MonkeyPatch, limit: int, layer: str
) -> None:
    monkeypatch.setattr(module, "MAX_JOINED_FEATURES", limit)
    classifier = classifier_from_program(program("lenet", None), image_shape=IMAGE_SHAPE)
    assert classifier.feature_layer == layer


class KeywordOnly(Residual):
    def forward(self, *, batch: Tensor) -> Tensor:
        return super().forward(batch)


class InTuple(Residual):
    def forward(self, given: tuple[Tensor]) -> Tensor:
        return super().forward(given[0])


@pytest.mark.parametrize(
    ("kind", "arguments", "keywords"), [(KeywordOnly, (), {"batch": ZEROS}), (InTuple, ((ZEROS,),), {})]
)
def test_input_by_keyword_or_inside_a_tuple(kind: type[nn.Module], arguments: Any, keywords: dict[str, Tensor]) -> None:
    net, batch = network_of(kind), images(7)
    classifier = classifier_from_program(torch.export.export(net, arguments, keywords), image_shape=IMAGE_SHAPE)
    with torch.no_grad():
        expected = net(batch=batch) if keywords else net((batch,))
        torch.testing.assert_close(classifier(batch)[0], expected, rtol=1e-4, atol=1e-4)


@functools.cache
def network_of(kind: type[nn.Module]) -> nn.Module:
    return shaken(kind())


class TwoInputs(Residual):
    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return super().forward(one + two)


class BytesInput(Residual):
    def forward(self, batch: Tensor) -> Tensor:
        return super().forward(batch.float() / 255)


def flat(change: Callable[[Tensor], Any]) -> nn.Module:
    return Wrapped(nn.Flatten(), change)


def wrapped(change: Callable[[Tensor], Any]) -> nn.Module:
    return Wrapped(network("residual"), change)


BATCH_FREE = {0: "batch"}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "two inputs": (
        lambda: torch.export.export(network_of(TwoInputs), (ZEROS, ZEROS)),
        r"model: expected one input \(a batch of images\), got 2; export the model with torch\.export\.export",
    ),
    "rank 5": (
        lambda: export(flat(lambda t: t[:, :5]), torch.zeros(2, 1, 2, 4, 4), free=BATCH_FREE),
        r"model: expected an input \(batch, channels, height, width\), got \(\w+, 1, 2, 4, 4\)",
    ),
    "rank 1": (
        lambda: export(Wrapped(nn.Identity(), lambda t: t[:, None].repeat(1, 5)), torch.zeros(4)),
        r"model: expected an input \(batch, channels, height, width\), got \(4,\)",
    ),
    "other pixels": (
        lambda: export(shaken(FlatMLP(100)), torch.zeros(2, 100), free=BATCH_FREE),
        r"model: expected images of 100 values, which it takes as one row, got images of \(channels, height, width\) "
        r"\(2, 16, 16\); give images of the network's own size and channels",
    ),
    "float64": (
        lambda: export(shaken(Residual()).double(), ZEROS.double(), free=BATCH_FREE),
        r"model: expected a float32 input, got torch\.float64; call model\.float\(\) before the export",
    ),
    "uint8": (
        lambda: export(network_of(BytesInput), ZEROS.byte(), free=BATCH_FREE),
        r"model: expected a floating-point image tensor as input, got .*uint8.*; export the model",
    ),
    "one number per image": (
        lambda: export(wrapped(lambda logits: logits.sum(1)), ZEROS, free=BATCH_FREE),
        r"model: expected an output \(batch, classes\), got \[\(\w+,\)\]; export the classifier alone",
    ),
    "a map per image": (
        lambda: export(wrapped(lambda logits: logits[:, :, None]), ZEROS, free=BATCH_FREE),
        r"model: expected an output \(batch, classes\), got \[\(\w+, 5, 1\)\]; export the classifier alone",
    ),
    "one class": (
        lambda: export(wrapped(lambda logits: logits[:, :1]), ZEROS, free=BATCH_FREE),
        r"model: expected logits of shape \(batch, classes\), got \(2, 1\)",
    ),
    "integer logits": (
        lambda: export(wrapped(lambda logits: logits.long()), ZEROS, free=BATCH_FREE),
        r"model: expected float32 logits, got torch\.int64; export it in float32",
    ),
    "half logits": (
        lambda: export(wrapped(lambda logits: logits.half()), ZEROS, free=BATCH_FREE),
        r"model: expected float32 logits, got torch\.float16; export it in float32",
    ),
    "no linear layer": (
        lambda: export(flat(lambda t: t[:, :5]), ZEROS, free=BATCH_FREE),
        r"feature layer: the model has no linear layer to take the input of; name one with --feature-layer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_image_classifier_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    made = make()
    with pytest.raises(ModelError, match=f"^{message}"):
        classifier_from_program(made, image_shape=IMAGE_SHAPE)


@pytest.mark.parametrize(
    ("layer", "nearest"),
    [
        ("hiden1", "hidden1, hidden2"),
        ("linear_7", "linear"),
        ("out", "dropout"),  # the last layer gives the logits themselves
        ("zzz", "dropout"),
        ("", "dropout"),
        ("hidden1+", "dropout"),
        ("hidden1+hiden2", "hidden2"),
    ],
)
def test_unknown_layer_names_near_ones(layer: str, nearest: str) -> None:
    wrong = layer.split("+")[-1]
    message = rf"^feature layer: no layer '{wrong}' before the logits; nearest: .*{nearest}"
    with pytest.raises(ModelError, match=message):
        classifier_from_program(program("lenet", None), image_shape=IMAGE_SHAPE, feature_layer=layer)


def test_program_that_cannot_run_at_the_datas_size_says_so() -> None:
    class Fussy(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return nn.functional.conv2d(batch, torch.ones(N_CLASSES, 2, 8, 8)).mean((2, 3))

    made = export(Fussy(), ZEROS, free={0: "batch", 2: "height", 3: "width"})
    with pytest.raises(ModelError, match=r"^model: cannot run on images of shape \(2, 4, 4\) \(.*\); check the data's"):
        classifier_from_program(made, image_shape=(2, 4, 4), feature_layer="batch")


def test_classifier_from_a_file(tmp_path: Path) -> None:
    path = saved(program("lenet", None), tmp_path / "model.pt2")
    check(load_classifier(path, image_shape=IMAGE_SHAPE), "lenet", FEATURES["lenet"])
    penultimate = load_classifier(str(path), image_shape=IMAGE_SHAPE, feature_layer="penultimate")
    assert penultimate.n_features == 12


@pytest.mark.parametrize(("name", "channels"), [("residual", 2), ("grey", 1), ("flat", None)])
def test_channels_of_the_programs_images(name: str, channels: int | None) -> None:
    assert input_channels(program(name, None)) == channels
    assert input_pixels(program(name, None)) == (512 if name == "flat" else None)
