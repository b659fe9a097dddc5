"""What the command line says where something went wrong that nobody foresaw."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import traceback
from pathlib import Path

from compress.files.cache import cache_folder

__all__ = ["TRACEBACK", "describe_failure", "take_traceback_option"]

TRACEBACK = "--traceback"


def take_traceback_option(arguments: list[str]) -> bool:
    """Whether ``--traceback`` is among ``arguments``, before the verb or after it; it is taken out of them."""
    asked = TRACEBACK in arguments
    arguments[:] = [each for each in arguments if each != TRACEBACK]
    return asked


def describe_failure(error: Exception, arguments: list[str]) -> str:
    """One sentence about ``error``, with the file that its traceback was saved in.

    Args:
        arguments: of the command line, for that file.
    """
    if isinstance(error, MemoryError):
        what = "the machine's memory was not enough; fewer samples (--samples) or a smaller batch take less"
    elif isinstance(error, RecursionError):
        what = "the model or a file is nested more deeply than Python can follow"
    else:
        message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        kind = type(error).__name__
        what = f"compress failed where it should not have ({kind}{': ' if message else ''}{message.rstrip('.')})"
    saved = _save(error, arguments)
    if saved is None:
        return f"{what}; repeat the command with {TRACEBACK} to see where"
    return (
        f"{what}; where is in {saved}, and is printed with {TRACEBACK}. If it is a fault of compress, please report it"
    )


def _save(error: Exception, arguments: list[str]) -> Path | None:
    """The file with the traceback; None where none can be written."""
    now = datetime.datetime.now(datetime.UTC)
    path = cache_folder() / "tracebacks" / f"{now:%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    loaded = {name: sys.modules[name] for name in ("torch", "onnxruntime", "onnx") if name in sys.modules}
    versions = [f"{name} {getattr(module, '__version__', '?')}" for name, module in loaded.items()]
    lines = [
        f"compress {' '.join(arguments)}",
        f"Python {platform.python_version()}, {platform.platform()}, {', '.join(versions)}",
        "",
        *traceback.format_exception(error),
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
    except OSError:
        return None
    return path
