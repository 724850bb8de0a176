"""A classifier of seconds in the place of one of the paper's."""

from __future__ import annotations

import poisoned
import pytest

from benchmarks.paper.classifiers import Experiment
from inflight_edge.calibration.train import Recipe


@pytest.fixture(scope="session")
def case() -> Experiment:
    victim = poisoned.poisoned()
    return Experiment(
        "digits",
        "digits", "tiny", "WB", "multi", 0, victim.network, poisoned.PREPROCESS, victim.trigger, victim.defence,
        victim.test, Recipe(1), victim.test, poisoned.TARGET,
    )  # fmt: skip
