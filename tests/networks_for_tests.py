"""Small classifiers of many shapes, and how to export them; nothing here is a test."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

N_CLASSES = 5
IMAGE_SHAPE = (2, 16, 16)


class LeNetBN(nn.Module):
    """Convolutions with batch normalisation, a head with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.hidden1 = nn.Linear(54, 20)
        self.norm = nn.BatchNorm1d(20)
        self.hidden2 = nn.Linear(20, 12)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(12, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        first = torch.relu(self.norm(self.hidden1(self.body(images).flatten(1))))
        return self.out(self.drop(torch.relu(self.hidden2(first))))


class ViT(nn.Module):
    """Patches, a class token, one attention block; the head reads the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(images.shape[0], -1, -1), tokens], 1) + self.positions
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        tokens = tokens + self.mlp(self.norm2(tokens))
        return self.head(self.norm(tokens)[:, 0])


class Squeeze(nn.Module):
    """A convolution as the last layer, pooled to logits afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.ReLU())
        self.head = nn.Conv2d(7, N_CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(torch.relu(self.head(self.body(images))), 1).flatten(1)


class Residual(nn.Module):
    """A residual block, pooled; works at any height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.sum = nn.Identity()
        self.head = nn.Linear(6, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        first = torch.relu(self.stem(images))
        return self.head(torch.relu(self.sum(first + self.block(first))).mean((2, 3)))


class FlatMLP(nn.Module):
    """Takes (N, pixels)."""

    def __init__(self, n_pixels: int = 512) -> None:
        super().__init__()
        self.hidden = nn.Linear(n_pixels, 9)
        self.out = nn.Linear(9, N_CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(pixels)))


class GreyMLP(FlatMLP):
    """Takes (N, height, width)."""

    def __init__(self) -> None:
        super().__init__(256)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.reshape(images.shape[0], -1))


class Wrapped(nn.Module):
    """Changes what a network returns."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner
        self.change = change

    def forward(self, images: Tensor) -> Any:
        return self.change(self.inner(images))


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in evaluation mode with random weights and non-trivial batch statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*network.parameters(), *network.buffers()]:
            if value.is_floating_point():
                value.copy_(
                    torch.rand(value.shape, generator=generator) + 0.3
                    if (value == 1).all()
                    else torch.randn(value.shape, generator=generator) * 0.5
                )
    return network.eval()


def export(network: nn.Module, example: Tensor, *, free: dict[int, str] | None = None, decompose: bool = False) -> Any:
    """A torch.export program; ``free`` names the axes of any size, None binds all of them."""
    shapes = None if free is None else (dict.fromkeys(free, torch.export.Dim.DYNAMIC),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, while it traces
        program = torch.export.export(network, (example,), dynamic_shapes=shapes)
        return program.run_decompositions() if decompose else program


def saved(program: Any, path: Path) -> Path:
    torch.export.save(program, path)
    return path
