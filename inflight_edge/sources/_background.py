"""A thread that waits for a camera, so that nobody else has to."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator

from inflight_edge.errors import InflightError, OptionError, SourceError
from inflight_edge.events import Frame

__all__ = ["Background", "CameraSource"]

# Frames that may wait for their reader; then the thread stops reading, and the connection holds the sender back.
_CAPACITY = 2


class Background:
    """Connects and reads in a thread of its own: ``open`` and ``read`` end in time, or at once when closed.

    A library's call that hangs keeps the thread, not the caller; the thread ends with that call, and releases there
    what it had opened.  Used once: another connection is another object.

    connect  opens, and returns the generator of the frames, whose close() releases everything.
    """

    def __init__(self, connect: Callable[[], Generator[Frame, None, None]], name: str) -> None:
        self._connect, self._name = connect, name
        self._changed = threading.Condition()
        self._frames: deque[Frame] = deque()
        self._connected = self._ended = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"source {name}", daemon=True)

    def open(self, timeout_s: float) -> None:
        """Wait until it is connected.  Raises what ``connect`` raised, or SourceError."""
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._connected or self._ended or self._closed, timeout_s)
            if self._closed:
                raise SourceError(f"{self._name}: closed while it was opened")
            if self._connected:
                return  # also when it has ended since: its frames wait, and the error behind them
            if self._error is not None:
                raise self._error
            raise SourceError(f"{self._name}: not connected within {timeout_s:g} s")

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame; None when it ended or was closed.  Raises SourceError when nothing came, or it broke off."""
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._ended or self._closed, timeout_s)
            if self._closed:
                return None
            if self._frames:
                frame = self._frames.popleft()
                self._changed.notify_all()
                return frame
            if self._error is not None:
                raise self._error
            if not self._ended:
                raise SourceError(f"{self._name}: no frame within {timeout_s:g} s")
            return None

    def close(self, patience_s: float = 0.5) -> None:
        """End it, and wait for the thread as long as is usual; it may hang in the library for longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(patience_s)

    def hangs(self) -> bool:
        """Whether its thread has not ended though it was closed."""
        return self._closed and self._thread.is_alive()

    def _run(self) -> None:
        try:
            frames = self._connect()
            try:
                with self._changed:
                    self._connected = True
                    self._changed.notify_all()
                for frame in frames:
                    if not self._put(frame):
                        break
            finally:
                frames.close()
        except InflightError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 - handed to the reader, who would wait for nothing else
            self._error = SourceError(f"{self._name}: {type(error).__name__}: {' '.join(str(error).split())}")
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, frame: Frame) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._frames) < _CAPACITY or self._closed)
            if not self._closed:
                self._frames.append(frame)
                self._changed.notify_all()
            return not self._closed


class CameraSource:
    """Base of the sources that PyAV reads from a camera; each ``open`` is a Background of its own.

    connect    see Background.
    timeout_s  to connect, and to wait for a frame, each.
    grace_s    longer that ``open`` waits, where the library keeps the time itself and can say more.
    """

    live = True

    def __init__(
        self, connect: Callable[[], Generator[Frame, None, None]], *, name: str, timeout_s: float, grace_s: float = 0.0
    ) -> None:
        if not 0.0 < timeout_s <= 3600.0:
            raise OptionError(f"{name}: timeout: expected seconds above 0, at most 3600, got {timeout_s}")
        self.name = name
        self._connect, self._timeout_s, self._grace_s = connect, timeout_s, grace_s
        self._background: Background | None = None

    def open(self) -> None:
        """Connect.  Raises SourceError within the timeout, or once closed; DependencyError."""
        self.close()
        background = self._background = Background(self._connect, self.name)
        try:
            background.open(self._timeout_s + self._grace_s)
        except BaseException:
            background.close()
            raise

    def read(self) -> Frame | None:
        """The next frame; None once closed.  Raises SourceError when it broke off or no frame came in time."""
        background = self._background
        return None if background is None else background.read(self._timeout_s)

    def close(self) -> None:
        """End the connection; a read or open that waits ends at once."""
        if self._background is not None:
            self._background.close()

    def hangs(self) -> bool:
        """Whether the last connection was closed and is still held, by a call of the library that does not end."""
        return self._background is not None and self._background.hangs()
