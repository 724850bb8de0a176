"""Delivery: what a sink says about losses is what is counted, whenever it says so."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest
from bundles import CLEAN_EAST, CLEAN_WEST
from outcomes import accepted, dropped
from pipelines import ListSink, ListSource, stub_detector

from inflight_edge import Pipeline, SinkError
from inflight_edge.delivery import Delivery

FRAMES = [CLEAN_WEST, CLEAN_EAST] * 3


class KeepingSink(ListSink):
    """Takes every outcome, and says in ``flush`` or ``close`` how many of them are lost."""

    def __init__(self, *, at_flush: tuple[int, ...] = (), at_close: int = 0) -> None:
        super().__init__(name="keeping")
        self._at_flush, self._at_close = list(at_flush), at_close

    def flush(self) -> None:
        super().flush()
        if self._at_flush and (lost := self._at_flush.pop(0)) >= 0:
            raise SinkError(f"{lost} outcome(s) lost: refused", lost=lost)

    def close(self) -> None:
        super().close()
        if self._at_close:
            raise SinkError(f"{self._at_close} outcome(s) lost: not acknowledged", lost=self._at_close)


@pytest.mark.parametrize(("at_flush", "at_close", "lost"), [((4,), 0, 4), ((), 5, 5), ((1,), 3, 4), ((0,), 0, 0)])
def test_outcomes_lost_after_they_were_taken_are_counted_as_many_as_the_sink_says(
    at_flush: tuple[int, ...], at_close: int, lost: int
) -> None:
    sink = KeepingSink(at_flush=at_flush, at_close=at_close)
    status = Pipeline(stub_detector(), [ListSource(FRAMES)], [sink]).run()
    assert status.lost == {"keeping": lost}


def test_sink_that_hangs_while_it_closes_has_lost_something() -> None:
    stuck = threading.Event()

    class Hanging(ListSink):
        def close(self) -> None:
            stuck.wait(30)

    pipeline = Pipeline(
        stub_detector(), [ListSource(FRAMES, live=True, hold=True)], [Hanging(name="hangs")], stop_seconds=0.2
    )
    pipeline.start()
    pipeline.stop()
    assert pipeline.join(5)
    stuck.set()
    assert pipeline.status().lost == {"hangs": 1}


def test_writing_on_does_not_say_that_what_was_refused_works_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inflight_edge")
    sink = KeepingSink(at_flush=(2, 3, -1))
    delivery = Delivery(sink, "keeping", 10, nudge=lambda: None)
    delivery._attempt(sink.flush, "flush")
    delivery._attempt(lambda: None, "write")
    delivery._attempt(sink.flush, "flush")
    assert [r.getMessage() for r in caplog.records] == [
        "sink keeping: 2 outcome(s) lost: refused (1 since the last line)"
    ]
    assert delivery.lost == 5
    delivery._attempt(sink.flush, "flush")
    assert caplog.records[-1].getMessage() == "sink keeping: works again, after 2 times"


def test_outcome_without_pixels_leaves_the_count_of_waiting_bytes_alone() -> None:
    """Several threads send these, one those with pixels: only that one may write the count."""

    class Guarded(Delivery):
        sealed = False

        def __setattr__(self, name: str, value: object) -> None:
            assert name != "_bytes_in" or not self.sealed
            super().__setattr__(name, value)

    delivery = Guarded(ListSink(), "kept", 10, nudge=lambda: None)
    delivery.offer(accepted(0), patient=False)
    counted = delivery._bytes_in
    assert counted > 0
    delivery.sealed = True
    bare = dropped(1)
    delivery.offer(replace(bare, frame=replace(bare.frame, pixels=None)), patient=False)
    assert (delivery._bytes_in, len(delivery)) == (counted, 2)
