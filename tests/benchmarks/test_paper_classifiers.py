"""The faces of the paper, read from folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.paper.classifiers import DATASETS, FACE_SIZE, load
from inflight_edge import DataError


def people(folder: Path, count: int) -> None:
    for person in range(count):
        for photo in range(2):
            where = folder / f"person {person:02d}" / f"{photo}.png"
            where.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8 + photo, 12, 3), (10 * person, 20, 30), np.uint8)).save(where)


def test_pubfig_is_a_folder_for_each_person(tmp_path: Path) -> None:
    for part in ("train", "test"):
        people(tmp_path / "pubfig" / part, DATASETS["pubfig"].n_classes)
    for part in load("pubfig", tmp_path):
        assert part.image_shape == (3, FACE_SIZE, FACE_SIZE)
        np.testing.assert_array_equal(part.labels, np.repeat(np.arange(20), 2))
        np.testing.assert_array_equal(np.asarray(part.images)[7], np.full((FACE_SIZE, FACE_SIZE, 3), (30, 20, 30)))


def test_pubfig_that_is_another_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^{tmp_path}/pubfig/train: no such file or folder"):
        load("pubfig", tmp_path)
    people(tmp_path / "pubfig" / "train", 3)
    with pytest.raises(
        DataError, match=rf"^{tmp_path}/pubfig/train: expected a sub-folder for each of 20 people, got 3$"
    ):
        load("pubfig", tmp_path)
