"""Its presence puts this folder on the import path of every test below it: ``from guards import random_guard``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from command_lines import Files


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A command that a test runs in this process sets up the log; the next test's records must not wait in its queue."""
    logger = logging.getLogger("inflight_edge")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    from command_lines import Files  # trains a classifier with torch, which the device's tests do without

    return Files(tmp_path_factory.mktemp("user"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2022)
