"""What the tests of the command line share: a user's files, and how a command is run; nothing here is a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import poisoned
import pytest
from bundles import written
from PIL import Image

from inflight_edge.calibration.datasets import ImageSet
from inflight_edge.cli import main

NAMES = ("zero", "one", "two", "three", "four", "five", "six")
NORMALISATION = ("--mean", "0.5", "--std", "0.5")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def write_folder(path: Path, data: ImageSet, n_each: int) -> Path:
    """PNG files under a folder per class; the names' alphabetical order is not that of the digits."""
    for i, image in enumerate(np.asarray(data.images)):
        folder = path / NAMES[data.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        if len(list(folder.iterdir())) < n_each:
            Image.fromarray(image[..., 0]).save(folder / f"{i:04}.png")
    return path


class Files:
    """What a user has on disk, made once: the poisoned classifier, its data, an inspection and a bundle."""

    def __init__(self, root: Path) -> None:
        victim = poisoned.poisoned()
        self.root = root
        self.model = poisoned.write_program(root / "model.pt2")
        self.data = poisoned.write_npz(root / "defence.npz", victim.defence)
        self.clean = poisoned.write_npz(root / "clean.npz", victim.test)
        self.triggered = poisoned.write_npz(root / "triggered.npz", victim.triggered)
        self.pattern = poisoned.inspected().save(root / "inspection")
        self.tiny = written(root / "tiny")
        self.frames = root / "frames.npz"
        np.savez(self.frames, images=np.zeros((2, 2, 2), np.uint8))
        self.empty = root / "empty.npz"
        np.savez(self.empty, images=np.zeros((0, 2, 2), np.uint8))
        self.text = root / "notes.txt"
        self.text.write_text("not what you want\n")


def output(capsys: pytest.CaptureFixture[str]) -> str:
    """Standard output; nothing may be on standard error."""
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith("inflight-edge")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert "Traceback" not in captured.err
    return captured.err
