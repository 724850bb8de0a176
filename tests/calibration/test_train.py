"""Training depends on the seed alone, and an interrupted run ends where an uninterrupted one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inflight_edge.calibration import train as module
from inflight_edge.calibration.train import Recipe, predict, train
from inflight_edge.errors import DataError
from inflight_edge.preprocess import Preprocess

RNG = np.random.default_rng(0)
LABELS = np.arange(60) % 3
IMAGES = (RNG.integers(0, 120, (60, 8, 8, 2)) + 60 * LABELS[:, None, None, None]).astype(np.uint8)
PREPROCESS = Preprocess((2, 8, 8), 1 / 255, (0.5, 0.4), (0.2, 0.3))
RECIPE = Recipe(epochs=4, low_epochs=1, max_rate=0.05, batch=16, crop=1, flip=True, label_smoothing=0.1)


class Small(nn.Module):
    """Any height and width; batch normalisation, so that the buffers count too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1))
        self.out = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.body(images).mean((2, 3)))


def run(recipe: Recipe = RECIPE, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    return train(Small(), IMAGES, LABELS, PREPROCESS, recipe, seed=seed, progress=False, **options)


def assert_same_weights(one: nn.Module, two: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_depends_on_the_seed_alone(bfloat16: bool) -> None:
    recipe = replace(RECIPE, bfloat16=bfloat16)
    one = run(recipe)
    torch.rand(5)  # the state of the global generator makes no difference
    assert_same_weights(one, run(recipe))
    other = run(recipe, seed=1)
    assert not torch.equal(one.get_parameter("out.weight"), other.get_parameter("out.weight"))
    assert not one.training


@pytest.mark.parametrize("there", [False, True])
def test_bfloat16_is_taken_where_the_processor_has_it(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: set[torch.dtype] = set()
    forward = Small.forward

    def watched(self: Small, images: Tensor) -> Tensor:
        logits = forward(self, images)
        kinds.add(logits.dtype)
        return logits

    monkeypatch.setattr(Small, "forward", watched)
    monkeypatch.setattr(module, "has_bfloat16", lambda: there)
    run(replace(RECIPE, bfloat16=True))
    assert kinds == {torch.bfloat16 if there else torch.float32}


def test_training_learns() -> None:
    network = run(Recipe(epochs=30, max_rate=0.2, batch=16))
    assert (predict(network, IMAGES, PREPROCESS) == LABELS).mean() > 0.9


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop_after: int
) -> None:
    checkpoint = tmp_path / "deep" / "run.ckpt"
    save = module._save

    def save_then_stop(path: Path, identity: Any, epoch: int, *rest: Any) -> None:
        save(path, identity, epoch, *rest)
        if epoch == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=checkpoint)
    resumed = run(checkpoint=checkpoint)
    assert_same_weights(resumed, run())
    assert [path.name for path in checkpoint.parent.iterdir()] == ["run.ckpt"]


def test_a_finished_run_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.ckpt"
    done = run(checkpoint=checkpoint)

    def refuse(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "_augment", refuse)
    torch.manual_seed(99)
    loaded = train(Small(), IMAGES, LABELS, PREPROCESS, RECIPE, seed=0, checkpoint=checkpoint, progress=False)
    assert_same_weights(loaded, done)
    assert not loaded.training


@pytest.mark.parametrize("change", ["recipe", "seed", "fewer images", "a pixel", "a label"])
def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path, change: str) -> None:
    checkpoint = tmp_path / "run.ckpt"
    run(replace(RECIPE, epochs=2, low_epochs=0), checkpoint=checkpoint)
    recipe, seed, images, labels = replace(RECIPE, epochs=2, low_epochs=0), 0, IMAGES.copy(), LABELS.copy()
    if change == "recipe":
        recipe = replace(recipe, max_rate=0.06)
    elif change == "seed":
        seed = 1
    elif change == "fewer images":
        images, labels = images[:59], labels[:59]
    elif change == "a pixel":
        images[3, 0, 0] ^= 1
    else:
        labels[3] ^= 1
    with pytest.raises(DataError, match=rf"^{checkpoint}: checkpoint of another run \(.*\), wanted .*; move it away"):
        train(Small(), images, labels, PREPROCESS, recipe, seed=seed, checkpoint=checkpoint, progress=False)


def test_prediction_is_the_largest_logit() -> None:
    network = Small().eval()
    with torch.no_grad():
        inputs = np.stack([PREPROCESS(image) for image in IMAGES])
        expected = network(torch.from_numpy(inputs)).argmax(1).numpy()
    for batch in (1, 7, 512):
        np.testing.assert_array_equal(predict(network, IMAGES, PREPROCESS, batch=batch), expected)


def test_images_are_shifted_and_flipped_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    augment = module._augment

    def watch(batch: Tensor, *rest: Any) -> Tensor:
        result = augment(batch, *rest)
        seen.append(result)
        return result

    monkeypatch.setattr(module, "_augment", watch)
    ramp = np.zeros((8, 8, 8, 2), np.uint8)
    ramp[..., 0] = np.arange(1, 65).reshape(8, 8)
    ramp[..., 1] = ramp[..., 0] + 100
    torch.manual_seed(0)
    recipe = Recipe(epochs=12, max_rate=0.01, batch=8, crop=2, flip=True)
    train(Small(), ramp, np.zeros(8, np.int64), PREPROCESS, recipe, seed=0, progress=False)
    padded = np.pad(ramp[0], ((2, 2), (2, 2), (0, 0)))
    flipped = np.pad(ramp[0, :, ::-1], ((2, 2), (2, 2), (0, 0)))
    allowed = {
        source[row : row + 8, column : column + 8].tobytes()
        for source in (padded, flipped)
        for row in range(5)
        for column in range(5)
    }
    got = {np.ascontiguousarray(image.permute(1, 2, 0).numpy()).tobytes() for batch in seen for image in batch}
    assert got <= allowed
    assert len(got) > 30  # of 50


def test_progress_is_told_on_standard_error_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run(replace(RECIPE, epochs=2, low_epochs=0))
    assert capsys.readouterr() == ("", "")
    recipe = replace(RECIPE, epochs=2, low_epochs=0)
    train(Small(), IMAGES, LABELS, PREPROCESS, recipe, seed=0, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "8/8" in captured.err


def test_rate_is_halved_instead_of_the_one_cycle_schedule() -> None:
    recipe = Recipe(epochs=5, max_rate=0.1, batch=16, halve_every=2)
    weight = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weight], lr=recipe.max_rate)
    schedule = module._schedule(optimiser, recipe, steps_per_epoch=3)
    rates = []
    for _ in range(15):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([0.1] * 6 + [0.05] * 6 + [0.025] * 3)
    assert_same_weights(run(recipe), run(recipe))


def test_a_checkpoint_of_before_an_option_existed_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "network.ckpt"
    done = run(checkpoint=path)
    state = torch.load(path, weights_only=True)
    del state["identity"]["recipe"]["halve_every"], state["identity"]["images"]
    torch.save(state, path)
    assert_same_weights(done, run(checkpoint=path))
