"""Which file of a Hugging Face folder holds which tensor, and how much that is: from the headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
from safetensors import SafetensorError

from compress.errors import InputError, one_line

__all__ = ["INDEX", "SINGLE", "Extent", "extent", "read_json", "tensor_names", "weight_files"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Extent:
    """How many tensors a folder holds, their bytes, and the largest number in any tensor's shape."""

    tensors: int
    size: int
    longest: int


def weight_files(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, as the index has it, all of them in ``folder``; None where one file holds all.

    Raises:
        InputError: a file is missing, or the index is damaged or names files elsewhere.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            hint = f"; its {pickled[0]} is a pickle: save it again with safe_serialization=True" if pickled else ""
            raise InputError(f"{folder} has a config.json but no {SINGLE}{hint}")
        return None
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise InputError(f"{folder / INDEX} has no weight_map of tensors and files; download the folder again")
    files: set[str] = set(found.values())
    outside = sorted(each for each in files if Path(each).name != each or not each.endswith(".safetensors"))
    if outside:
        raise InputError(
            f"{folder / INDEX} names {outside[0]!r}; it may name .safetensors files in its own folder alone: get the "
            "folder again, from someone you trust"
        )
    missing = sorted(each for each in files if not (folder / each).is_file())
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing[:4])}, of the {len(files)} files that {INDEX} names; download the "
            "folder again"
        )
    return found


def tensor_names(file: Path) -> list[str]:
    """Of a safetensors file.

    Raises:
        InputError: it is damaged.
    """
    return list(_shapes(file))


def extent(folder: Path) -> Extent:
    """Of all weights in ``folder``.

    Raises:
        InputError: see :func:`weight_files`; or a file is damaged.
    """
    files = weight_files(folder)
    paths = [folder / each for each in sorted(set(files.values()))] if files is not None else [folder / SINGLE]
    shapes = [shape for path in paths for shape in _shapes(path).values()]
    longest = max((max(shape, default=1) for shape in shapes), default=0)
    return Extent(len(shapes), sum(path.stat().st_size for path in paths), longest)


def read_json(file: Path) -> dict[str, object]:
    """The object in a JSON file of a folder.

    Raises:
        InputError: it is something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({one_line(error)}); download the folder again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object; download the folder again")
    return content


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged ({one_line(error)}); download the folder again") from error
