"""Programs exported in training mode answer at random, or by the other images of the batch, and are refused."""

from __future__ import annotations

import pytest
import torch
from networks_for_tests import IMAGE_SHAPE, LeNetBN, Residual
from torch import nn

from inflight_edge.calibration.model import classifier_from_program
from inflight_edge.errors import ModelError

ZEROS = torch.zeros(2, *IMAGE_SHAPE)


@pytest.mark.parametrize("kind", [LeNetBN, Residual])
@pytest.mark.filterwarnings("ignore")  # torch warns while it traces the training mode
def test_training_mode_is_refused(kind: type[nn.Module]) -> None:
    made = torch.export.export(kind().train(), (ZEROS,))
    with pytest.raises(ModelError, match=r"^model: exported in training mode \(batch_norm\); .*model\.eval\(\)"):
        classifier_from_program(made, image_shape=IMAGE_SHAPE)


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_dropout_in_training_mode_is_refused(decompose: bool) -> None:
    active = nn.Sequential(nn.Flatten(), nn.Linear(512, 8), nn.Dropout(), nn.Linear(8, 5)).train()
    made = torch.export.export(active, (ZEROS,))
    with pytest.raises(ModelError, match=r"^model: exported in training mode \(\w*dropout\)"):
        classifier_from_program(made.run_decompositions() if decompose else made, image_shape=IMAGE_SHAPE)


@pytest.mark.filterwarnings("ignore")
def test_decomposed_batch_norm_in_training_mode_is_refused() -> None:
    made = torch.export.export(Residual().train(), (ZEROS,)).run_decompositions()
    with pytest.raises(ModelError, match=r"^model: .*exported in training mode"):
        classifier_from_program(made, image_shape=IMAGE_SHAPE)


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("layer", [nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Dropout1d()], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_other_random_layers_in_training_mode_are_refused(layer: nn.Module, decompose: bool) -> None:
    active = nn.Sequential(nn.Flatten(), nn.Linear(512, 8), layer, nn.Linear(8, 5)).train()
    made = torch.export.export(active, (ZEROS,))
    with pytest.raises(ModelError, match=r"^model: .*exported in training mode"):
        classifier_from_program(made.run_decompositions() if decompose else made, image_shape=IMAGE_SHAPE)
