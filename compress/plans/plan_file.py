"""``plan.json``, and the times that decided beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import ValidationError

from compress.errors import InputError
from compress.files.known_folders import PLAN_FILE, read_json
from compress.files.outputs import new_file
from compress.records.layers import SCHEMA_VERSION
from compress.records.plan import Plan

__all__ = ["load_plan", "save_plan"]


def save_plan(plan: Plan, path: Path) -> None:
    """Write ``plan`` to the file ``path``, whole or not at all, and the times that decided beside it."""
    times = _times_of(path)
    times.unlink(missing_ok=True)  # of a plan that is replaced: either can be carried out without
    with new_file(path) as temporary:
        temporary.write_text(plan.model_dump_json(indent=2))
    if plan.latency_table is not None:
        with new_file(times) as temporary:
            temporary.write_text(plan.latency_table)


def _times_of(path: Path) -> Path:
    return path.with_suffix(".latency.json")


def load_plan(path: Path) -> Plan:
    """The plan in ``path``: a JSON file, or a folder with a ``plan.json``.

    Raises:
        InputError: it is missing or not a plan of this version.
    """
    file = path / PLAN_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist; `compress allocate` writes a plan, and so does `compress quantize`")
    content = read_json(file.parent, file.name)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{file} has version {content.get('schema_version')!r}; this program reads {SCHEMA_VERSION}")
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    times = _times_of(file)
    if plan.latency_sha256 is None or not times.is_file():
        return plan  # a plan without its table can be carried out as well
    text = times.read_text(encoding="utf-8", errors="replace")
    if hashlib.sha256(text.encode()).hexdigest() != plan.latency_sha256:
        raise InputError(
            f"{times} is damaged, or not the table that {file.name} was made by: its SHA-256 is not "
            f"{plan.latency_sha256[:12]}; put the right one there, or take it away"
        )
    return plan.model_copy(update={"latency_table": text})
