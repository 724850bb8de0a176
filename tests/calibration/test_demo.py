"""The parts of the demo; the whole of it runs on its own."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from poisoned import PREPROCESS, SIZE, TARGET, Poisoned

from inflight_edge.calibration import demo
from inflight_edge.calibration.datasets import ImageSet, load_digits, load_images
from inflight_edge.calibration.inspection import Inspection
from inflight_edge.calibration.model import load_classifier
from inflight_edge.calibration.networks import make_network
from inflight_edge.images import read_image
from inflight_edge.verify import verify

KEYS = (
    "target_class acc asr asr_estimated tpr fpr sia sia_flagged auroc tpr_at_fpr01 tpr_at_fpr05 tpr_alpha01 "
    "fpr_alpha01 tpr_alpha05 fpr_alpha05 acc_source n_clean n_triggered "
    "engine_ms_p50 engine_ms_p99 scorer_us_p50 scorer_us_p99 seconds"
)


def test_digits_are_split_without_overlap() -> None:
    labels = load_digits(8).labels
    parts = demo._split(labels, 0)
    joined = np.concatenate(parts)
    assert sorted(joined.tolist()) == list(range(len(labels)))
    for part, count in zip(parts[:2], (90, 50), strict=True):
        assert np.bincount(labels[part]).tolist() == [count] * 10
    assert np.bincount(labels[parts[2]]).min() > 30
    for a, b in zip(parts, demo._split(labels, 0), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(parts[0], demo._split(labels, 1)[0])


def test_exported_program_takes_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = make_network("lenet5", (1, 28, 28), 10)
    path = demo.export_program(network, (1, 28, 28), tmp_path / "lenet.pt2")
    assert path == tmp_path / "lenet.pt2"
    classifier = load_classifier(path, image_shape=(1, 28, 28))
    assert (classifier.fixed_batch, classifier.n_features) == (None, 84 + 120)
    for n_images in (1, 3):
        images = torch.rand(n_images, 1, 28, 28)
        with torch.no_grad():
            torch.testing.assert_close(classifier(images)[0], network.eval()(images))


@pytest.mark.parametrize("channels", [1, 3])
def test_picture(inspection: Inspection, victim: Poisoned, tmp_path: Path, channels: int) -> None:
    image = np.repeat(np.asarray(victim.test.images)[0], channels, axis=2)
    demo.save_picture(tmp_path / "patterns.png", image, victim.trigger, inspection, TARGET)
    with Image.open(tmp_path / "patterns.png") as picture:
        assert picture.size == (1200, 360)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20


def test_frames_to_judge(victim: Poisoned, tmp_path: Path) -> None:
    test = ImageSet(np.asarray(victim.test.images), np.resize([4, 9], len(victim.test)), None, "digits")
    demo.save_frames(tmp_path / "frames", test, victim.trigger)
    frames = {path.stem: read_image(path, channels=1)[..., None] for path in sorted((tmp_path / "frames").iterdir())}
    assert list(frames) == ["clean-4", "clean-9", "triggered-4"]
    images = np.asarray(test.images)
    np.testing.assert_array_equal(np.squeeze(frames["clean-4"]), images[0, :, :, 0])
    np.testing.assert_array_equal(np.squeeze(frames["clean-9"]), images[1, :, :, 0])
    np.testing.assert_array_equal(np.squeeze(frames["triggered-4"]), victim.trigger.embed(images[:1])[0, :, :, 0])


def test_held_out_frames_to_evaluate_on(victim: Poisoned, tmp_path: Path) -> None:
    demo.save_held_out(tmp_path, victim.test, victim.trigger, [0, 1])
    clean, triggered = (load_images(tmp_path / name) for name in ("held-out.npz", "triggered.npz"))
    np.testing.assert_array_equal(clean.images, victim.test.images)
    np.testing.assert_array_equal(clean.labels, victim.test.labels)
    of_sources = np.isin(victim.test.labels, [0, 1])
    np.testing.assert_array_equal(triggered.labels, victim.test.labels[of_sources])
    np.testing.assert_array_equal(triggered.images, victim.trigger.embed(np.asarray(victim.test.images)[of_sources]))


def test_measuring_writes_everything_and_names_every_figure(
    monkeypatch: pytest.MonkeyPatch, program: Path, inspection: Inspection, victim: Poisoned, tmp_path: Path
) -> None:
    def no_search(*_: Any, **__: Any) -> Inspection:
        return inspection

    monkeypatch.setattr(demo, "inspect", no_search)
    sources = [0, 1]
    figures = demo.measure(
        program, PREPROCESS, victim.trigger, sources, victim.defence, victim.test, tmp_path,
        started=time.perf_counter(), seed=0, progress=False,
    )  # fmt: skip
    assert " ".join(figures) == KEYS
    json.dumps(figures, allow_nan=False)
    assert figures["target_class"] == TARGET
    assert figures["tpr"] > 0.9
    assert figures["asr_estimated"] > 0.9
    assert 0 < figures["n_triggered"] <= np.isin(victim.test.labels, sources).sum()
    assert 0 < figures["n_clean"] <= (victim.test.labels == TARGET).sum()
    assert figures["engine_ms_p50"] <= figures["engine_ms_p99"]
    assert 0 < figures["scorer_us_p50"] <= figures["scorer_us_p99"]
    assert figures["seconds"] > 0
    assert {path.name for path in tmp_path.iterdir()} >= {"patterns.safetensors", "patterns.png", "bundle"}
    assert all(check.passed for check in verify(tmp_path / "bundle"))
    assert np.asarray(victim.test.images).shape[1:] == (SIZE, SIZE, 1)
