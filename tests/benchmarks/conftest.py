"""A classifier of seconds in the place of one of the paper's."""

from __future__ import annotations

from collections.abc import Iterator

import poisoned
import pytest

from benchmarks.paper.classifiers import Experiment
from inflight_edge.calibration import selection
from inflight_edge.calibration.selection import Candidate
from inflight_edge.calibration.train import Recipe


@pytest.fixture(scope="session")
def case() -> Experiment:
    victim = poisoned.poisoned()
    return Experiment(
        "digits",
        "digits", "tiny", "WB", "multi", 0, victim.network, poisoned.PREPROCESS, victim.trigger, victim.defence,
        victim.test, Recipe(1), victim.test, poisoned.TARGET,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_densities() -> Iterator[None]:
    """Two forms of density to choose between, for calibrations that are sooner done."""
    forms = [Candidate("shared", 1, 0.03), Candidate("full", 1, 0.1, 0.5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "candidates", lambda *_: forms)
        yield
