"""Training of the experiments' classifiers: one-cycle SGD, resumable, with a fast recipe for CPUs."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from inflight_edge.calibration.threads import has_bfloat16
from inflight_edge.errors import DataError
from inflight_edge.preprocess import Preprocess

__all__ = ["Recipe", "predict", "train"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained.

    epochs           passes over the training set, the low-resolution ones included.
    low_epochs       how many of them, first, at half the image size.
    max_rate         peak learning rate of the one-cycle schedule (SGD, Nesterov momentum from .95 down to .85 and back).
    halve_every      instead of the one-cycle schedule: start at max_rate and halve it after so many epochs (0: one cycle);
                     the momentum stays .9.
    weight_decay     L2 penalty on all weights.
    batch            images a step.
    crop             random shift in pixels, zero padded (0: none).
    flip             random horizontal flip.
    bfloat16         channels_last and, where the processor computes in it, bfloat16 autocast.
    label_smoothing  of the cross-entropy.
    """

    epochs: int
    low_epochs: int = 0
    max_rate: float = 0.1
    halve_every: int = 0
    weight_decay: float = 5e-4
    batch: int = 128
    crop: int = 0
    flip: bool = False
    bfloat16: bool = False
    label_smoothing: float = 0.0

    @property
    def in_bfloat16(self) -> bool:
        """Whether it computes in bfloat16 on this processor."""
        return self.bfloat16 and has_bfloat16()


def train(
    network: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    preprocess: Preprocess,
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> nn.Module:
    """Train in place and return the network in evaluation mode.

    images      (N, H, W, channels) uint8, already poisoned.   labels  (N,) int64.
    checkpoint  file rewritten after every epoch; an existing one of the same recipe, seed and images is resumed.
    The order of images, augmentation and updates depend on the seed and the epoch alone.
    """
    data = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    targets = torch.from_numpy(labels)
    if recipe.bfloat16:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(
        network.parameters(), lr=recipe.max_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    steps_per_epoch = -(-len(data) // recipe.batch)
    schedule = _schedule(optimiser, recipe, steps_per_epoch)
    digest = hashlib.sha256(data.numpy().tobytes() + targets.numpy().tobytes()).hexdigest()
    identity = {"recipe": asdict(recipe), "seed": seed, "n_images": len(data), "images": digest}
    first = _resume(checkpoint, identity, network, optimiser, schedule)
    network.train()
    total = (recipe.epochs - first) * steps_per_epoch
    with tqdm(total=total, desc="train", unit="step", disable=not progress or total == 0) as bar:
        for epoch in range(first, recipe.epochs):
            generator = torch.Generator().manual_seed(seed * 1000 + epoch)
            torch.manual_seed(seed * 1000 + epoch)
            losses = []
            for positions in torch.randperm(len(data), generator=generator).split(recipe.batch):
                batch = _augment(data[positions], recipe, generator)
                inputs = torch.from_numpy(preprocess.normalise(batch.float().numpy()))
                if epoch < recipe.low_epochs:
                    inputs = F.avg_pool2d(inputs, 2)
                if recipe.bfloat16:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.in_bfloat16):
                    logits = network(inputs)
                loss = F.cross_entropy(logits.float(), targets[positions], label_smoothing=recipe.label_smoothing)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                losses.append(float(loss.detach()))
                bar.update()
            bar.set_postfix(epoch=epoch + 1, loss=f"{np.mean(losses):.4f}")
            if checkpoint is not None:
                _save(checkpoint, identity, epoch + 1, network, optimiser, schedule)
    return network.eval()


def predict(
    network: nn.Module, images: NDArray[np.uint8], preprocess: Preprocess, *, batch: int = 512
) -> NDArray[np.int64]:
    """Predicted class (N,) of images (N, H, W, channels) uint8 at the network's own size."""
    predictions = []
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            pixels = np.ascontiguousarray(images[start : start + batch].transpose(0, 3, 1, 2), dtype=np.float32)
            predictions.append(network(torch.from_numpy(preprocess.normalise(pixels))).argmax(1).numpy())
    return np.concatenate(predictions)


def _schedule(
    optimiser: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rate by step."""
    if recipe.halve_every:
        return torch.optim.lr_scheduler.StepLR(optimiser, recipe.halve_every * steps_per_epoch, gamma=0.5)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.max_rate, epochs=recipe.epochs, steps_per_epoch=steps_per_epoch, pct_start=0.25
    )


def _augment(batch: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    n_images, _, height, width = batch.shape
    if recipe.flip:
        flipped = torch.rand(n_images, generator=generator) < 0.5
        batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
    if recipe.crop:
        pad = recipe.crop
        padded = F.pad(batch, (pad, pad, pad, pad))
        shifts = torch.randint(0, 2 * pad + 1, (n_images, 2), generator=generator)
        rows = shifts[:, :1] + torch.arange(height)
        columns = shifts[:, 1:] + torch.arange(width)
        image = torch.arange(n_images)[:, None, None]
        batch = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return batch


def _save(
    path: Path,
    identity: dict[str, object],
    epoch: int,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {
        "identity": identity,
        "epoch": epoch,
        "network": network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "schedule": schedule.state_dict(),
    }
    torch.save(state, partial)
    os.replace(partial, path)


def _resume(
    path: Path | None,
    identity: dict[str, object],
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Epochs already done according to the checkpoint, 0 without one."""
    if path is None or not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    # A recipe of before an option existed has its default; older checkpoints do not tell their images.
    of_the_file = {"images": identity["images"], **state["identity"]}
    of_the_file["recipe"] = asdict(Recipe(**of_the_file["recipe"]))
    if of_the_file != identity:
        raise DataError(f"{path}: checkpoint of another run ({of_the_file}), wanted {identity}; move it away")
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    schedule.load_state_dict(state["schedule"])
    return int(state["epoch"])
