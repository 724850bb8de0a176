"""Its presence puts this folder on the import path of every test below it: ``from guards import random_guard``."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2022)
