"""Its presence puts this folder on the import path of every test below it: ``from guards import random_guard``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from command_lines import Files


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    from command_lines import Files  # trains a classifier with torch, which the device's tests do without

    return Files(tmp_path_factory.mktemp("user"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2022)
