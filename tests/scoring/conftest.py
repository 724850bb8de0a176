from __future__ import annotations

import numpy as np
import pytest

from inflight_edge.scoring import Backend


@pytest.fixture(scope="module", params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every behaviour test runs on every backend: one definition, several twins."""
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2022)
