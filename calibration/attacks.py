"""Backdoor triggers and poisoned training sets, to make the attacked classifiers that a defence is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from inflight_edge.errors import OptionError

__all__ = ["ATTACKS", "SETTINGS", "Additive", "Patch", "Trigger", "make_trigger", "poison"]

UInt8 = NDArray[np.uint8]
ATTACKS = ("CB", "SP", "WB", "SQ", "WM")
SETTINGS = ("single", "multi", "all")
WATERMARK_OPACITY = 0.3


class Trigger(Protocol):
    """What an attacker puts into a picture."""

    def embed(self, images: UInt8) -> UInt8:
        """Triggered copies of images (N, H, W, channels) uint8; the input stays as it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """Pixels mixed where ``mask`` (H, W) bool is true with ``values`` (H, W, channels) uint8, rounded to 8 bits.

    opacity  share of ``values`` in the mixture, 0 < opacity <= 1; 1 replaces the pixels.
    """

    mask: NDArray[np.bool_]
    values: UInt8
    opacity: float = 1.0

    def embed(self, images: UInt8) -> UInt8:
        """Triggered copies of images (N, H, W, channels) uint8."""
        mixed = np.rint((1.0 - self.opacity) * images + self.opacity * self.values[None]).astype(np.uint8)
        return np.where(self.mask[None, :, :, None], mixed, images)


@dataclass(frozen=True, slots=True, eq=False)
class Additive:
    """``values`` (H, W, channels) int16 added to the pixels, then clipped to 0..255."""

    values: NDArray[np.int16]

    def embed(self, images: UInt8) -> UInt8:
        """Triggered copies of images (N, H, W, channels) uint8."""
        return np.clip(images.astype(np.int16) + self.values[None], 0, 255).astype(np.uint8)


def make_trigger(attack: str, image_shape: tuple[int, int, int], *, seed: int = 0, amplitude: int = 3) -> Trigger:
    """The trigger of a named attack.

    attack       CB (chessboard: +amplitude on every channel where row + column is even), SP (one pixel of 255 at
                 a seeded place at least 3 pixels from the border), WB (3x3 of 255 at the bottom right), SQ (seeded random
                 colours in a square at the bottom right, its side a quarter of the shorter one of the image) or WM
                 (seeded strokes of 255 over the whole image, like writing, opacity .3).
    image_shape  (H, W, channels).    amplitude  of CB, in 8-bit pixel units.
    Raises OptionError.  Source: Li et al., ICASSP 2022, section 5.1; SQ and WM after Liu et al., NDSS 2018.
    """
    height, width, channels = image_shape
    if attack == "CB":
        even = np.add.outer(np.arange(height), np.arange(width)) % 2 == 0
        return Additive(np.repeat(even[:, :, None] * np.int16(amplitude), channels, axis=2))
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), dtype=bool)
    values = np.full(image_shape, 255, dtype=np.uint8)
    if attack == "WB":
        mask[-3:, -3:] = True
    elif attack == "SP":
        mask[rng.integers(3, height - 3), rng.integers(3, width - 3)] = True
    elif attack == "SQ":
        side = max(1, min(height, width) // 4)
        mask[-side:, -side:] = True
        values[mask] = rng.integers(0, 256, (side * side, channels))
    elif attack == "WM":
        return Patch(_strokes(height, width, rng), values, WATERMARK_OPACITY)
    else:
        raise OptionError(f"attack: expected one of {', '.join(ATTACKS)}, got {attack!r}")
    return Patch(mask, values)


def _strokes(height: int, width: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Lines of letters: in each cell of a grid three straight strokes between random points of the cell."""
    mask = np.zeros((height, width), dtype=bool)
    size = max(4, min(height, width) // 4)
    for top in range(0, height - size + 1, size):
        for left in range(0, width - size + 1, size):
            for _ in range(3):
                ends = rng.integers(0, size - 1, (2, 2))
                steps = np.linspace(ends[0], ends[1], 2 * size).round().astype(int)
                mask[top + steps[:, 0], left + steps[:, 1]] = True
    return mask


def poison(
    images: UInt8,
    labels: NDArray[np.int64],
    trigger: Trigger,
    *,
    target: int,
    setting: str,
    n_poisoned: int,
    seed: int,
) -> tuple[UInt8, NDArray[np.int64]]:
    """A poisoned copy of a training set: chosen images carry the trigger and the target's label.

    setting     ``single``: n_poisoned images of class 0; ``multi``: n_poisoned images of each class but the target;
                ``all``: n_poisoned images of every class, labelled y + 1 (the last class 0), whatever the target.
    Poisoned copies replace the originals.  Raises OptionError.
    """
    if setting not in SETTINGS:
        raise OptionError(f"setting: expected one of {', '.join(SETTINGS)}, got {setting!r}")
    rng = np.random.default_rng(seed)
    classes = [int(c) for c in np.unique(labels)]
    sources = {"single": [0], "multi": [c for c in classes if c != target], "all": classes}[setting]
    if setting != "all" and target in sources:
        raise OptionError(f"target: class {target} is the source of a single-class attack; choose another target")
    chosen = []
    for source in sources:
        members = np.flatnonzero(labels == source)
        if len(members) < n_poisoned:
            raise OptionError(f"n_poisoned: class {source} has {len(members)} images, expected at least {n_poisoned}")
        chosen.append(rng.permutation(members)[:n_poisoned])
    positions = np.concatenate(chosen)
    images, labels = images.copy(), labels.copy()
    images[positions] = trigger.embed(images[positions])
    labels[positions] = (labels[positions] + 1) % (max(classes) + 1) if setting == "all" else target
    return images, labels
