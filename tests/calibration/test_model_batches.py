"""Programs bound to one batch size that cannot be freed from it still take any number of images."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks_for_tests import IMAGE_SHAPE, N_CLASSES, Residual, ViT, export, shaken
from torch import Tensor, nn

from inflight_edge.calibration.model import Classifier, classifier_from_program

BATCH = torch.randn(7, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(7))


class Sequence(nn.Module):
    """A recurrent layer along the rows of the image; the head reads its last output."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(32, 12, batch_first=True)
        self.out = nn.Linear(12, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.recurrent(images.transpose(1, 2).flatten(2))[0][:, -1])


class AddedInPlace(Residual):
    """Adds the logits to zeros made for the batch."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(images.shape[0], N_CLASSES)
        logits += super().forward(images)
        return logits


def bound(network: nn.Module, batch: int) -> Classifier:
    return classifier_from_program(export(network, torch.zeros(batch, *IMAGE_SHAPE)), image_shape=IMAGE_SHAPE)


def check(network: nn.Module, batch: int) -> None:
    with torch.no_grad():
        torch.testing.assert_close(bound(network, batch)(BATCH)[0], network(BATCH), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "make", [lambda: Sequence(nn.GRU), lambda: Sequence(nn.RNN), AddedInPlace], ids=["gru", "rnn", "in place"]
)
def test_any_number_of_images_at_a_fixed_batch(make: Callable[[], nn.Module], batch: int) -> None:
    check(shaken(make()), batch)


def test_lstm_at_a_fixed_batch_does_not_end_the_process() -> None:
    """In a process of its own: torch aborts where an LSTM of a fixed batch gets another one."""
    code = "from test_model_batches import *; check(shaken(Sequence(nn.LSTM)), 4)"
    here = Path(__file__).parent
    path = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]; "
    result = subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-500:]


def test_attention_at_a_fixed_batch_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    classifier = bound(shaken(ViT()), 4)
    capfd.readouterr()
    with torch.no_grad():
        classifier(BATCH)
    assert capfd.readouterr() == ("", "")
