"""The whole path on scikit-learn's handwritten digits: poison, train, inspect, calibrate, judge every frame."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inflight_edge.bundle import write_bundle
from inflight_edge.calibration.attacks import Trigger, make_trigger, poison
from inflight_edge.calibration.calibrate import calibrate
from inflight_edge.calibration.datasets import ImageSet, load_digits
from inflight_edge.calibration.evaluate import evaluate, frame_latency
from inflight_edge.calibration.features import extract
from inflight_edge.calibration.inspection import Inspection, inspect
from inflight_edge.calibration.model import load_classifier
from inflight_edge.calibration.networks import make_network
from inflight_edge.calibration.reversal.estimates import PatchEstimate
from inflight_edge.calibration.threads import torch_threads
from inflight_edge.calibration.train import Recipe, train
from inflight_edge.detector import Detector
from inflight_edge.preprocess import Preprocess

__all__ = ["FIGURES", "export_program", "measure", "run_demo"]

TARGET = 9
N_TRAIN, N_DEFENCE = 90, 50
N_POISONED = 9
FIGURES = (
    "target_class",
    "acc",
    "asr",
    "asr_estimated",
    "tpr",
    "fpr",
    "sia",
    "sia_flagged",
    "auroc",
    "tpr_at_fpr01",
    "tpr_at_fpr05",
    "tpr_alpha01",
    "fpr_alpha01",
    "tpr_alpha05",
    "fpr_alpha05",
    "acc_source",
    "n_clean",
    "n_triggered",
    "engine_ms_p50",
    "engine_ms_p99",
    "scorer_us_p50",
    "scorer_us_p99",
    "seconds",
)
RECIPE = Recipe(epochs=60, max_rate=0.05, batch=32)


def run_demo(folder: Path, *, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Run everything, write classifier, inspection, bundle and picture into ``folder``; the figures."""
    with torch_threads(1):  # a network this small is no faster on more, and the result does not depend on their number
        return _run_demo(folder, seed, progress)


def _run_demo(folder: Path, seed: int, progress: bool) -> dict[str, Any]:
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    images = np.asarray(digits.images)
    training, defence, test = _split(digits.labels, seed)
    trigger = make_trigger("WB", (28, 28, 1))
    poisoned, labels = poison(
        images[training],
        digits.labels[training],
        trigger,
        target=TARGET,
        setting="multi",
        n_poisoned=N_POISONED,
        seed=seed,
    )
    preprocess = Preprocess((1, 28, 28))
    torch.manual_seed(seed)
    network = make_network("lenet5", (1, 28, 28), 10)
    train(network, poisoned, labels, preprocess, RECIPE, seed=seed, progress=progress)
    program = export_program(network, (1, 28, 28), folder / "classifier.pt2")
    np.savez(folder / "clean.npz", images=images[defence], labels=digits.labels[defence])
    sources = [c for c in range(10) if c != TARGET]
    held_out = digits.subset(test)
    save_frames(folder / "frames", held_out, trigger)
    save_held_out(folder, held_out, trigger, sources)
    return measure(
        program, preprocess, trigger, sources, digits.subset(defence), held_out, folder,
        started=started, seed=seed, progress=progress,
    )  # fmt: skip


