"""Calibration and evaluation samples from arrays, files, folders of pictures, and the user's own functions.

Every assumption made on the way (scaling, layout, normalisation, which array was taken) is a sentence in the notes.
Nothing is unpickled: .npy and .npz without objects, .pt by compress.models.torchfile.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from compress.data.distilled import require_same
from compress.data.images import check_channels, from_bytes, list_images, normalise, read_images
from compress.data.sources import LABEL_KEYS, Array, Found, check_lengths, open_source
from compress.data.text import TEXT_SUFFIXES, read_texts
from compress.errors import InputError
from compress.models.huggingface import TextReader

__all__ = ["Samples", "load_samples"]


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs [N, ...] (one tensor for each input of the model, float32 or int64), labels [N] (int64 or float32).

    ``names`` are the parameters of the model's ``forward`` that take the inputs; () where they go by position.
    """

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None
    source: str
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

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
        return Samples(tuple(x[chosen] for x in self.inputs), labels, self.source, self.notes + notes, self.names)

    @property
    def fingerprint(self) -> str:
        """sha256 over the dtypes, shapes and bytes of inputs and labels."""
        digest = hashlib.sha256(",".join(self.names).encode())
        for tensor in (*self.inputs, *(() if self.labels is None else (self.labels,))):
            digest.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            for row in tensor.split(256):
                digest.update(row.contiguous().numpy().data)
        return digest.hexdigest()


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
    parameters: Sequence[str] = (),
    text: TextReader | None = None,
    length: int | None = None,
) -> Samples:
    """Samples from an array, tensor, tuple (x, y), dict, Samples, DataLoader, path or "package.module:function".

    Bytes shaped [N, H, W, C] become float [N, C, H, W] in 0..1, then (x - mean) / std for each channel; float arrays
    are taken as they are unless mean or std is given, and a distilled set always. `size` and `resize` are for folders
    of pictures. `limit` keeps a seeded subset, chosen before anything is converted; of an iterable, the first ones.
    `parameters` are those of the model's forward(): arrays of their names are its inputs. `text` makes token ids of
    text files, at most `length` a sample.

    Raises:
        InputError: the source is missing, damaged, of an unknown kind, empty, pickled, not numeric or not finite; its
            labels are missing although `labelled`, or of another length; mean or std does not fit the channels.
    """
    means = [mean] if isinstance(mean, int | float) else mean
    stds = [std] if isinstance(std, int | float) else std
    name, found = (
        ("the samples given", _as_found(source))
        if isinstance(source, Samples)
        else open_source(source, limit, parameters)
    )
    if isinstance(found, Path) and found.suffix.lower() in TEXT_SUFFIXES:
        return _from_text(found, text, length, limit, seed, labelled)
    if isinstance(found, Path):
        return _from_folder(found, means, stds, size, resize, limit, seed, labelled)
    notes = list(found.notes)
    if size is not None or resize is not None:
        notes.append("size and resize are for folders of pictures and were not used")
    if found.distilled is not None and (means is not None or stds is not None):
        notes.append(require_same(found.distilled, means, stds, name))
        means = stds = None
    count = check_lengths(found, name)
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
    return Samples(tuple(inputs), labels, name, (*notes, *more), found.names)


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


def _as_found(samples: Samples) -> Found:
    inputs: list[tuple[str, Array]] = [(f"input {i}", x) for i, x in enumerate(samples.inputs)]
    return Found(inputs, samples.labels, [key for key, _ in inputs], list(samples.notes), samples.names)


def _from_text(
    path: Path, reader: TextReader | None, length: int | None, limit: int | None, seed: int, labelled: bool
) -> Samples:
    if reader is None:
        raise InputError(
            f"{path} is text, which takes the tokenizer of a Hugging Face model folder; give token ids in an .npz"
        )
    texts = read_texts(path)
    if labelled and texts.labels is None:
        raise InputError(f"{path} has no labels; give a .tsv or .csv with a column label")
    more: tuple[str, ...] = ()
    if not reader.causal:
        chosen, more = _choose(len(texts), limit, seed, str(path))
        texts = texts if chosen is None else texts.take(chosen)
    encoded = reader.encode(texts.first, length, texts.second)
    first = next(iter(encoded.values()))
    what = "text" if texts.second is None else "pairs of texts"
    notes = [f"{what} as {len(first)} samples of {first.shape[1]} tokens", *more]
    samples = Samples(tuple(encoded.values()), texts.labels, str(path), tuple(notes), reader.call_names(encoded))
    return samples.take(limit, seed) if reader.causal else samples


def _labels(found: Found, name: str, labelled: bool, notes: list[str]) -> torch.Tensor | None:
    """Labels [N] as int64 or float32; unusable ones are an error only when they are needed."""
    if found.labels is None:
        if labelled:
            raise InputError(
                f"{name} has no labels (found: {', '.join(found.keys)}); name them {' or '.join(LABEL_KEYS[:2])}."
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


def _tensor(array: Array) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.detach().cpu()
    # A copy: torch does not take read-only (memory-mapped), foreign-endian or negatively strided arrays.
    wide = {"u2": "i4", "u4": "i8", "u8": "i8"}.get(array.dtype.str[1:], array.dtype.newbyteorder("=").str)
    return torch.from_numpy(np.array(array, dtype=wide, order="C"))


def _rows(array: Array, chosen: torch.Tensor | None, key: str, name: str) -> torch.Tensor:
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
