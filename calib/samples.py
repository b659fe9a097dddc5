"""Calibration and evaluation samples from arrays, files, folders of pictures, and the user's own functions.

Every assumption made on the way (scaling, layout, normalisation, which array was taken) is a sentence in the notes.
Nothing is unpickled: .npy and .npz without objects, .pt with torch's weights_only reader.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from compress.calib.images import check_channels, from_bytes, list_images, normalise, read_images
from compress.errors import InputError
from compress.factory import import_object, one_line, user_code

__all__ = ["Samples", "load_samples"]

_INPUT_KEYS = ("images", "x", "inputs", "input", "data")
_LABEL_KEYS = ("labels", "y", "targets", "label", "target")
_SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".safetensors")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

_Array = np.ndarray | torch.Tensor


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs [N, ...] (one tensor for each input of the model, float32 or int64), labels [N] (int64 or float32)."""

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None
    source: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs[0])

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """The inputs in order, `size` samples at a time, the last batch shorter."""
        if size < 1:
            raise InputError(f"A batch of {size} samples is not possible; give at least 1.")
        for start in range(0, len(self), size):
            yield tuple(x[start : start + size] for x in self.inputs)

    def take(self, n: int | None, seed: int = 0) -> Samples:
        """A subset of n samples drawn without replacement, in the order they had; all of them for None.

        Raises:
            InputError: n is less than 1.
        """
        chosen, notes = _choose(len(self), n, seed, self.source)
        if chosen is None:
            return dataclasses.replace(self, notes=self.notes + notes)
        labels = None if self.labels is None else self.labels[chosen]
        return Samples(tuple(x[chosen] for x in self.inputs), labels, self.source, self.notes + notes)

    @property
    def fingerprint(self) -> str:
        """sha256 over the dtypes, shapes and bytes of inputs and labels."""
        digest = hashlib.sha256()
        for tensor in (*self.inputs, *(() if self.labels is None else (self.labels,))):
            digest.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            for row in tensor.split(256):
                digest.update(row.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass
class _Found:
    """What a source holds before selection and conversion: [N, ...] arrays of any dtype by name."""

    inputs: list[tuple[str, _Array]]
    labels: _Array | None
    keys: list[str]
    notes: list[str]


def load_samples(
    source: object,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    size: int | None = None,
    resize: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    labelled: bool = False,
) -> Samples:
    """Samples from an array, tensor, tuple (x, y), dict, Samples, DataLoader, path or "package.module:function".

    Bytes shaped [N, H, W, C] become float [N, C, H, W] in 0..1, then (x - mean) / std for each channel; float arrays
    are taken as they are unless mean or std is given. `size` and `resize` are for folders of pictures. `limit` keeps
    a seeded subset, chosen before anything is converted; of an iterable, the first ones.

    Raises:
        InputError: the source is missing, damaged, of an unknown kind, empty, pickled, not numeric or not finite; its
            labels are missing although `labelled`, or of another length; mean or std does not fit the channels.
    """
    means = [mean] if isinstance(mean, int | float) else mean
    stds = [std] if isinstance(std, int | float) else std
    name, found = _open(source, limit)
    if isinstance(found, Path):
        return _from_folder(found, means, stds, size, resize, limit, seed, labelled)
    notes = list(found.notes)
    if size is not None or resize is not None:
        notes.append("size and resize are for folders of pictures and were not used")
    count = _check_lengths(found, name)
    chosen, more = _choose(count, limit, seed, name)
    labels = _labels(found, name, labelled, notes)
    inputs = []
    for key, array in found.inputs:
        x = _rows(array, chosen, key, name)
        bytes_in = x.dtype == torch.uint8
        x, converted = _to_input(x)
        if x.is_floating_point():
            _check_finite(x, key, name, chosen)
            callers = isinstance(array, torch.Tensor) and array.data_ptr() == x.data_ptr()
            x = normalise(x.clone() if callers else x, means, stds)  # in place, never on the caller's own memory
        elif means is not None or stds is not None:
            raise InputError(f"{name}: mean and std are for images, and {key} holds whole numbers; leave them out.")
        if converted and bytes_in and x.ndim == 4:
            converted += ", " + _normalised(means, stds)
        notes += [f"{key}: {converted}"] if converted else []
        inputs.append(x)
    if labels is not None and chosen is not None:
        labels = labels[chosen]
    return Samples(tuple(inputs), labels, name, (*notes, *more))


def _normalised(mean: Sequence[float] | None, std: Sequence[float] | None) -> str:
    if mean is None and std is None:
        return "mean/std not given so none subtracted"
    return f"normalised with mean {list(mean or [0.0])} and std {list(std or [1.0])}"


def _choose(count: int, n: int | None, seed: int, name: str) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Sorted indices [n] of a subset without replacement, or None for all."""
    if n is not None and n < 1:
        raise InputError(f"{n} samples of {name} are not possible; ask for at least 1.")
    if n is None or n == count:
        return None, ()
    if n > count:
        return None, (f"all {count} samples were used",)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:n].sort().values, (f"{n} of {count} samples, chosen with seed {seed}",)


def _from_folder(
    folder: Path,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    size: int | None,
    resize: int | None,
    limit: int | None,
    seed: int,
    labelled: bool,
) -> Samples:
    files, numbers, how = list_images(folder)
    if labelled and numbers is None:
        raise InputError(
            f"{folder} has no labels: put the pictures into one sub-folder for each class, or begin every file name "
            "with the class number and an underscore."
        )
    chosen, more = _choose(len(files), limit, seed, str(folder))
    if chosen is not None:
        files = [files[i] for i in chosen.tolist()]
        numbers = None if numbers is None else [numbers[i] for i in chosen.tolist()]
    check_channels("mean", mean, 3)
    check_channels("std", std, 3)
    x, done = read_images(files, size=size, resize=resize)
    notes = [f"{done}, {_normalised(mean, std)}", *([how] if how else []), *more]
    labels = None if numbers is None else torch.tensor(numbers, dtype=torch.int64)
    return Samples((normalise(x, mean, std),), labels, str(folder), tuple(notes))


def _open(source: object, limit: int | None) -> tuple[str, _Found | Path]:
    """A name for messages, and the arrays, or the path of a folder of pictures."""
    if isinstance(source, str) and _FUNCTION.fullmatch(source) and not Path(source).exists():
        function = import_object(source, "the data function")
        if not callable(function):
            raise InputError(f"{source} is a {type(function).__name__}, not a function that returns samples.")
        with user_code():
            try:
                return source, _from_object(function(), source, limit)
            except InputError:
                raise
            except (Exception, SystemExit) as error:
                raise InputError(f"{source} raised {one_line(error)}; it is called without arguments.") from error
    if not isinstance(source, str | Path):
        return "the samples given", _from_object(source, "the samples given", limit)
    path = Path(source)
    if path.is_dir():
        return str(path), path
    if not path.exists():
        raise InputError(f"There is no file or folder {path}; check the path, or give package.module:function.")
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"{path} ends in {path.suffix!r}; samples come from {', '.join(_SUFFIXES)}, a folder of pictures, or "
            "package.module:function."
        )
    return str(path), _from_object(_read(path), str(path), limit)


def _read(path: Path) -> object:
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        if suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
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


def _from_object(content: object, name: str, limit: int | None) -> _Found:
    if isinstance(content, Samples):
        inputs: list[tuple[str, _Array]] = [(f"input {i}", x) for i, x in enumerate(content.inputs)]
        return _Found(inputs, content.labels, [key for key, _ in inputs], list(content.notes))
    if isinstance(content, np.ndarray | torch.Tensor):
        return _Found([("the array", content)], None, ["the array"], [])
    if isinstance(content, Mapping):
        return _from_mapping(content, name)
    if isinstance(content, tuple) and content and all(isinstance(x, np.ndarray | torch.Tensor) for x in content):
        # The last of several is the labels when it has one number for each sample.
        *xs, last = content
        has_labels = bool(xs) and last.ndim in (1, 2) and math.prod(last.shape) == len(xs[0])
        xs = xs if has_labels else [*xs, last]
        named = [(f"array {i}", x) for i, x in enumerate(xs)]
        return _Found(named, last if has_labels else None, [key for key, _ in named], [])
    if isinstance(content, torch.utils.data.Dataset) or not isinstance(content, Iterable) or isinstance(content, str):
        raise InputError(
            f"{name} gave a {type(content).__name__}; samples are an array, a tuple (x, y), a dict of arrays or an "
            "iterable of batches (for a Dataset: a DataLoader)."
        )
    return _from_batches(content, name, limit)


def _from_mapping(content: Mapping[object, object], name: str) -> _Found:
    arrays = {
        str(key): value if isinstance(value, torch.Tensor) else np.asarray(value)
        for key, value in content.items()
        if isinstance(value, np.ndarray | torch.Tensor | list)
    }
    by_lower = {key.lower(): key for key in arrays}
    label_key = next((by_lower[key] for key in _LABEL_KEYS if key in by_lower), None)
    known = [by_lower[key] for key in _INPUT_KEYS if key in by_lower]
    others = [key for key in arrays if key != label_key]
    if not others:
        raise InputError(
            f"{name} holds no samples (found: {', '.join(map(str, content)) or 'nothing'}); name the array "
            f"{' or '.join(_INPUT_KEYS[:2])}."
        )
    key = (known or others)[0]
    rest = [other for other in others if other != key]
    notes = [f"{key} was taken as the input, {', '.join(rest)} not used"] if rest else []
    labels = None if label_key is None else arrays[label_key]
    return _Found([(key, arrays[key])], labels, list(arrays), notes)


def _from_batches(batches: Iterable[object], name: str, limit: int | None) -> _Found:
    """Batches put together; reading stops when `limit` samples are there, since an iterable may never end."""
    parts: list[_Found] = []
    count = 0
    for batch in batches:
        content = tuple(batch) if isinstance(batch, list) else batch
        if not isinstance(content, tuple | Mapping | np.ndarray | torch.Tensor):
            raise InputError(
                f"{name} gave a batch of type {type(batch).__name__}; a batch is an array, a tuple (x, y) or a dict."
            )
        parts.append(_from_object(content, name, None))
        count += _check_lengths(parts[-1], name)
        if limit is not None and count >= limit:
            break
    if not parts:
        raise InputError(f"{name} is empty: it gave no batch.")
    first = parts[0]
    stop = count if limit is None else min(limit, count)
    try:
        inputs: list[tuple[str, _Array]] = [
            (key, torch.cat([torch.as_tensor(part.inputs[i][1]) for part in parts])[:stop])
            for i, (key, _) in enumerate(first.inputs)
        ]
        labelled = [torch.as_tensor(part.labels).reshape(-1) for part in parts if part.labels is not None]
        labels = torch.cat(labelled)[:stop] if len(labelled) == len(parts) else None
    except (RuntimeError, IndexError, TypeError) as error:
        raise InputError(f"{name}: its batches do not fit together ({one_line(error)}).") from error
    notes = [f"the first {stop} samples of the iterable"] if limit is not None else []
    return _Found(inputs, labels, first.keys, first.notes + notes)


def _check_lengths(found: _Found, name: str) -> int:
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


def _labels(found: _Found, name: str, labelled: bool, notes: list[str]) -> torch.Tensor | None:
    """Labels [N] as int64 or float32; unusable ones are an error only when they are needed."""
    if found.labels is None:
        if labelled:
            raise InputError(
                f"{name} has no labels (found: {', '.join(found.keys)}); name them {' or '.join(_LABEL_KEYS[:2])}."
            )
        return None
    labels = found.labels
    numeric = isinstance(labels, torch.Tensor) or labels.dtype.kind in "buif"
    single = labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)
    if not numeric or not single:
        problem = f"labels of {name} have shape {list(labels.shape)} and dtype {labels.dtype}, not one number a sample"
        if labelled:
            raise InputError(f"The {problem}; give class numbers [N].")
        notes.append(f"{problem}: not used")
        return None
    flat = _tensor(labels).reshape(-1)
    return flat.float() if flat.is_floating_point() else flat.to(torch.int64)


def _tensor(array: _Array) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.detach().cpu()
    # A copy: torch does not take read-only (memory-mapped), foreign-endian or negatively strided arrays.
    wide = {"u2": "i4", "u4": "i8", "u8": "i8"}.get(array.dtype.str[1:], array.dtype.newbyteorder("=").str)
    return torch.from_numpy(np.array(array, dtype=wide, order="C"))


def _rows(array: _Array, chosen: torch.Tensor | None, key: str, name: str) -> torch.Tensor:
    """The chosen rows as a tensor, of the dtype they have in the source."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "buif":
            raise InputError(f"{name}: {key} has dtype {array.dtype}, not numbers; save an array of one shape.")
        return _tensor(array if chosen is None else array[chosen.numpy()])
    if array.is_complex():
        raise InputError(f"{name}: {key} has dtype {array.dtype}; samples are real numbers.")
    return _tensor(array if chosen is None else array[chosen])


def _to_input(x: torch.Tensor) -> tuple[torch.Tensor, str]:
    """float32 or int64, and a sentence on what was assumed about bytes (empty for others)."""
    if x.is_floating_point():
        return x.float(), ""
    if x.dtype != torch.uint8:
        return x.to(torch.int64), ""
    if x.ndim == 4 and x.shape[3] in (1, 3, 4):
        return from_bytes(x), "uint8 NHWC images: scaled by 1/255, channels first"
    if x.ndim == 4 and x.shape[1] in (1, 3, 4):
        return x.float().div_(255), "uint8 NCHW images: scaled by 1/255"
    if x.ndim == 3:
        return from_bytes(x.unsqueeze(3)), "uint8 [N, H, W] images: one channel added, scaled by 1/255"
    return x.float(), f"uint8 of shape {list(x.shape)}, no images: taken as numbers, not scaled"


def _check_finite(x: torch.Tensor, key: str, name: str, chosen: torch.Tensor | None) -> None:
    bad = ~torch.isfinite(x)
    count = int(bad.sum())
    if count:
        row = int(bad.flatten(1).any(1).nonzero()[0]) if x.ndim > 1 else int(bad.nonzero()[0])
        index = row if chosen is None else int(chosen[row])
        raise InputError(
            f"{name}: {key} holds {count} values that are NaN or infinite, the first in sample {index}; remove or mend "
            "those samples."
        )
