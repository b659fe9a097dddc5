"""The command line: one file a verb, errors as one sentence, exit codes of compress.errors."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from compress.cli.allocate import allocate
from compress.cli.apply import apply
from compress.cli.bench import bench
from compress.cli.diff import diff
from compress.cli.distill import distill
from compress.cli.export import export
from compress.cli.failure import TRACEBACK, describe_failure, take_traceback_option
from compress.cli.inspect import inspect
from compress.cli.lowrank import app as lowrank
from compress.cli.quantize import quantize
from compress.cli.sparse import app as sparse
from compress.cli.stream import stream
from compress.cli.sweep import sweep
from compress.cli.verify import verify
from compress.errors import CompressError, FactoryError
from compress.files.outputs import kept

__all__ = ["app", "main"]

_KEPT = "; what is finished is kept, and the same command continues with it"
# How long an OpenMP thread that has nothing to do spins before it sleeps, as torch's libgomp is told.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

app = typer.Typer(
    name="compress",
    help="Compress PyTorch models and deploy them. No network, no telemetry.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from compress import __version__

        print(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version")
    ] = False,
    traceback: Annotated[  # for the help: main has taken it out of the arguments, wherever it stood
        bool, typer.Option(TRACEBACK, help="Print Python's traceback where a command fails, before or after the verb")
    ] = False,
) -> None:
    """Compress PyTorch models and deploy them. No network, no telemetry."""
    # Read once, as a verb imports torch. Where other work keeps a core busy, threads that spin take the time which the
    # one they wait for needs. `bench` measures what users get.
    if context.invoked_subcommand != "bench" and not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


for verb in (quantize, allocate, apply, sweep, diff, inspect, export, verify, bench, stream, distill):
    app.command(no_args_is_help=True)(verb)
app.add_typer(lowrank, name="lowrank")
app.add_typer(sparse, name="sparse")


def main() -> None:
    """Run the command line; whatever goes wrong becomes a sentence on stderr and an exit code.

    A :class:`CompressError` has its own; what nobody foresaw ends with 1, its traceback in a file.
    """
    with_traceback = take_traceback_option(sys.argv)
    with _listening() as asked:
        try:
            app(prog_name="compress")  # however it was started, so that a completion's script names the command
        except BaseException as error:
            # Whatever it has become on its way: typer makes an exit of it, and imports that it breaks off other errors.
            if asked or isinstance(error, KeyboardInterrupt):
                _stop(asked[0] if asked else signal.SIGINT)
            if not isinstance(error, Exception):
                raise
            if with_traceback:
                traceback.print_exc()
            _complain(_sentence(error))
            sys.exit(error.exit_code if isinstance(error, CompressError) else 2 if isinstance(error, OSError) else 1)


def _sentence(error: Exception) -> str:
    if isinstance(error, FactoryError):
        command = shlex.join(["compress", *sys.argv[1:]])
        return f"{error}: {command} --model package.module:factory"
    if isinstance(error, CompressError):
        return str(error)
    if isinstance(error, OSError):
        return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}{_remedy(error)}"
    return describe_failure(error, sys.argv[1:])


@contextmanager
def _listening() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; those that came. One that is ignored, as nohup has it, stays so."""
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    heard = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM) if main}
    heard = {each: before for each, before in heard.items() if before != signal.SIG_IGN}
    for each in heard:
        signal.signal(each, stop)
    try:
        yield came
    finally:
        for each, before in heard.items():
            signal.signal(each, before)


def _remedy(error: OSError) -> str:
    """What to do about it, where that is known."""
    from compress.files.cache import cache_folder

    if isinstance(error.filename, str) and Path(error.filename).is_relative_to(cache_folder()):
        return "; name a folder that can be written in COMPRESS_CACHE"
    return "; free some space, or choose another place with --out and TMPDIR" if error.errno in _NO_SPACE else ""


def _stop(number: int) -> NoReturn:
    _complain(f"stopped{_KEPT if kept() else ''}")
    # An interrupt that once left exec() of a string (dataclasses do that) would end the process by the signal, whatever
    # exit code is asked for, until another exec() of a string clears CPython's flag.
    exec("")
    sys.exit(128 + number)


def _complain(sentence: str) -> None:
    from rich.console import Console

    Console(stderr=True, emoji=False, soft_wrap=True, highlight=False).print(
        f"[bold red]error:[/] {_escaped(sentence)}"
    )


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
