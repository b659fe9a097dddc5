"""Image files to float tensors [N, C, H, W]: a folder of pictures, and arrays of bytes with the channels last.

A folder's pictures have their shorter side resized (bilinear, antialiased), the centre cut out, and are scaled to
0..1; the usual evaluation of image classifiers. Labels come from class sub-folders or from the file names.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from compress.errors import InputError

__all__ = ["IMAGE_SUFFIXES", "check_channels", "from_bytes", "list_images", "normalise", "read_images"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_NUMBERED = re.compile(r"(\d+)[_-]")


def list_images(folder: Path) -> tuple[list[Path], list[int] | None, str | None]:
    """The pictures of a folder in a fixed order, their labels if it says any, and a sentence on how it says them.

    Raises:
        InputError: there is no picture in it.
    """
    direct = _pictures(folder)
    classes = sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith("."))
    grouped = [(part, _pictures(part)) for part in classes]
    grouped = [(part, files) for part, files in grouped if files]
    if direct and grouped:
        raise InputError(
            f"{folder} holds pictures both directly and in sub-folders ({grouped[0][0].name}, ...); keep one of the "
            "two."
        )
    if grouped:
        files = [file for _, group in grouped for file in group]
        labels = [label for label, (_, group) in enumerate(grouped) for _ in group]
        return files, labels, f"labels 0..{len(grouped) - 1} from the {len(grouped)} sub-folders in sorted order"
    if not direct:
        raise InputError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}); give the folder that does.")
    numbers = [_NUMBERED.match(file.name) for file in direct]
    if all(numbers):
        return direct, [int(n[1]) for n in numbers if n], "labels from the numbers at the start of the file names"
    return direct, None, None


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def read_images(files: Sequence[Path], *, size: int | None, resize: int | None) -> tuple[torch.Tensor, str]:
    """Pictures as float32 [N, 3, H, W] in 0..1 ([N, 1, H, W] when all are grey), and a sentence on what was done.

    With `size`, the shorter side becomes `resize` (default size * 256 / 224) and the centre size x size is cut out.

    Raises:
        InputError: a picture is damaged, too small for the cut, or has another size than the first without `size`.
    """
    if size is not None and resize is None:
        resize = round(size * 256 / 224)
    if size is not None and resize is not None and resize < size:
        raise InputError(f"--resize {resize} is smaller than --size {size}; the cut would not fit.")
    pixels: torch.Tensor | None = None
    modes: set[str] = set()
    for i, file in enumerate(files):
        picture = _open(file)
        modes.add(picture.mode)
        if resize is not None and min(picture.size) != resize:
            # Rounded down, and the cut below to the nearest pixel, as torchvision does.
            width, height = (int(resize * side / min(picture.size)) for side in picture.size)
            picture = picture.resize((width, height), PIL.Image.Resampling.BILINEAR)  # PIL antialiases when shrinking
        if size is not None:
            left, top = round((picture.size[0] - size) / 2), round((picture.size[1] - size) / 2)
            picture = picture.crop((left, top, left + size, top + size))
        array = torch.from_numpy(np.array(picture.convert("RGB")))  # [H, W, 3] uint8
        if pixels is None:
            pixels = torch.empty((len(files), *array.shape), dtype=torch.uint8)
        if array.shape != pixels.shape[1:]:
            raise InputError(
                f"{file} is {array.shape[1]}x{array.shape[0]} pixels and {files[0].name} is "
                f"{pixels.shape[2]}x{pixels.shape[1]}; give --size (and --resize) to make them equal."
            )
        pixels[i] = array
    if pixels is None:
        raise InputError("There is no picture to read.")
    if modes <= {"L", "1"}:
        pixels = pixels[..., :1]
    done = f"resized to {resize} on the shorter side, centre {size}x{size}, " if size else ""
    done = f"resized to {resize} on the shorter side, " if resize and not size else done
    return from_bytes(pixels), f"pictures: {done}scaled by 1/255"


def _open(file: Path) -> PIL.Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, about metadata that is not used
            picture = PIL.Image.open(file)
            picture.load()
    except (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise InputError(f"{file} is damaged or no picture ({type(error).__name__}); remove or replace it.") from error
    return picture if picture.mode in ("L", "1") else picture.convert("RGB")


def from_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, C] as float32 [N, C, H, W] in 0..1."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def check_channels(name: str, values: Sequence[float] | None, channels: int) -> None:
    """Raise InputError unless `values` (of --mean or --std) is absent, one number, or one for each channel."""
    if values is None:
        return
    if len(values) not in (1, channels):
        raise InputError(
            f"--{name} has {len(values)} numbers and the samples have {channels} channels; give {channels}."
        )
    if name == "std" and any(value <= 0 for value in values):
        raise InputError(f"--std {', '.join(map(str, values))} must be positive.")


def normalise(x: torch.Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> torch.Tensor:
    """(x - mean) / std for each channel of x [N, C, ...]; may write into x.

    Raises:
        InputError: mean or std has neither one number nor one for each channel.
    """
    if mean is None and std is None:
        return x
    if x.ndim < 2:
        raise InputError(f"--mean and --std need samples with channels, and these have shape {list(x.shape)}.")
    channels = x.shape[1]
    check_channels("mean", mean, channels)
    check_channels("std", std, channels)
    view = (1, -1) + (1,) * (x.ndim - 2)
    if mean is not None:
        x = x.sub_(torch.tensor(mean, dtype=x.dtype).view(view))
    if std is not None:
        x = x.div_(torch.tensor(std, dtype=x.dtype).view(view))
    return x
