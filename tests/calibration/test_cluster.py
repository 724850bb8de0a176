"""Calibration on other machines: a real Dask cluster of two worker processes gives the numbers of a serial run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest
from joblib import parallel_config

from inflight_edge.calibration.selection import Choice, candidates, select

distributed = pytest.importorskip("distributed", reason="needs Dask's distributed")
pytestmark = pytest.mark.filterwarnings("default")  # Dask's own


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def choose() -> Choice:
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(4), 30)
    features = (rng.standard_normal((120, 12)) + 2 * rng.standard_normal((4, 12))[labels]).astype(np.float32)
    return select(features, labels, 2, options=candidates(12, 4), progress=False)


@pytest.mark.parametrize("backend", ["dask", "loky"])
def test_folds_on_other_processes_give_the_same_numbers(cluster: object, backend: str) -> None:
    serial = choose()
    with parallel_config(backend=backend, n_jobs=2):
        spread = choose()
    assert [asdict(trial) for trial in spread.trials] == [asdict(trial) for trial in serial.trials]
    assert spread.reason == serial.reason
    np.testing.assert_array_equal(spread.clean_margins, serial.clean_margins)


def test_the_work_was_done_by_both_workers(cluster: object) -> None:
    with parallel_config(backend="dask"):
        choose()
    logs = cluster.scheduler_info()["workers"]  # type: ignore[attr-defined]
    assert len(logs) == 2
    done = cluster.run(lambda dask_worker: len(dask_worker.state.log))  # type: ignore[attr-defined]
    assert all(count > 0 for count in done.values())
