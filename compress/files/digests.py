"""Hashes of a finished folder's files, kept in its report: they find damage; whoever forges a file can forge its hash.

``plan.json`` and the times beside it have none: they are the user's to edit. ``graph.json`` says by ``report`` that
there is a report with hashes; folders from before that are read with a warning.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

from compress.errors import InputError
from compress.files.known_folders import PLAN_FILE, REPORT_FILE

__all__ = ["FIRST_WITH_HASHES", "REPORT_VERSION", "check_digests", "file_digests"]

REPORT_VERSION = 3
FIRST_WITH_HASHES = 2
_AGAIN = "copy the folder again as a whole, or compress the model again"
_USERS = (PLAN_FILE, "plan.latency.json", REPORT_FILE)


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in ``folder`` that nobody is to change, by name."""
    return {each.name: _sha256(each) for each in sorted(folder.iterdir()) if each.is_file() and each.name not in _USERS}


def check_digests(folder: Path, expected: bool) -> None:
    """Compare the files in ``folder`` with the hashes that its report has of them.

    Args:
        expected: whether the folder was written with hashes. If not, and there are none, that is a UserWarning.

    Raises:
        InputError: a file is missing, or is another one than was written; or there should be hashes and are none.
    """
    try:
        report = json.loads((folder / REPORT_FILE).read_text())
        known, version = report.get("files") or {}, report.get("schema_version", 1)
        if not isinstance(known, dict):
            raise ValueError(f"its files are a {type(known).__name__}")
        expected = expected or (isinstance(version, int) and version >= FIRST_WITH_HASHES)
    except FileNotFoundError:
        known = {}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / REPORT_FILE} is damaged ({error}); compress the model again") from error
    if not known and expected:
        raise InputError(f"{folder} has no hashes of its files in {REPORT_FILE}, with which it was written; {_AGAIN}")
    if not known:
        warnings.warn(
            f"{folder} is from before reports had hashes: whether its files are damaged is not known", stacklevel=3
        )
    for name, wanted in known.items():
        file = folder / name
        if not file.is_file():
            raise InputError(f"{folder} holds no {name}, which {REPORT_FILE} has a hash of; {_AGAIN}")
        if (found := _sha256(file)) != wanted:
            raise InputError(
                f"{file} is damaged, or was replaced: its SHA-256 is {found[:12]}, and in {REPORT_FILE} "
                f"{str(wanted)[:12]} (which finds damage, not forgery); {_AGAIN}"
            )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
