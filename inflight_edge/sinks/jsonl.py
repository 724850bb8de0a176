"""JSON lines to a file or to standard output: one line per outcome, handed to the system before the next one."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import sys
from typing import Literal, get_args

from inflight_edge.errors import OptionError, SinkError
from inflight_edge.events import Context, Outcome
from inflight_edge.sinks.record import encode
from inflight_edge.uri import Uri, one_of, whole_number

__all__ = ["JsonLinesSink", "Sync", "from_address"]

Sync = Literal["no", "flush", "line"]
_SYNCS: tuple[Sync, ...] = get_args(Sync)

# How long a reader of standard output may take no byte before an outcome is lost, in seconds.
_PATIENCE_S = 5.0


class JsonLinesSink:
    """Appends to a file; every outcome, drops too, is a line.

    A line is one write() to the system, so a killed process loses at most the line it was writing.  Half a line that
    a kill left is ended when the file is opened again.  A line that cannot be written whole (disk full) is taken back.

    path          "-" is standard output; a device or pipe is written to as it is, without rotation.
    rotate_bytes  the file never grows beyond; 0: it does.  PATH.1 is the newest old file.
    keep          old files that stay.
    fsync         when the line is on the disk, for a loss of power: "no" (when the system likes), "flush" (about once
                  a second), "line" (before the next frame is taken).
    """

    def __init__(self, path: str, *, rotate_bytes: int = 0, keep: int = 5, fsync: Sync = "no") -> None:
        if not path:
            raise OptionError("jsonl: expected a file, got none; write jsonl:FILE, or - for standard output")
        self.name = "stdout" if path == "-" else f"jsonl:{path}"
        self._path = path
        self._rotate_bytes, self._keep, self._fsync = rotate_bytes, keep, fsync
        self._context: Context | None = None
        self._file = -1
        self._regular = False
        self._size = 0  # bytes of the file, which only this process writes to
        self._torn = False  # the last bytes are half a line that could not be taken back
        self._rotation_error = ""

    def open(self, context: Context) -> None:
        """Open or make the file.  Raises SinkError, also when another process writes to it."""
        try:
            self._open()
        except OSError as error:
            raise self._error("cannot be opened", error) from error
        self._context = context

    def _open(self) -> None:
        if self._path == "-":
            sys.stdout.flush()
            file = os.dup(sys.stdout.fileno())
        else:
            # Not blocking: the open of a pipe that nobody reads would wait for ever; it is an error instead.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
            if os.path.exists(self._path) and not os.path.isfile(self._path):
                flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
            file = os.open(self._path, flags, 0o644)
        try:
            regular, size = self._path != "-" and stat.S_ISREG(os.fstat(file).st_mode), 0
            if regular:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":
                    size += os.write(file, b"\n")
                if self._fsync != "no":
                    _sync_folder(self._path)  # else a loss of power can take the new file's name
        except BaseException:
            os.close(file)
            raise
        # Together: where the new file is refused, what is known of the old one still holds.
        self._file, self._regular, self._size, self._torn = file, regular, size, False

    def write(self, outcome: Outcome) -> None:
        """Append the outcome's line.  Raises SinkError when it is lost: disk full, the reader of a pipe gone."""
        if self._context is None:
            raise SinkError(f"{self.name}: not open; call open first")
        line = encode(outcome, self._context) + b"\n"
        if self._regular and self._rotate_bytes and self._size > 0 and self._size + len(line) > self._rotate_bytes:
            self._rotate()
        self._append(line)
        if self._fsync == "line":
            self._sync()

    def _append(self, line: bytes) -> None:
        """Write the line whole, or leave the file as it was."""
        data = b"\n" + line if self._torn else line
        written = 0
        try:
            while written < len(data):
                written += self._write(data[written:])
        except OSError as error:
            if written and self._regular:
                try:
                    os.ftruncate(self._file, self._size)
                    written = 0
                except OSError:  # the first error says more; the half line stays and is ended before the next one
                    self._size += written
            if written:
                self._torn = True
            raise self._error("outcome lost", error) from error
        self._size += len(data)
        self._torn = False

    def _write(self, data: bytes) -> int:
        while True:
            try:
                return os.write(self._file, data)
            except BlockingIOError:
                if not select.select([], [self._file], [], _PATIENCE_S)[1]:
                    raise TimeoutError(errno.ETIMEDOUT, f"nothing was read for {_PATIENCE_S:g} s") from None

    def _rotate(self) -> None:
        """PATH becomes PATH.1, PATH.1 becomes PATH.2, up to the first free number; the oldest beyond ``keep`` goes.

        What fails is told by the next flush; until then the lines go on into the file that is open.
        """
        try:
            if self._fsync != "no":
                os.fsync(self._file)
            if not self._moved():  # else an earlier try came this far, or somebody else did it
                self._shift()
            self._reopen()
        except OSError as error:
            self._rotation_error = f"cannot be rotated: {_cause(error)}"

    def _shift(self) -> None:
        number = 1
        while number < self._keep and os.path.lexists(f"{self._path}.{number}"):
            number += 1
        for old in range(number, 1, -1):
            os.replace(f"{self._path}.{old - 1}", f"{self._path}.{old}")
        os.replace(self._path, f"{self._path}.1")

    def _reopen(self) -> None:
        before = self._file
        self._open()
        os.close(before)

    def flush(self) -> None:
        """Sync if asked to; follow the path when the file was moved or removed.  Raises SinkError."""
        if self._file < 0:
            return
        if self._regular:
            try:
                if self._moved():
                    self._reopen()
            except OSError as error:
                raise self._error("cannot be opened again", error, lost=0) from error
        if self._fsync == "flush":
            self._sync()
        if self._rotation_error:
            message, self._rotation_error = self._rotation_error, ""
            raise SinkError(f"{self.name}: {message}; lines go on into the same file", lost=0)

    def _moved(self) -> bool:
        """Whether the path names another file than the open one: somebody else rotated or removed it."""
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return True
        return not os.path.samestat(there, os.fstat(self._file))

    def _sync(self) -> None:
        if not self._regular:
            return
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise self._error("the last lines may not be on the disk", error) from error

    def close(self) -> None:
        """Sync if asked to, and close.  Raises SinkError when the last lines may be lost."""
        if self._file < 0:
            return
        try:
            if self._fsync != "no":
                self._sync()
        finally:
            file, self._file = self._file, -1
            self._context = None
            os.close(file)

    def _error(self, what: str, error: OSError, lost: int = 1) -> SinkError:
        cause = _cause(error)
        if error.errno == errno.EPIPE:
            cause = "the reader is gone"
        elif error.errno == errno.EWOULDBLOCK:
            cause = "another process writes to it; give each its own file"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cause += "; make space, the next outcomes are written again"
        return SinkError(f"{self.name}: {what}: {cause}", lost=lost)


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _cause(error: OSError) -> str:
    return error.strerror or str(error)


def from_address(address: Uri) -> JsonLinesSink:
    """jsonl:FILE, - for standard output.  Raises OptionError."""
    sink = JsonLinesSink(
        address.rest,
        rotate_bytes=address.take("rotate_bytes", whole_number(0), 0),
        keep=address.take("keep", whole_number(1, 10_000), 5),
        fsync=address.take("fsync", one_of(_SYNCS), "no"),
    )
    address.finish()
    return sink
