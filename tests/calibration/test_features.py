"""Logits and features of many images are those of each image alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from poisoned import PREPROCESS, Poisoned

from inflight_edge.calibration.features import extract
from inflight_edge.calibration.model import Classifier


@pytest.mark.parametrize("batch", [1, 33, 128, 1000])
def test_batches_make_no_difference(classifier: Classifier, victim: Poisoned, batch: int) -> None:
    pixels = victim.defence.pixels(PREPROCESS)[:100]
    logits, features = extract(classifier, pixels, PREPROCESS, batch=batch)
    with torch.no_grad():
        expected = victim.network(torch.from_numpy(PREPROCESS.normalise(pixels)))
        hidden = victim.network.hidden(victim.network.body(torch.from_numpy(PREPROCESS.normalise(pixels))).flatten(1))
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features, hidden.numpy(), rtol=1e-4, atol=1e-4)
    assert logits.dtype == features.dtype == np.float32


def test_no_image_and_the_progress_bar(classifier: Classifier, capsys: pytest.CaptureFixture[str]) -> None:
    empty = np.empty((0, *PREPROCESS.input_shape), np.float32)
    logits, features = extract(classifier, empty, PREPROCESS)
    assert (logits.shape, features.shape) == ((0, classifier.n_classes), (0, classifier.n_features))
    extract(classifier, np.zeros((3, *PREPROCESS.input_shape), np.float32), PREPROCESS)
    assert capsys.readouterr() == ("", "")
    extract(classifier, np.zeros((3, *PREPROCESS.input_shape), np.float32), PREPROCESS, batch=2, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "features" in captured.err