def measure(
    program: Path,
    preprocess: Preprocess,
    trigger: Trigger,
    sources: list[int],
    defence: ImageSet,
    test: ImageSet,
    folder: Path,
    *,
    started: float,
    seed: int,
    progress: bool,
    inspection: Inspection | None = None,
    unlearn: str = "never",
) -> dict[str, Any]:
    """Inspect, calibrate, write the bundle and judge held-out frames: the library's path of every experiment.

    program  a .pt2 file.      trigger  the attacker's: it meets held-out frames only.   sources  classes it is put on.
    defence, test  clean images of the defender, and held-out ones of the same size.     started  perf_counter of the start.
    inspection  one that was made already of the same classifier and defence.     unlearn  see calibrate.
    Returns the figures; all but ``seconds`` are None where no class is suspected.
    """
    classifier = load_classifier(program, image_shape=defence.image_shape)
    if inspection is None:
        inspection = inspect(classifier, defence, preprocess, seed=seed, progress=progress)
    inspection.save(folder)
    if not inspection.suspects:
        return {**dict.fromkeys(FIGURES), "seconds": time.perf_counter() - started}
    bundle = calibrate(classifier, defence, inspection, unlearn=unlearn, seed=seed, progress=progress)
    write_bundle(bundle, folder / "bundle", overwrite=True)
    detector = Detector.load(folder / "bundle")
    target = inspection.suspects[0]
    chosen = test.subset(np.isin(test.labels, sources))
    stamped = ImageSet(trigger.embed(np.asarray(chosen.images)), chosen.labels, None, "triggered")
    figures = evaluate(detector, test, stamped, progress=progress).as_dict()
    embedded = inspection.estimates[target].embed(chosen.pixels(preprocess)).astype(np.uint8).transpose(0, 2, 3, 1)
    estimated = evaluate(
        detector, None, ImageSet(embedded, chosen.labels, None, "triggered by estimate"), progress=progress
    )
    frames = np.concatenate([np.asarray(test.images)[test.labels == target], np.asarray(stamped.images)])
    engine_ns, scorer_ns = frame_latency(detector, frames[:1000])
    save_picture(folder / "patterns.png", np.asarray(chosen.images)[0], trigger, inspection, target)
    figures |= {
        "target_class": target,
        "acc_source": float(
            (extract(classifier, chosen.pixels(preprocess), preprocess)[0].argmax(1) == chosen.labels).mean()
        ),
        "asr_estimated": estimated.asr if len(inspection.suspects) == 1 else None,
        "engine_ms_p50": float(np.percentile(engine_ns, 50) / 1e6),
        "engine_ms_p99": float(np.percentile(engine_ns, 99) / 1e6),
        "scorer_us_p50": float(np.percentile(scorer_ns, 50) / 1e3),
        "scorer_us_p99": float(np.percentile(scorer_ns, 99) / 1e3),
        "seconds": time.perf_counter() - started,
    }
    return {name: figures[name] for name in FIGURES}


def export_program(network: torch.nn.Module, image_shape: tuple[int, int, int], path: Path) -> Path:
    """Save a network as a torch.export program with a free batch size; the path."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network.eval(), (torch.zeros(2, *image_shape),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path


def save_frames(folder: Path, test: ImageSet, trigger: Trigger) -> None:
    """Three held-out frames to judge: a clean one of another class, a clean one of the target, the first with the trigger."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    images = np.asarray(test.images)
    other, target = (images[test.labels == label][:1] for label in (4, TARGET))
    for name, frame in (("clean-4", other), (f"clean-{TARGET}", target), ("triggered-4", trigger.embed(other))):
        Image.fromarray(frame[0, :, :, 0]).save(folder / f"{name}.png")


def save_held_out(folder: Path, test: ImageSet, trigger: Trigger, sources: list[int]) -> None:
    """Held-out images, clean and those of the source classes with the trigger, for ``evaluate``."""
    chosen = test.subset(np.isin(test.labels, sources))
    np.savez(folder / "held-out.npz", images=np.asarray(test.images), labels=test.labels)
    np.savez(folder / "triggered.npz", images=trigger.embed(np.asarray(chosen.images)), labels=chosen.labels)


def save_picture(path: Path, image: NDArray[np.uint8], trigger: Trigger, inspection: Inspection, target: int) -> None:
    """One picture: a clean image, the true trigger in it, the estimated pattern in it, and the estimated mask."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    estimate = inspection.estimates[target]
    panels = {
        "clean": image,
        "true trigger": trigger.embed(image[None])[0],
        "estimated pattern": estimate.embed(image.transpose(2, 0, 1)[None].astype(np.float32))[0].transpose(1, 2, 0)
        / 255,
    }
    if isinstance(estimate, PatchEstimate):
        panels["estimated mask"] = estimate.mask[:, :, None]
    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        gray = panel.shape[2] == 1
        axis.imshow(
            panel[:, :, 0] if gray else panel,
            cmap="gray" if gray else None,
            vmin=0,
            vmax=255 if panel.dtype == np.uint8 else 1,
        )
        axis.set_title(title)
        axis.set_axis_off()
    index = inspection.indices[target]
    figure.suptitle(
        f"target class {inspection.name(target)}: anomaly index {index:.2f}, {estimate.kind} of norm {estimate.norm:.1f}"
    )
    figure.savefig(path, dpi=120)


def _split(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Positions to train on, for the defender and to test on: never overlapping."""
    rng = np.random.default_rng(seed)
    parts: tuple[list[NDArray[np.int64]], ...] = ([], [], [])
    for label in range(10):
        order = rng.permutation(np.flatnonzero(labels == label))
        for part, members in zip(parts, np.split(order, [N_TRAIN, N_TRAIN + N_DEFENCE]), strict=True):
            part.append(members)
    training, defence, test = (np.concatenate(part) for part in parts)
    return training, defence, test
