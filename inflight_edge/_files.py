"""Folders of a few files: read without following links, written in one step."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from inflight_edge.errors import BundleError

__all__ = ["check_replaceable", "open_folder", "read_regular", "replace_file", "write_folder"]


@contextmanager
def open_folder(
    path: Path, names: frozenset[str], optional: frozenset[str] = frozenset()
) -> Iterator[tuple[int, frozenset[str]]]:
    """File descriptor of the folder ``path``, which must hold ``names`` and may hold ``optional``; the names it holds.

    ``path`` itself may be a symbolic link; what lies inside is opened relative to the descriptor, so that a
    folder exchanged in the meantime cannot mix two bundles.  Raises BundleError.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: expected a bundle folder, got {_cause(error)}") from error
    try:
        found = frozenset(os.listdir(folder))
        if missing := sorted(names - found):
            raise BundleError(f"{path}: expected the file {missing[0]}, got none; copy the whole bundle again")
        if extra := sorted(found - names - optional):
            raise BundleError(f"{path}: expected only {', '.join(sorted(names))}, got {extra[0]!r} too; remove it")
        yield folder, found
    finally:
        os.close(folder)


def read_regular(folder: int, where: Path, limit: int) -> bytes:
    """All bytes of the regular file ``where.name`` in ``folder``, at most ``limit`` of them.

    Refuses symbolic links, FIFOs, devices and folders.  Raises BundleError that names ``where``.
    """
    try:
        # O_NONBLOCK: opening a FIFO nobody writes to must not wait for ever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(where.name, flags, dir_fd=folder), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{where}: expected a regular file, got another kind; copy the bundle again")
            if status.st_size > limit:
                raise BundleError(
                    f"{where}: expected at most {limit} bytes, got {status.st_size}; copy the bundle again"
                )
            data = file.read(status.st_size + 1)
    except MemoryError as error:
        raise BundleError(f"{where}: expected a file that fits the memory, got {status.st_size} bytes") from error
    except IsADirectoryError as error:
        raise BundleError(f"{where}: expected a regular file, got a folder; copy the bundle again") from error
    except OSError as error:
        raise BundleError(f"{where}: expected a regular file, no link, got {_cause(error)}") from error
    if len(data) != status.st_size:
        raise BundleError(
            f"{where}: expected {status.st_size} bytes, got another length: it is being written; try again"
        )
    return data


def replace_file(folder: int, path: Path, data: bytes) -> None:
    """Write the file ``path`` into ``folder``, its open folder, in one step.  Raises BundleError.

    The new file is made beside the folder: a reader in the meantime finds no file it would not expect.
    """
    new = Path(os.path.realpath(path.parent)).parent / f".{path.name}.{secrets.token_hex(8)}.new"
    try:
        try:
            with open(new, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, path.name, dst_dir_fd=folder)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        os.fsync(folder)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written: {_cause(error)}") from error


def write_folder(
    path: Path, files: Mapping[str, bytes], *, overwrite: bool, optional: frozenset[str] = frozenset()
) -> None:
    """Write ``files`` (name to content) as the folder ``path``: all of them, on the disk, or nothing.

    An existing folder is replaced only with ``overwrite`` and only when it holds nothing but such files and
    ``optional`` ones, which go with it; it is moved aside first and moved back on failure.  Raises BundleError.
    """
    if os.path.lexists(path) and not overwrite:
        raise BundleError(f"{path}: expected no such file or folder, got one; choose another name or ask to overwrite")
    target = Path(os.path.realpath(path))
    token = secrets.token_hex(8)
    new, old = (target.parent / f".{target.name}.{token}.{part}" for part in ("new", "old"))
    try:
        if os.path.lexists(target):
            check_replaceable(target, frozenset(files) | optional)
        try:
            os.mkdir(new)
            for name, data in files.items():
                with open(new / name, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _sync_folder(new)
            _replace(target, new, old)
            _sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)  # the error that brought us here says more
            raise
        if os.path.lexists(old):
            shutil.rmtree(old)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written: {_cause(error)}") from error


def _replace(target: Path, new: Path, old: Path) -> None:
    """Rename ``new`` to ``target``; what was there becomes ``old``, or stays when the rename fails."""
    if not os.path.lexists(target):
        os.rename(new, target)
        return
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise


def check_replaceable(target: Path, names: frozenset[str]) -> None:
    """Refuse what is no folder, or one that holds other files than ``names``.  Raises BundleError."""
    remedy = "choose another name or remove it yourself"
    if not target.is_dir():
        raise BundleError(f"{target}: expected a bundle folder to overwrite, got a file; {remedy}")
    if extra := sorted(frozenset(os.listdir(target)) - names):
        raise BundleError(f"{target}: expected a bundle folder to overwrite, got one with {extra[0]!r}; {remedy}")


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _cause(error: Exception) -> str:
    """Text of an error without the path, which the caller names."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
