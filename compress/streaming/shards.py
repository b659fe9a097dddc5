"""Tensors spread over safetensors files: read one by one, without reading the rest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError

from compress.errors import InputError
from compress.models.weightfiles import SINGLE, tensor_names, weight_files

__all__ = ["Shards"]


class Shards:
    """The tensors of a model folder.

    Raises:
        InputError: files are missing, damaged or elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = weight_files(folder)
        self._files = files if files is not None else dict.fromkeys(tensor_names(folder / SINGLE), SINGLE)

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors called ``names``, in the types they are stored in.

        Raises:
            InputError: a file is damaged or lacks a tensor that the index says it holds.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        found: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safetensors.safe_open(self.folder / file, framework="pt") as opened:
                    found |= {name: opened.get_tensor(name) for name in wanted}
            except (SafetensorError, OSError) as error:
                raise InputError(f"{self.folder / file} is damaged ({error}); download the folder again") from error
        return found
