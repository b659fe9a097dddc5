"""A module written in the form its model came in: a file of torch.save, weights alone, or a Hugging Face folder.

A new folder gets what the old one has beside weights: tokenizer, configuration, and the folders that
sentence-transformers' ``modules.json`` names. Weights of other frameworks stay behind, as they are the old model's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_model

from compress.errors import InputError, one_line
from compress.files.outputs import check_free, new_files
from compress.models.checkpoint import LoadedModel
from compress.models.huggingface import is_pretrained, save_pretrained

__all__ = ["check_target", "save_like"]

_EXPORTS = (".pt2", ".onnx")
# Of any framework, and of exports.
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf", ".tflite",
)  # fmt: skip
_CONFIG, _MODULES = "config.json", "modules.json"


def check_target(origin: Path, out: Path, overwrite: bool) -> None:
    """Refuse an ``out`` that the model of ``origin`` is not to be written to, before any work is done.

    Raises:
        InputError: it exists and ``overwrite`` is not set, is something else than what is to replace it, or has a
            suffix of another kind of file.
    """
    check_free(out, overwrite)
    if is_pretrained(origin):
        if out.exists() and not (out.is_dir() and (is_pretrained(out) or not any(out.iterdir()))):
            raise InputError(f"{out} is no Hugging Face folder, so --overwrite leaves it alone; choose another --out")
    elif out.is_dir():
        raise InputError(f"{out} is a folder, and {origin} a file; choose another --out")
    elif out.suffix in _EXPORTS:
        raise InputError(f"--out {out}: a {out.suffix} file is an export; write a .pt or .safetensors file first")


def save_like(
    loaded: LoadedModel,
    origin: Path,
    out: Path,
    *,
    factory: str | None,
    overwrite: bool,
    beside: Callable[[Path], object] | None = None,
) -> None:
    """Write ``loaded``'s module to ``out`` in the form of ``origin``, which it was read from, whole or not at all.

    Args:
        beside: writes more files, which belong to it, into a folder from which they get beside ``out``, all or none.

    Raises:
        InputError: see :func:`check_target`; or there is no room.
    """
    check_target(origin, out, overwrite)
    module = loaded.module
    with new_files(out) as folder:
        if beside is not None:
            beside(folder)
        if is_pretrained(origin):
            save_pretrained(module, folder / out.name)
            _copy_beside(origin, folder / out.name, with_config=not loaded.head)  # a new head has changed it
        elif out.suffix == ".safetensors":
            save_model(module, str(folder / out.name))
        else:
            # Whoever names a factory has a class of his own, which a file must not bring along.
            torch.save(module.state_dict() if factory else module, folder / out.name)


def _copy_beside(origin: Path, folder: Path, *, with_config: bool) -> None:
    """Copy to ``folder`` what ``origin`` has beside the model's weights."""
    for file in origin.iterdir():
        weights = file.suffix in _WEIGHTS or ".index." in file.name
        if file.is_file() and not weights and (with_config or file.name != _CONFIG):
            shutil.copy2(file, folder / file.name)
    for name in _module_folders(origin):
        shutil.copytree(origin / name, folder / name, dirs_exist_ok=True)


def _module_folders(origin: Path) -> list[str]:
    """Folders of sentence-transformers' modules: pooling, for one."""
    if not (origin / _MODULES).is_file():
        return []
    try:
        paths = [str(each["path"]) for each in json.loads((origin / _MODULES).read_text())]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{origin / _MODULES} is damaged ({one_line(error)}); get the folder again") from error
    plain = [each for each in paths if each and Path(each).name == each]  # nothing outside the folder
    return [each for each in plain if (origin / each).is_dir()]
