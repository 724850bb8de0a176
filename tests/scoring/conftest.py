from __future__ import annotations

import pytest
from scorers import DEVICES, EMULATED, INSTRUCTION_SETS

from inflight_edge.errors import DependencyError
from inflight_edge.scoring import instruction_sets

BACKENDS = [*INSTRUCTION_SETS, "reference", *EMULATED, *(pytest.param(name, marks=pytest.mark.gpu) for name in DEVICES)]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every behaviour test runs on every backend, the C scorer's instruction sets one by one: one definition, many twins.

    cuda and triton run emulated, and on a device where there is one.  For make_scorer.
    """
    name: str = request.param
    if name in INSTRUCTION_SETS and name not in instruction_sets():
        pytest.skip(f"this processor or this build has no {name}")
    reason = None
    if name in EMULATED:
        from emulated import why_not

        reason = why_not(name)
    elif name in DEVICES:
        from inflight_edge.scoring import cuda, triton

        try:
            (cuda if name == "cuda-gpu" else triton).check()
        except DependencyError as error:
            reason = str(error)
    if reason:
        pytest.skip(reason)
    return name
