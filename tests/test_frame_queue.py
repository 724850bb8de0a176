"""The queue of frames: bounded per camera, fair, and its policies."""

from __future__ import annotations

import threading
import time

import pytest
from pipelines import until

from inflight_edge import Frame, OptionError
from inflight_edge.frame_queue import FrameQueue


def frame(camera: str, index: int) -> Frame:
    return Frame(None, 0, camera=camera, index=index)


def indices(frames: list[Frame]) -> list[tuple[str, int]]:
    return [(f.camera, f.index) for f in frames]


def always() -> bool:
    return True


def test_policy_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="keep: expected one of newest, oldest, all, got 'some'"):
        FrameQueue({"a": "some"}, 2, always)  # type: ignore[dict-item]


def test_newest_drops_the_oldest_waiting_and_oldest_the_arriving() -> None:
    queue = FrameQueue({"new": "newest", "old": "oldest"}, 2, always)
    for camera, dropped in (("new", [0, 1]), ("old", [2, 3])):
        got = [queue.put(frame(camera, i)) for i in range(4)]
        assert [f.index for f in got if f] == dropped
    assert len(queue) == 4
    assert indices(queue.take(9)) == [("new", 2), ("old", 0), ("new", 3), ("old", 1)]


def test_cameras_are_served_in_turn_whatever_waits() -> None:
    queue = FrameQueue({"a": "newest", "b": "newest", "c": "newest"}, 3, always)
    for camera, n in (("a", 3), ("b", 1), ("c", 2)):
        for i in range(n):
            queue.put(frame(camera, i))
    assert indices(queue.take(2)) == [("a", 0), ("b", 0)]
    assert indices(queue.take(2)) == [("c", 0), ("a", 1)]
    assert indices(queue.take(2)) == [("c", 1), ("a", 2)]


def test_all_waits_until_there_is_place() -> None:
    queue = FrameQueue({"file": "all"}, 1, always)
    queue.put(frame("file", 0))
    done = threading.Event()

    def put() -> None:
        queue.put(frame("file", 1))
        done.set()

    threading.Thread(target=put, daemon=True).start()
    assert not done.wait(0.05)
    assert indices(queue.take(5)) == [("file", 0)]
    assert done.wait(5)
    assert indices(queue.take(5)) == [("file", 1)]


def test_frames_that_wait_are_taken_only_while_there_is_room() -> None:
    room = [False]
    queue = FrameQueue({"file": "all", "cam": "newest"}, 2, lambda: room[0])
    queue.put(frame("file", 0))
    queue.put(frame("cam", 0))
    assert indices(queue.take(5)) == [("cam", 0)]
    taken: list[Frame] = []
    thread = threading.Thread(target=lambda: taken.extend(queue.take(5)), daemon=True)
    thread.start()
    time.sleep(0.05)
    assert not taken
    room[0] = True
    queue.nudge()
    thread.join(5)
    assert indices(taken) == [("file", 0)]


def test_closed_queue_gives_what_waits_then_nothing_and_takes_nothing() -> None:
    queue = FrameQueue({"cam": "newest"}, 2, always)
    queue.put(frame("cam", 0))
    queue.close()
    late = frame("cam", 1)
    assert queue.put(late) is late
    assert indices(queue.take(1)) == [("cam", 0)]
    assert queue.take(1) == []


def test_release_lets_a_waiting_source_go_and_clear_empties() -> None:
    queue = FrameQueue({"file": "all"}, 1, always)
    queue.put(frame("file", 0))
    thread = threading.Thread(target=lambda: queue.put(frame("file", 1)), daemon=True)
    thread.start()
    queue.release()
    thread.join(5)
    until(lambda: len(queue) == 2)
    assert indices(queue.clear()) == [("file", 0), ("file", 1)]
    assert len(queue) == 0


def test_queue_of_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="queue: expected at least 1 frame, got 0"):
        FrameQueue({"cam": "newest"}, 0, always)
