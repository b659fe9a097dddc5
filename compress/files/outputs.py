"""What a run writes, put in its place whole or not at all: files, folders, and files that belong together.

Everything is written under a name of its own beside the place, brought to disk, and only then renamed.

- A **folder** in the place of another: the two change names in one step (``renameat2`` with ``RENAME_EXCHANGE``). Where
  the system cannot, the old one steps aside as ``.<name>.former``, the new one takes its name, the old one is deleted.
- **Files that belong together** are collected in a folder; renaming that to ``.<name>.ready`` is the step that decides.
  From then on they are moved out of it, the one that reads the others last.

A process may die between any two steps. :func:`claim`, with which every run begins, carries on: what was decided is
carried out, what was not is taken back, and nothing of it stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil

from compress.errors import InputError
from compress.files.known_folders import PLAN_FILE
from compress.files.lock import locked

__all__ = [
    "check_folder", "check_free", "claim", "claims", "kept", "new_file", "new_files", "new_folder", "remove_abandoned",
    "writing",
]  # fmt: skip

_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_UNKNOWN_THERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_ROOM, _ANOTHER = "free some space or ", "choose another --out"
_QUANTIZE = "compress quantize"
# Files of a work folder by which nothing is continued.
_WITHOUT_WORK = ("fingerprint", "parts.json", "preview", ".")
_kept: list[Path] = []

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Have ``path`` for this run alone until the block ends, and finish or take back what a dead run left half done.

    Raises:
        InputError: another run has it; or it is a symbolic link, or nothing can be written there.
    """
    if path.is_symlink():
        raise InputError(
            f"--out {path} is a symbolic link, to {os.readlink(path)}; give the name that it leads to, or another one"
        )
    if path.name in ("", ".."):
        raise InputError(f"--out {path} is the current folder or one around it; give a new folder's name")
    with contextlib.ExitStack() as held:
        with writing(path):
            held.enter_context(locked(path))
            _recover(path)
        try:
            yield
        except BaseException:
            _kept.extend(_work_of(path))
            with contextlib.suppress(OSError):  # there is something to go on with
                _beside(path, "work").rmdir()
            raise


