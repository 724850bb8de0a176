"""The networks of the experiments fit the images they are made for."""

from __future__ import annotations

import pytest
import torch

from inflight_edge.calibration.networks import NETWORKS, ResNet18, make_network
from inflight_edge.errors import OptionError


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 20, 36)])
def test_lenet(shape: tuple[int, int, int]) -> None:
    network = make_network("lenet5", shape, 7).eval()
    with torch.no_grad():
        images = torch.rand(3, *shape)
        assert network(images).shape == (3, 7)
        torch.testing.assert_close(network(images)[1:2], network(images[1:2]))
    assert network.classifier.in_features == 84


def test_lenet_has_the_published_size() -> None:
    # 6 * 26 + 16 * 151 + 400 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10: 61,706 parameters.
    assert sum(p.numel() for p in make_network("lenet5", (1, 28, 28), 10).parameters()) == 61706


@pytest.mark.parametrize("size", [16, 32])
def test_resnet(size: int) -> None:
    network = ResNet18((3, size, size), 5, width=4).eval()
    with torch.no_grad():
        assert network(torch.rand(2, 3, size, size)).shape == (2, 5)
    assert network.classifier.in_features == 32


def test_resnet_has_the_published_size() -> None:
    with torch.device("meta"):
        network = make_network("resnet18", (3, 32, 32), 10)
    assert sum(p.numel() for p in network.parameters()) == 11173962  # the form for 32x32 images


def test_vgg() -> None:
    with torch.device("meta"):
        network = make_network("vgg16", (3, 32, 32), 20)
        # Without their biases: 64 * 27 + 576 * 64 + ... = 14,710,464 weights of convolutions, 8,448 of normalisation.
        assert sum(p.numel() for p in network.parameters() if p.ndim == 4) == 14710464
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 20)
    assert network.classifier.in_features == 512
    with pytest.raises(OptionError, match=r"^image shape: expected at least 32x32 for VGG-16, got \(1, 28, 28\)"):
        make_network("vgg16", (1, 28, 28), 10)


def test_unknown_network() -> None:
    with pytest.raises(OptionError, match=f"^network: expected one of {', '.join(NETWORKS)}, got 'vgg'"):
        make_network("vgg", (3, 32, 32), 10)
