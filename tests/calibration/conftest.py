"""The tiny poisoned classifier of ``poisoned.py`` and what is made of it, once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import poisoned
import pytest

from inflight_edge.bundle import Bundle
from inflight_edge.calibration.inspection import Inspection
from inflight_edge.calibration.model import Classifier


@pytest.fixture(scope="session")
def victim() -> poisoned.Poisoned:
    return poisoned.poisoned()


@pytest.fixture(scope="session")
def classifier() -> Classifier:
    return poisoned.classifier()


@pytest.fixture(scope="session")
def inspection() -> Inspection:
    return poisoned.inspected()


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return poisoned.bundle()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poisoned.write_program(tmp_path_factory.mktemp("program") / "tiny.pt2")
