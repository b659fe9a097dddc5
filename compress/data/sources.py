"""Where samples come from: files, mappings, iterables and the user's own functions, to arrays by name.

Nothing is unpickled: .npy and .npz without objects, .pt by compress.models.torchfile.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from compress.data.distilled import Normalisation, own_normalisation
from compress.data.text import TEXT_SUFFIXES
from compress.errors import InputError, one_line
from compress.files.known_folders import lookalike
from compress.models.growth import check_archive
from compress.models.torchfile import read_safely
from compress.models.user_code import import_object, user_code

__all__ = ["LABEL_KEYS", "SYNTHETIC", "Array", "Found", "check_lengths", "open_source"]

# Asks for made inputs in the place of samples (compress/data/synthetic.py), where a verb can use some.
SYNTHETIC = "synthetic"
_INPUT_KEYS = ("images", "x", "inputs", "input", "data")
LABEL_KEYS = ("labels", "y", "targets", "label", "target")
_SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".safetensors")
_SPARE = 1 << 30  # images of one colour are samples, too
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

Array = np.ndarray | torch.Tensor


@dataclass
class Found:
    """What a source holds before selection and conversion: [N, ...] arrays of any dtype by name.

    ``names`` are the parameters to hand the inputs over by; () for by position. ``distilled`` is what a distilled set
    was normalised with; None for others.
    """

    inputs: list[tuple[str, Array]]
    labels: Array | None
    keys: list[str]
    notes: list[str]
    names: tuple[str, ...] = ()
    distilled: Normalisation | None = None


def open_source(source: object, limit: int | None = None, parameters: Sequence[str] = ()) -> tuple[str, Found | Path]:
    """A name for messages, and the arrays, or the path of a folder of pictures or a file of text.

    Args:
        limit: how many samples to read of an iterable, which may never end.
        parameters: of the model's ``forward``; arrays of these names are its inputs.
    """
    if isinstance(source, str) and _FUNCTION.fullmatch(source) and not Path(source).exists():
        function = import_object(source, "the data function")
        if not callable(function):
            raise InputError(f"{source} is a {type(function).__name__}, not a function that returns samples.")
        with user_code():
            try:
                return source, _from_object(function(), source, limit, parameters)
            except InputError:
                raise
            except (Exception, SystemExit) as error:
                raise InputError(f"{source} raised {one_line(error)}; it is called without arguments.") from error
    if not isinstance(source, str | Path):
        return "the samples given", _from_object(source, "the samples given", limit, parameters)
    path = Path(source)
    if mistaken := lookalike(path):  # the picture in a folder of ours would be read as a sample, a delta as an array
        raise InputError(mistaken)
    if path.is_dir():
        return str(path), path
    if not path.exists():
        if source == SYNTHETIC:
            raise InputError(
                f"{SYNTHETIC}: inputs without labels are made for the --calib of quantize, allocate, apply, sweep and "
                "lowrank truncate alone; give samples"
            )
        raise InputError(f"There is no file or folder {path}; check the path, or give package.module:function.")
    if path.suffix.lower() in TEXT_SUFFIXES:
        return str(path), path
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"{path} ends in {path.suffix!r}; samples come from {', '.join(_SUFFIXES)}, a folder of pictures, "
            f"text ({', '.join(TEXT_SUFFIXES)}) for a Hugging Face model, or package.module:function."
        )
    return str(path), _from_object(_read(path), str(path), limit, parameters)


def _read(path: Path) -> object:
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if suffix == ".npz":
            with zipfile.ZipFile(path) as members:
                check_archive(path, members, _SPARE)
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        if suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return read_safely(path)
    except Exception as error:
        if suffix == ".npz" and isinstance(error, InputError):
            raise
        if suffix in (".npy", ".npz") and ("pickle" in str(error) or "Python object" in str(error)):
            raise InputError(
                f"{path} holds pickled Python objects, which are not read because they can run code; save a plain "
                "array of numbers."
            ) from error
        if suffix in (".npy", ".npz", ".safetensors") or isinstance(error, zipfile.BadZipFile | EOFError):
            raise InputError(f"{path} is empty, truncated or damaged ({one_line(error)}); write it again.") from error
        raise InputError(
            f"{path} could not be read safely; save a tensor, a tuple (x, y) or a dict of tensors with torch.save."
        ) from error


def _from_object(content: object, name: str, limit: int | None, parameters: Sequence[str]) -> Found:
    if isinstance(content, np.ndarray | torch.Tensor):
        return Found([("the array", content)], None, ["the array"], [])
    if isinstance(content, Mapping):
        return replace(_from_mapping(content, name, parameters), distilled=own_normalisation(content))
    if isinstance(content, tuple) and content and all(isinstance(x, np.ndarray | torch.Tensor) for x in content):
        # The last of several is the labels when it has one number for each sample.
        *xs, last = content
        has_labels = bool(xs) and last.ndim in (1, 2) and math.prod(last.shape) == len(xs[0])
        xs = xs if has_labels else [*xs, last]
        named = [(f"array {i}", x) for i, x in enumerate(xs)]
        return Found(named, last if has_labels else None, [key for key, _ in named], [])
    if isinstance(content, torch.utils.data.Dataset) or not isinstance(content, Iterable) or isinstance(content, str):
        raise InputError(
            f"{name} gave a {type(content).__name__}; samples are an array, a tuple (x, y), a dict of arrays or an "
            "iterable of batches (for a Dataset: a DataLoader)."
        )
    return _from_batches(content, name, limit, parameters)


def _from_mapping(content: Mapping[object, object], name: str, parameters: Sequence[str]) -> Found:
    arrays = {
        str(key): value if isinstance(value, torch.Tensor) else np.asarray(value)
        for key, value in content.items()
        if isinstance(value, np.ndarray | torch.Tensor | list)
    }
    by_lower = {key.lower(): key for key in arrays}
    # A name that the model's forward has is an input, but for "labels", which Hugging Face's models take for training.
    label_key = next(
        (by_lower[key] for key in LABEL_KEYS if key in by_lower and (key == "labels" or key not in parameters)), None
    )
    named = [each for each in parameters if each in arrays and each != label_key]
    if named:
        rest = [key for key in arrays if key not in (*named, label_key)]
        notes = [f"not used: {', '.join(rest)}"] if rest else []
        # By position where that comes to the same: a graph takes its inputs so.
        by_name = tuple(named) if tuple(named) != tuple(parameters[: len(named)]) else ()
        inputs = [(each, arrays[each]) for each in named]
        return Found(inputs, None if label_key is None else arrays[label_key], list(arrays), notes, by_name)
    known = [by_lower[key] for key in _INPUT_KEYS if key in by_lower]
    others = [key for key in arrays if key != label_key]
    if not others:
        raise InputError(
            f"{name} holds no samples (found: {', '.join(map(str, content)) or 'nothing'}); name the array "
            f"{' or '.join(_INPUT_KEYS[:2])}."
        )
    key = (known or others)[0]
    rest = [other for other in others if other != key]
    notes = [f"the array {key} was taken as the input; not used: {', '.join(rest)}"] if rest else []
    labels = None if label_key is None else arrays[label_key]
    return Found([(key, arrays[key])], labels, list(arrays), notes)


def _from_batches(batches: Iterable[object], name: str, limit: int | None, parameters: Sequence[str]) -> Found:
    """Batches put together; reading stops when `limit` samples are there, since an iterable may never end."""
    parts: list[Found] = []
    count = 0
    for batch in batches:
        content = tuple(batch) if isinstance(batch, list) else batch
        if not isinstance(content, tuple | Mapping | np.ndarray | torch.Tensor):
            raise InputError(
                f"{name} gave a batch of type {type(batch).__name__}; a batch is an array, a tuple (x, y) or a dict."
            )
        parts.append(_from_object(content, name, None, parameters))
        count += check_lengths(parts[-1], name)
        if limit is not None and count >= limit:
            break
    if not parts:
        raise InputError(f"{name} is empty: it gave no batch.")
    first = parts[0]
    stop = count if limit is None else min(limit, count)
    try:
        inputs: list[tuple[str, Array]] = [
            (key, torch.cat([torch.as_tensor(part.inputs[i][1]) for part in parts])[:stop])
            for i, (key, _) in enumerate(first.inputs)
        ]
        labelled = [torch.as_tensor(part.labels).reshape(-1) for part in parts if part.labels is not None]
        labels = torch.cat(labelled)[:stop] if len(labelled) == len(parts) else None
    except (RuntimeError, IndexError, TypeError) as error:
        raise InputError(f"{name}: its batches do not fit together ({one_line(error)}).") from error
    notes = [f"the first {stop} samples of the iterable"] if limit is not None else []
    return Found(inputs, labels, first.keys, first.notes + notes, first.names)


def check_lengths(found: Found, name: str) -> int:
    for key, array in found.inputs:
        if array.ndim == 0:
            raise InputError(f"{name}: {key} is a single number, not samples [N, ...].")
    key, first = found.inputs[0]
    count = len(first)
    if count == 0:
        raise InputError(f"{name} is empty: {key} has shape {list(first.shape)}.")
    for other, array in found.inputs[1:]:
        if len(array) != count:
            raise InputError(f"{name}: {key} has {count} samples and {other} {len(array)}; they must be as many.")
    if found.labels is not None and found.labels.ndim > 0 and len(found.labels) != count:
        raise InputError(f"{name}: {key} has {count} samples and there are {len(found.labels)} labels.")
    return count
