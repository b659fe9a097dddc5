"""THE form of ``delta.safetensors``; this module alone reads and writes it.

A delta file is a safetensors file: eight bytes of length, a JSON header, bytes. For every parameter NAME that the delta
adds to, whose entries are numbered from 0 in the order of its shape, the last dimension fastest, the file holds

- ``index/NAME``, uint8 [bytes]: which entries, increasing, in one of the codings of compress/sparse/gaps.py;
- ``values/NAME``, one number an entry, in that order: float64, float32, float16, bfloat16 or int8 [count].

What is added to an entry is its stored number times the parameter's ``scale``. For float16 that is a power of two which
puts the largest number just below 2^15, so that none overflows and few are subnormal; for int8 it is the largest
magnitude / 127; else it is 1. Zeros may be stored: an entry in the mask need not have moved.

``dense/NAME``, in any dtype and shape, replaces a tensor of the base whole: heads, and buffers that training changed.

The header's ``__metadata__`` has one string, ``compress.delta``: a SHA-256 in hexadecimal, a space, and JSON:

==============  =====================================================================================================
``version``     1
``kind``        ``delta``: values are added; ``undo``: values are what the entries were before, and replace them
``base``        hash of the base (compress/sparse/base.py); null: unknown
``without``     names of tensors that this hash leaves out: heads that are replaced; none in an ``undo``
``model``       ``undo`` only: hash of the whole model that it undoes
``k``           entries in all
``values``      ``fp64``, ``fp32``, ``fp16``, ``bf16`` or ``int8``
``tensors``     by NAME: ``shape``, ``dtype`` (of the base's tensor), ``count``, ``coding``, ``scale``
``notes``       strings by name: how the delta was made
==============  =====================================================================================================

The SHA-256 is over that JSON's bytes and then, by sorted key, every tensor's ``\\0key\\0dtype\\0shape\\0`` and bytes,
dtype and shape as torch and Python print them (``torch.uint8``, ``(3,)``). It tells damage and edits, not authors:
whoever can write the file can write its hash. Readers refuse a file whose hash, version, counts or indices are not as
said, or whose numbers are not finite, before anything is done with it.

Not promised: the order of tensors in the file, the smallest possible file, the same bytes from another version of this
program.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import InputError
from compress.files.outputs import new_file
from compress.records.layers import Record
from compress.sparse.delta import SparseDelta, SparseTensor
from compress.sparse.gaps import decode, encode

__all__ = ["VALUES", "Undo", "content_digest", "read_delta", "read_undo", "values_format", "write_delta", "write_undo"]

VALUES = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8,
}  # fmt: skip
_VERSION = 1
_HEADER = "compress.delta"
_A_MODEL = ". A model's layers are listed by `compress inspect`"


class _Stored(Record):
    shape: tuple[int, ...]
    dtype: str
    count: int
    coding: str
    scale: float


class _Header(Record):
    version: int
    kind: str
    base: str | None
    without: tuple[str, ...]
    model: str | None = None
    k: int
    values: str
    tensors: dict[str, _Stored]
    notes: dict[str, str] = Field({})


@dataclass(frozen=True, eq=False)
class Undo:
    """What a model was before deltas were applied: ``before.tensors`` hold the entries' former values.

    Attributes:
        model: hash of the model with the deltas.
        base: hash of the model before.
    """

    before: SparseDelta
    model: str
    base: str


def write_delta(delta: SparseDelta, path: str | os.PathLike[str], values: str = "fp16") -> Path:
    """Write ``delta`` to ``path``, whole or not at all.

    Args:
        values: how numbers are stored; ``fp64`` and ``fp32`` round least, ``int8`` is smallest.

    Raises:
        InputError: there is no such form, a number is not finite, or there is no room.
    """
    return _write(Path(path), "delta", delta, values, delta.base, None)


def write_undo(undo: Undo, path: str | os.PathLike[str]) -> Path:
    """Write ``undo`` to ``path``, whole or not at all, to the bit."""
    wide = any(each.values.dtype == torch.float64 for each in undo.before.tensors.values())
    return _write(Path(path), "undo", undo.before, "fp64" if wide else "fp32", undo.base, undo.model)


def read_delta(path: str | os.PathLike[str]) -> SparseDelta:
    """The delta in ``path``; values are float32, or float64 where the file has them.

    Raises:
        InputError: the file is missing, no delta, truncated, changed, of another version, or holds what cannot be.
    """
    return _read(Path(path), "delta")[1]


def read_undo(path: str | os.PathLike[str]) -> Undo:
    """What ``compress sparse apply`` wrote beside a model.

    Raises:
        InputError: as :func:`read_delta`.
    """
    header, before = _read(Path(path), "undo")
    if header.base is None or header.model is None:
        raise InputError(f"{path} does not say which model it undoes; apply the deltas again")
    return Undo(before, header.model, header.base)


def values_format(path: str | os.PathLike[str]) -> str:
    """How the numbers in the delta file ``path`` are stored."""
    return _header(Path(path))[0].values


def _write(path: Path, kind: str, delta: SparseDelta, values: str, base: str | None, model: str | None) -> Path:
    if values not in VALUES:
        raise InputError(f"values {values!r}: known are {', '.join(VALUES)}")
    tensors, table = {}, {}
    for name, each in delta.tensors.items():
        if not bool(each.values.isfinite().all()):
            raise InputError(f"{name} has a difference that is not finite; train it again with a smaller learning rate")
        stored, scale = _store(each.values, values)
        if not bool(stored.isfinite().all()):
            most = float(each.values.abs().max())
            raise InputError(f"{name} has a difference of {most:g}, too large for {values}; use fp64")
        coding, data = encode(each.index.numpy(), each.size)
        tensors[f"index/{name}"], tensors[f"values/{name}"] = torch.from_numpy(data), stored
        table[name] = _Stored(shape=each.shape, dtype=each.dtype, count=len(each.index), coding=coding, scale=scale)
    for name, whole in delta.dense.items():
        if whole.is_floating_point() and not bool(whole.isfinite().all()):
            raise InputError(f"{name} is not finite; train it again with a smaller learning rate")
        tensors[f"dense/{name}"] = whole.detach().cpu().contiguous()
    header = _Header(
        version=_VERSION, kind=kind, base=base, without=delta.without, model=model, k=delta.k, values=values,
        tensors=table, notes=delta.notes,
    ).model_dump_json()  # fmt: skip
    with new_file(path) as temporary:
        # One string: safetensors writes several in any order, and the same delta is to be the same bytes.
        save_file(tensors, temporary, {_HEADER: f"{content_digest(header, tensors)} {header}"})
    return path


def _store(values: Tensor, form: str) -> tuple[Tensor, float]:
    """``values`` [n] divided by a scale, in ``form``."""
    most = float(values.abs().max()) if len(values) else 0.0
    scale = 1.0
    if form == "fp16" and most:
        scale = 2.0 ** (math.frexp(most)[1] - 15)
    elif form == "int8" and most:
        scale = most / 127
    scaled = values.double() / scale
    return (scaled.round() if form == "int8" else scaled).to(VALUES[form]), scale


def _restored(stored: Tensor, scale: float) -> Tensor:
    if stored.dtype in (torch.float64, torch.float32):
        return stored
    wide = stored.float()
    return wide if scale == 1 else (wide.double() * scale).float()


def _header(path: Path) -> tuple[_Header, str, str]:
    if not path.is_file():
        raise InputError(f"There is no file {path}; `compress sparse train` writes a delta")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            strings = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or no safetensors file ({error}); get it again{_A_MODEL}") from error
    if _HEADER not in strings:
        raise InputError(f"{path} is a safetensors file but no delta; `compress sparse train` writes one{_A_MODEL}")
    digest, _, text = strings[_HEADER].partition(" ")
    try:
        version = json.loads(text).get("version")
        if version != _VERSION:
            raise InputError(f"{path} has version {version!r}; this program reads {_VERSION}")
        return _Header.model_validate_json(text), text, digest
    except (ValidationError, ValueError, AttributeError) as error:
        raise InputError(f"{path} was changed or damaged: its header cannot be read; get it again") from error


def _read(path: Path, kind: str) -> tuple[_Header, SparseDelta]:
    header, text, wanted = _header(path)
    if header.kind != kind:
        raise InputError(
            f"{path} takes deltas out of a model again, with `compress sparse revert`; give a delta itself"
            if kind == "delta"
            else f"{path} is a delta; give the .undo.safetensors that `compress sparse apply` wrote beside the model"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}); get it again") from error
    if content_digest(text, tensors) != wanted:
        raise InputError(f"{path} was changed or damaged since it was written (its SHA-256 differs); get it again")
    # From here on only a wrong writer can have made what is refused.
    found: dict[str, SparseTensor] = {}
    try:
        for name, each in header.tensors.items():
            found[name] = _sparse(each, tensors.pop(f"index/{name}"), tensors.pop(f"values/{name}"), header.values)
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: {name}: {error}; the program that wrote it does not follow the format") from error
    dense = {key.removeprefix("dense/"): each for key, each in tensors.items() if key.startswith("dense/")}
    for key, each in tensors.items():
        if not key.startswith("dense/"):
            raise InputError(f"{path}: {key} is in no table; the program that wrote it does not follow the format")
        if each.is_floating_point() and not bool(each.isfinite().all()):
            raise InputError(f"{path}: {key} holds numbers that are not finite; it cannot be applied")
    delta = SparseDelta(header.base, found, dense, header.notes, header.without)
    if delta.k != header.k:
        raise InputError(f"{path} has {delta.k:,} entries and says {header.k:,}; get it again")
    return header, delta


def _sparse(each: _Stored, data: Tensor, stored: Tensor, form: str) -> SparseTensor:
    if data.dtype != torch.uint8 or data.dim() != 1 or stored.dtype != VALUES.get(form) or stored.dim() != 1:
        raise ValueError(f"bytes and numbers in {form} are needed, in one dimension each")
    if len(stored) != each.count:
        raise ValueError(f"{len(stored):,} numbers for {each.count:,} entries")
    if any(size < 0 for size in each.shape) or not (math.isfinite(each.scale) and each.scale > 0):
        raise ValueError(f"shape {list(each.shape)} and scale {each.scale:g} cannot be")
    values = _restored(stored, each.scale)
    if not bool(values.isfinite().all()):
        raise ValueError("a number is not finite")
    index = decode(each.coding, data.numpy(), each.count, math.prod(each.shape))
    return SparseTensor(each.shape, each.dtype, torch.from_numpy(index), values)


def content_digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a header and tensors, in the order of their names."""
    digest = hashlib.sha256(header.encode())
    for key in sorted(tensors):
        each = tensors[key].contiguous()
        digest.update(f"\0{key}\0{each.dtype}\0{tuple(each.shape)}\0".encode())
        digest.update(each.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
