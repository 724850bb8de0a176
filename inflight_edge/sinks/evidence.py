"""Flagged frames as PNG, each with its record beside it, in a folder of bounded size."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from inflight_edge._optional import require
from inflight_edge.errors import DataError, OptionError, SinkError
from inflight_edge.events import Context, Outcome
from inflight_edge.sinks._picture import picture
from inflight_edge.sinks.record import record, timestamp
from inflight_edge.uri import Uri, whole_number
from inflight_edge.verdict import Decision

__all__ = ["EvidenceSink", "from_address"]

_KINDS = (*(decision.value for decision in Decision), "drop")
# The number, not the time, says what is older: the clock of a device may jump.
_OURS = re.compile(
    rf"evidence-(\d{{8,}})-(?:[0-9TZ.]+|no_time)-[\w.]+-\d+-(?:{'|'.join(_KINDS)})\.(?:png|json)", re.ASCII
)
_HALF = re.compile(r"\.evidence-\d{8,}-[\w.-]+\.tmp", re.ASCII)


class EvidenceSink:
    """Writes ``evidence-NUMBER-TIME-CAMERA-INDEX-DECISION.png`` and ``.json``; the oldest go when the folder is full.

    Each file appears whole, the picture first.  Only files of this form are counted and removed, never others.  A
    frame without pixels has its JSON alone.

    max_bytes, max_files  of all evidence together.
    only                  decisions to keep, of accept, trigger, unguarded, invalid; and drop.
    """

    def __init__(
        self, folder: str, *, max_bytes: int = 1 << 30, max_files: int = 20_000,
        only: Iterable[str] = ("trigger", "invalid"),
    ) -> None:  # fmt: skip
        if not folder:
            raise OptionError("evidence: expected a folder, got none; write evidence:FOLDER")
        self.name = f"evidence:{folder}"
        self._folder = folder
        self._max_bytes, self._max_files = max_bytes, max_files
        self._only = frozenset(only)
        if not self._only or not self._only <= frozenset(_KINDS):
            raise OptionError(
                f"evidence: only: expected some of {', '.join(_KINDS)}, got {','.join(sorted(self._only))}"
            )
        self._context: Context | None = None
        self._lock = -1
        self._files: OrderedDict[str, int] = OrderedDict()  # bytes by name, the oldest first
        self._bytes = 0
        self._number = 0

    def open(self, context: Context) -> None:
        """Make the folder, or count what it holds.  Raises SinkError, DependencyError."""
        self._pillow = require("PIL.Image", "pip install 'inflight-edge[camera]'")
        try:
            os.makedirs(self._folder, exist_ok=True)
            self._lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._count()
        except BlockingIOError as error:
            self._release()
            raise SinkError(f"{self.name}: another process writes to it; give each its own folder") from error
        except OSError as error:
            self._release()
            raise SinkError(f"{self.name}: cannot be opened: {error.strerror or error}") from error
        self._context = context

    def _count(self) -> None:
        """Take stock of our files, remove halves that a kill left."""
        found, numbers = [], [-1]
        with os.scandir(self._folder) as entries:
            for entry in entries:
                ours = entry.is_file(follow_symlinks=False)
                if match := _OURS.fullmatch(entry.name):
                    numbers.append(int(match[1]))  # also of what is not ours, so that nothing is replaced
                    if ours:
                        found.append((numbers[-1], entry.name, entry.stat(follow_symlinks=False).st_size))
                elif ours and _HALF.fullmatch(entry.name):
                    os.unlink(entry.path)
        self._files = OrderedDict((name, size) for _, name, size in sorted(found))
        self._bytes = sum(self._files.values())
        self._number = max(numbers) + 1

    def write(self, outcome: Outcome) -> None:
        """Keep the outcome if it is of those to keep.  Raises SinkError when it is lost: disk full, a picture too large."""
        if self._context is None:
            raise SinkError(f"{self.name}: not open; call open first")
        kind = "drop" if outcome.verdict is None else outcome.verdict.decision.value
        if kind not in self._only:
            return
        frame = outcome.frame
        time = re.sub(r"[-:]", "", timestamp(outcome.wall_ns) or "no_time")
        camera = re.sub(r"[^\w.]", "_", frame.camera, flags=re.ASCII)[:40] or "camera"
        name = f"evidence-{self._number:08d}-{time}-{camera}-{max(frame.index, 0)}-{kind}"
        files = self._contents(name, outcome, self._context)
        size = sum(map(len, files.values()))
        if size > self._max_bytes or len(files) > self._max_files:
            raise SinkError(
                f"{self.name}: outcome lost: {size} bytes are more than the folder may hold; raise max_bytes"
            )
        try:
            while self._files and (
                self._bytes + size > self._max_bytes or len(self._files) + len(files) > self._max_files
            ):
                self._remove(next(iter(self._files)))
            for file, data in files.items():
                self._put(file, data)
            self._number += 1
        except OSError as error:
            for file in files.keys() & self._files.keys():
                self._remove(file)  # no picture without its record
            raise SinkError(f"{self.name}: outcome lost: {error.strerror or error}; make space") from error

    def _contents(self, name: str, outcome: Outcome, context: Context) -> dict[str, bytes]:
        frame = outcome.frame
        files: dict[str, bytes] = {}
        about: dict[str, Any] = {"picture": None, "colour": frame.colour, "shape": None, "bundle": context.bundle}
        if frame.pixels is not None:
            about["shape"] = list(frame.pixels.shape)
            try:
                files[f"{name}.png"] = self._png(outcome)
                about["picture"] = f"{name}.png"
            except DataError as error:
                about["problem_of_picture"] = str(error)
        everything = {**record(outcome, context), "class_names": list(context.class_names), **about}
        files[f"{name}.json"] = (json.dumps(everything, allow_nan=False, indent=1) + "\n").encode("ascii")
        return files

    def _png(self, outcome: Outcome) -> bytes:
        data = io.BytesIO()
        # A camera's noise leaves no repetitions to search for: a fifth faster than level 1, and no larger than level 6.
        self._pillow.fromarray(picture(outcome.frame)).save(data, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
        return data.getvalue()

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # somebody took it away, which makes as much room
            os.unlink(os.path.join(self._folder, name))
        self._bytes -= self._files.pop(name)

    def _put(self, name: str, data: bytes) -> None:
        """Write a file that is there whole or not at all, also after a loss of power."""
        half = os.path.join(self._folder, f".{os.path.splitext(name)[0]}.tmp")
        try:
            with open(half, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(half, os.path.join(self._folder, name))
        except OSError:
            with contextlib.suppress(OSError):  # the first error says more; the next open removes it
                os.unlink(half)
            raise
        self._files[name] = len(data)
        self._bytes += len(data)

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Let another process have the folder."""
        self._context = None
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def from_address(address: Uri) -> EvidenceSink:
    """evidence:FOLDER.  Raises OptionError."""
    sink = EvidenceSink(
        address.rest,
        max_bytes=address.take("max_bytes", whole_number(1), 1 << 30),
        max_files=address.take("max_files", whole_number(1), 20_000),
        only=address.take("only", lambda text: tuple(text.split(",")), ("trigger", "invalid")),
    )
    address.finish()
    return sink
