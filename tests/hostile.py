"""Files of torch.save made by hand: pickles that name and call what no saved model does."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

__all__ = ["call", "container", "name", "number", "pickled", "text", "with_weights", "write_exported"]


def name(dotted: str) -> bytes:
    """The opcode that asks for ``module.attribute``."""
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def call(dotted: str, *arguments: bytes, new: bool = False) -> bytes:
    """``dotted(*arguments)``, or ``dotted.__new__``."""
    return name(dotted) + b"(" + b"".join(arguments) + b"t" + (b"\x81" if new else b"R")


def pickled(body: bytes) -> bytes:
    """A whole pickle that leaves what ``body`` does."""
    return b"\x80\x02" + body + b"."


def with_weights(body: bytes, key: str = "state_dict") -> bytes:
    """A checkpoint: an empty dictionary of weights under ``key``, and beside it what ``body`` leaves."""
    return b"}(" + text(key) + b"}" + text("hyper_parameters") + body + b"u"


def container(file: Path, body: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A ``.pt`` with that pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m/data.pkl", pickled(body))
        archive.writestr("m/byteorder", "little")
        for key, content in (storages or {}).items():
            archive.writestr(f"m/data/{key}", content)
        archive.writestr("m/version", "3\n")
    return file


def write_exported(file: Path, expression: str) -> Path:
    """A ``.pt2`` that is read as far as its size expressions."""
    graph = {"graph_module": {"graph": {"tensor_values": {"x": {"sizes": [{"as_expr": {"expr_str": expression}}]}}}}}
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/archive_version", "0")
        archive.writestr("m/byteorder", "little")
        archive.writestr("m/version", "3\n")
        archive.writestr("m/models/model.json", json.dumps(graph))
    return file
