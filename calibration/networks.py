"""Networks of the experiments, written so that torch.export and the ONNX export work for any batch size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inflight_edge.errors import OptionError

__all__ = ["NETWORKS", "VGG16", "LeNet5", "ResNet18", "make_network"]


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max pooling; features are the 84 units before the last layer.

    Source: LeCun, Bottou, Bengio, Haffner, Proc. IEEE 1998.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), n_classes: int = 10) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2), 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(84, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, height, width)."""
        logits: Tensor = self.classifier(self.layers(images))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 in its form for 32x32 images (3x3 stem, no pooling); features are the 512 pooled channels.

    Source: He, Zhang, Ren, Sun, CVPR 2016, section 4.2.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (3, 32, 32), n_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(image_shape[0], width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        widths = [width, width, width * 2, width * 4, width * 8]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    _BasicBlock(widths[i], widths[i + 1], 1 if i == 0 else 2),
                    _BasicBlock(widths[i + 1], widths[i + 1], 1),
                )
                for i in range(4)
            )
        )
        self.classifier = nn.Linear(widths[4], n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, height, width)."""
        logits: Tensor = self.classifier(self.stages(self.stem(images)).mean((2, 3)))
        return logits


class VGG16(nn.Module):
    """VGG-16 with batch normalisation, for images of 32x32 and more; features are the 512 units before the last layer.

    Two hidden fully connected layers of 512 units instead of 4096, as is usual for small images.
    Source: Simonyan, Zisserman, ICLR 2015, configuration D.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (3, 32, 32), n_classes: int = 10) -> None:
        super().__init__()
        if min(image_shape[1:]) < 32:
            raise OptionError(f"image shape: expected at least 32x32 for VGG-16, got {image_shape}; choose lenet5")
        layers: list[nn.Module] = []
        before = image_shape[0]
        for widths in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        pooled = 512 * (image_shape[1] // 32) * (image_shape[2] // 32)
        layers += [nn.Flatten(), nn.Linear(pooled, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, height, width)."""
        logits: Tensor = self.classifier(self.layers(images))
        return logits


NETWORKS: dict[str, type[LeNet5] | type[ResNet18] | type[VGG16]] = {
    "lenet5": LeNet5,
    "resnet18": ResNet18,
    "vgg16": VGG16,
}


def make_network(name: str, image_shape: tuple[int, int, int], n_classes: int) -> nn.Module:
    """A freshly initialised network by name; image_shape is (channels, height, width).  Raises OptionError."""
    if name not in NETWORKS:
        raise OptionError(f"network: expected one of {', '.join(NETWORKS)}, got {name!r}")
    return NETWORKS[name](image_shape, n_classes)
