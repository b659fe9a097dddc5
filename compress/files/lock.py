"""One run at a time: the lock on a place that a run writes to, which dies with its process.

It is a file beside the place, ``.<name>.lock``, under flock(2): the kernel lets go of it however the process ends. The
file says who holds it, and goes when the run is over; one that was left behind holds nobody up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from compress.errors import InputError

__all__ = ["locked"]

_UNKNOWN_THERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# What this thread holds: a verb takes the lock first, and whoever writes for it takes it again.
_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` until the block ends; its parent folders are made, and go again if nothing came there.

    Raises:
        InputError: another run holds it; the message says which.
        OSError: the folder takes no files.
    """
    held, place = _HELD.get(), path.absolute()
    if place in held:
        yield
        return
    made = _make(place.parent)
    file = place.with_name(f".{place.name}.lock")
    descriptor = None
    try:
        descriptor = _acquire(file, path)
        token = _HELD.set(held | {place})
        try:
            yield
        finally:
            _HELD.reset(token)
    finally:
        if descriptor is not None:
            file.unlink(missing_ok=True)  # while it is held: nobody else may have it open and locked
            os.close(descriptor)
        for folder in made:
            with contextlib.suppress(OSError):  # something lies in it
                folder.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make ``folder`` and those around it; the ones that were not there, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
    return missing


def _acquire(file: Path, path: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have taken the file away meanwhile: then this is a lock on nothing.
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                os.ftruncate(descriptor, 0)
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                said = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
                os.pwrite(descriptor, json.dumps(said).encode(), 0)
                return descriptor
        except BlockingIOError as error:
            holder = _holder(os.pread(descriptor, 1000, 0))
            os.close(descriptor)
            raise InputError(
                f"{path} is being written by another run{holder}; wait for that to end, or choose another --out"
            ) from error
        except OSError as error:
            if error.errno not in _UNKNOWN_THERE:
                os.close(descriptor)
                raise
            warnings.warn(
                f"the file system of {path} knows no locks: see to it that no other run writes there",
                stacklevel=2,
            )
            return descriptor
        os.close(descriptor)


def _holder(content: bytes) -> str:
    try:
        said = json.loads(content)
        here = said["host"] == socket.gethostname()
        return f": process {said['process']}{'' if here else ' on ' + said['host']}, since {said['since']}"
    except (ValueError, LookupError, TypeError):
        return ", which has just begun"
