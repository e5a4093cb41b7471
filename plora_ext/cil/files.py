"""Files and folders that are whole whenever somebody looks; rows as the text of a CSV file."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError inside says which file or folder it is about: one of writing, as on a full disk, does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it appears whole or not at all, and stays thereafter, also when the machine stops.

    Folders that are missing above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with named(path), part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the renaming itself: files of before may go after this
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
                raise
        finally:
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row, under the names of all of them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keeps other runs from writing to `folder`; what a killed one left half-written there is removed.

    The lock is on the folder itself and ends with the process, however that ends.

    Raises:
        OSError: Another run is writing there.
    """
    lock = os.open(folder, os.O_RDONLY)
    _locks.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OSError(f"another run is writing to {folder}: choose another folder, or wait for it") from error
            # a file system without such locks: nothing to be done
        for left in folder.glob(".plora-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        _locks.discard(lock)
        os.close(lock)


_locks: set[int] = set()


def _let_go() -> None:
    """A data worker must not hold the lock of the run that it outlives."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_let_go)