def claims(parameter: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a verb, so that it begins with :func:`claim` of its ``parameter``, unless that is None."""

    def decorate(verb: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(verb)

        @wraps(verb)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            out = signature.bind(*args, **kwargs).arguments.get(parameter)
            if out is None:
                return verb(*args, **kwargs)
            with claim(Path(out)):
                return verb(*args, **kwargs)

        return run

    return decorate


def kept() -> bool:
    """Whether a run that ended early has left something that the same command continues with."""
    return any(place.exists() for place in _kept)


@contextmanager
def new_folder(path: Path, overwrite: bool, sign: str = PLAN_FILE, verb: str = _QUANTIZE) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its name when the block ends well, and goes when it does not.

    Raises:
        InputError: as :func:`check_folder` and :func:`claim`, or the disk is full or not writable.
    """
    with claim(path):
        check_folder(path, overwrite, sign, verb)
        with _collected(path) as temporary:
            yield temporary
            _share(temporary)
            _to_disk(temporary)
            _put(temporary, path)


@contextmanager
def new_file(path: Path, remedy: str = _ANOTHER) -> Iterator[Path]:
    """A temporary name beside ``path`` for a file that takes its place when the block ends well.

    The place is not locked: it may be one that several runs write, such as a cache.

    Args:
        remedy: what to do where it cannot be written.

    Raises:
        InputError: the disk is full or not writable.
    """
    temporary = _beside(path, f"{os.getpid()}.partial")
    try:
        with writing(path, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode  # safetensors gives its files to their owner alone
            yield temporary
            temporary.chmod(mode)
            _to_disk(temporary)
            os.replace(temporary, path)
            _to_disk(path.parent, whole=False)
    finally:
        with contextlib.suppress(OSError):  # where its folder could not even be made
            temporary.unlink(missing_ok=True)


@contextmanager
def new_files(path: Path) -> Iterator[Path]:
    """A temporary folder whose files take their places beside ``path``, all or none of them, when the block ends well.

    One of them is called as ``path``: it reads the others. An empty one says that there is to be none of its name.

    Raises:
        InputError: as :func:`claim`, or the disk is full or not writable.
    """
    with claim(path), _collected(path) as temporary:
        yield temporary
        _share(temporary)
        _to_disk(temporary)
        ready = _beside(path, "ready")
        os.replace(temporary, ready)
        _carry_out(ready, path)


@contextmanager
def _collected(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, which is gone when the block ends."""
    temporary = _beside(path, "partial")
    try:
        with writing(path):
            temporary.mkdir()
            yield temporary
    finally:
        _remove(temporary)


@contextmanager
def writing(path: Path, remedy: str = _ANOTHER) -> Iterator[None]:
    """The one sentence for whatever writing in the block fails with: Python's errors, torch's and safetensors'.

    Raises:
        InputError: naming ``path``, the reason, and what to do.
    """
    try:
        yield
    except OSError as error:
        room = _ROOM if error.errno in _NO_SPACE else ""
        raise InputError(f"cannot write {path}: {error.strerror or error}; {room}{remedy}") from error
    except Exception as error:
        reason = _failed_write(error)
        if reason is None:
            raise
        raise InputError(f"cannot write {path}: {reason}; {_ROOM}{remedy}") from error


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse an output that exists already, before any work is done."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another --out, or replace it with --overwrite")


def check_folder(path: Path, overwrite: bool, sign: str = PLAN_FILE, verb: str = _QUANTIZE) -> None:
    """Like :func:`check_free`, and refuse to replace what is not a folder of ours: it may hold anything.

    Args:
        sign: a file that every folder of ``verb`` holds.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is not set, or it is no folder of ``verb``, and not empty; or
            it is the current folder or one around it.
    """
    check_free(path, overwrite)
    if path.exists() and not (path.is_dir() and ((path / sign).is_file() or not any(path.iterdir()))):
        raise InputError(f"{path} is not a folder that `{verb}` has written, so --overwrite leaves it alone")
    # It would be taken away from under whoever stands in it.
    if Path.cwd().is_relative_to(path.resolve()):
        raise InputError(f"--out {path} is the current folder or one around it; give a new folder's name")


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f".{path.name}.{word}")


def _put(temporary: Path, path: Path) -> None:
    """Give ``temporary`` the place of ``path``, and delete what was there."""
    if not path.is_dir():
        os.replace(temporary, path)
    elif _exchange(temporary, path):
        _to_disk(path.parent, whole=False)
        _remove(temporary)  # the old one now
    else:
        former = _beside(path, "former")
        os.rename(path, former)
        os.rename(temporary, path)
        _to_disk(path.parent, whole=False)
        _remove(former)
    _to_disk(path.parent, whole=False)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN_THERE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _carry_out(ready: Path, path: Path) -> None:
    """Move the files of ``ready`` to their places; however often it was begun before."""
    others = sorted(file for file in ready.iterdir() if file.name != path.name)
    if others and path.is_file() and (ready / path.name).exists():
        path.unlink()  # it is not to be seen beside files that it was not written with
    for file in (*others, ready / path.name):
        place = path.with_name(file.name)
        if file.is_file() and not file.stat().st_size:
            place.unlink(missing_ok=True)
            file.unlink()
        elif file.exists():
            _put(file, place)
    _remove(ready)


def _recover(path: Path) -> None:
    """Finish, or take back, what a run that died has left of a publication; its lock is held."""
    former, ready = _beside(path, "former"), _beside(path, "ready")
    if former.exists():
        if path.exists():
            _remove(former)
        else:
            os.rename(former, path)
    if ready.is_dir():
        _carry_out(ready, path)
    _remove(_beside(path, "partial"))
    remove_abandoned(path.parent, glob.escape(path.name), alone=True)
    remove_abandoned(_beside(path, "work"), alone=True)


def remove_abandoned(folder: Path, name: str = "*", *, alone: bool = False) -> None:
    """Delete what :func:`new_file` was writing in ``folder``, as files that match ``name``, in processes that died.

    Args:
        alone: no other process can be writing there, so that a number that is another process's by now says nothing.
    """
    for left in folder.glob(f".{name}.*.partial"):
        writer = left.suffixes[-2].removeprefix(".")
        if writer.isdigit() and (alone or not psutil.pid_exists(int(writer))):
            _remove(left)


def _work_of(path: Path) -> list[Path]:
    """What beside ``path`` a run that was stopped goes on with."""
    found = [each for each in _beside(path, "work").rglob("*") if not each.name.startswith(_WITHOUT_WORK)]
    return [each for each in (*found, _beside(path, PLAN_FILE)) if each.is_file()]


def _failed_write(error: Exception) -> str | None:
    """Why a library could not write, in its own words; None: it is another error."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "SafetensorError" and "os error" in text:
        return text.partition("I/O error: ")[2] or text
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        return "torch could not write all of it"
    return None


def _to_disk(path: Path, whole: bool = True) -> None:
    """Bring a file, or a folder with all (``whole``) that is in it, to the disk."""
    for each in (*(path.rglob("*") if whole and path.is_dir() else ()), path):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems have no fsync of folders
                raise
        finally:
            os.close(descriptor)


def _share(folder: Path) -> None:
    """Give all files in ``folder`` the usual mode: safetensors gives its own to their owner alone."""
    usual = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | usual)


def _remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
