"""Where measurements that took long are kept between runs: operators' times, sensitivities, evaluated plans."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from compress.files.outputs import new_file

__all__ = ["cache_folder", "digest", "remembered"]


def cache_folder() -> Path:
    """``$COMPRESS_CACHE``, or ``compress`` in the user's cache folder. Everything in it may be deleted at any time."""
    own = os.environ.get("COMPRESS_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress"


def digest(content: object) -> str:
    """A short name for ``content``, which JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def remembered(kind: str, key: object, measure: Callable[[], float]) -> float:
    """The number that ``measure`` gave the first time it was called for ``key``."""
    path = cache_folder() / f"{kind}-{digest(key)}.json"
    if path.exists():
        try:
            return float(json.loads(path.read_text())["value"])
        except (ValueError, KeyError, TypeError):
            pass  # cut short when the machine went down: measured again
    value = measure()
    with new_file(path, "name a folder that can be written in COMPRESS_CACHE") as temporary:
        temporary.write_text(json.dumps({"key": key, "value": value}))
    return value
