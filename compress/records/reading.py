"""Read a finished folder's ``report.json``, of this schema or an older one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.errors import InputError
from compress.files.digests import REPORT_VERSION
from compress.records.report import Report, StreamReport

__all__ = ["read_report", "read_stream_report"]

_RENAMED = {"parity": "export_check"}  # in version 3


def read_report(path: Path) -> Report:
    """The report in the file ``path``; what an older one does not say is None or empty.

    Raises:
        InputError: it is missing or damaged, or of a later version than this program reads.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); compress the model again") from error
    version = content.get("schema_version", 1) if isinstance(content, dict) else None
    if not isinstance(version, int) or not 1 <= version <= REPORT_VERSION:
        raise InputError(f"{path} has version {version!r}; this program reads 1 to {REPORT_VERSION}")
    if version < REPORT_VERSION:
        content = _renewed(content)
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; compress the model again"
        ) from error


def read_stream_report(path: Path) -> StreamReport | None:
    """The report of ``compress stream`` in the file ``path``; None where it is missing, or another report."""
    try:
        return StreamReport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a ValidationError is one
        return None


def _renewed(content: dict[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(name, name): value for name, value in content.items()}
