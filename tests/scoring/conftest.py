from __future__ import annotations

import pytest
from scorers import INSTRUCTION_SETS

from inflight_edge.scoring import instruction_sets


@pytest.fixture(scope="module", params=[*INSTRUCTION_SETS, "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every behaviour test runs on every backend, the C scorer's instruction sets one by one: one definition, many twins.

    For make_scorer.
    """
    if request.param not in (*instruction_sets(), "reference"):
        pytest.skip(f"this processor or this build has no {request.param}")
    return request.param
