"""Model files: .pt, .pth, .th, .bin (torch.save), .safetensors, .pt2 (torch.export), Hugging Face folders; to a module.

Loading runs no code from the file: those of torch.save are read by compress.models.torchfile, archives of torch.export
are checked first (compress.models.pt2).
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from compress.errors import FactoryError, InputError, one_line
from compress.files.known_folders import lookalike
from compress.models.growth import check_archive, check_module
from compress.models.huggingface import TextReader, is_pretrained, open_pretrained
from compress.models.pt2 import load_exported
from compress.models.torchfile import STATE_KEYS, read_safely
from compress.models.user_code import build_module, fit_state

__all__ = ["LoadedModel", "fingerprint", "load_model", "to_float_eval"]

_TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt", ".tar")
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_UNUSED = "unused:"
_NESTED = 4  # dictionaries that a checkpoint may have the model in
_HASH_BYTES = 1 << 24


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on CPU, its floating-point parameters and buffers in float32."""

    module: torch.nn.Module
    example: tuple[torch.Tensor, ...] | None  # the inputs a .pt2 file was exported with, batch dimension included
    source: str
    fingerprint: str
    notes: tuple[str, ...] = ()
    text: TextReader | None = None  # how text becomes its inputs, for Hugging Face folders that take token ids
    head: tuple[str, ...] = ()  # parameters that the file does not hold: those of a new head

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the arguments of ``forward``, in order."""
        return tuple(inspect.signature(self.module.forward).parameters)


def load_model(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    allow: Sequence[str] = (),
    classes: int | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Read a model file; `model` ("package.module:factory") builds the module when the file holds only weights.

    `classes` puts a new head on a Hugging Face folder's model, its weights from `seed`.
    `allow` names classes ("package.Class") beyond torch.nn's that a torch.save file may use, or operators
    ("torch.ops.namespace.name") beyond aten's that a .pt2 file may call; ``unused:PATTERN`` lets it hold weights that
    the factory's module lacks.

    Raises:
        InputError: the file is missing, damaged, of another kind, needs names that are not allowed, does not fit the
            factory's module, or holds weights that are not finite.
    """
    file = Path(path)
    if is_pretrained(file):
        return _load_pretrained(file, model, classes, seed)
    if mistaken := lookalike(file):
        raise InputError(mistaken)
    if classes is not None:
        raise InputError(f"{file} is no Hugging Face folder, which alone gets a new head; give a model that has one")
    unused = [each.removeprefix(_UNUSED) for each in allow if each.startswith(_UNUSED)]
    allow = [each for each in allow if not each.startswith(_UNUSED)]
    kind = _kind(file)
    notes: list[str] = []
    example: tuple[torch.Tensor, ...] | None = None
    if kind == "pt2":
        module, example, notes = load_exported(file, allow)
    else:
        found = _read_safetensors(file) if kind == "safetensors" else _model_part(read_safely(file, allow), file)
        if isinstance(found, torch.nn.Module):
            module = found
            if model is not None:
                notes.append(f"{file.name} holds a whole module, so --model {model} was not used.")
        elif model is None:
            names = ", ".join(list(found)[:3])
            raise FactoryError(
                f"{file} holds {len(found)} weights ({names}, ...) but not the model they belong to; give the function "
                "that builds it, --model package.module:factory"
            )
        else:
            module = build_module(model)
            left_out = fit_state(module, found, source=str(file), spec=model, unused=unused)
            if left_out:
                notes.append(f"left out, as the model has no such weights: {', '.join(left_out)}")
            notes += _conversion_note(found.values())
    check_module(file, module)
    while isinstance(module, torch.nn.DataParallel) and isinstance(getattr(module, "module", None), torch.nn.Module):
        module = module.module
    example = to_float_eval(module, file, notes, example)
    _check_weights(module, file)
    return LoadedModel(module, example, str(file), fingerprint(module), tuple(notes))


def _load_pretrained(folder: Path, model: str | None, classes: int | None, seed: int) -> LoadedModel:
    if model is not None:
        raise InputError(f"{folder} says itself what it is; leave out --model {model}, or give the .safetensors file")
    found = open_pretrained(folder, classes, seed)
    notes = list(found.notes)
    to_float_eval(found.module, folder, notes, None)
    _check_weights(found.module, folder)
    identity = fingerprint(found.module)
    return LoadedModel(found.module, None, str(folder), identity, tuple(notes), found.text, found.head)


def fingerprint(module: torch.nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all tensors of a module, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(module), key=lambda pair: pair[0]):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy()
        for start in range(0, len(data), _HASH_BYTES):
            digest.update(data[start : start + _HASH_BYTES].data)
    return digest.hexdigest()


def _kind(file: Path) -> str:
    """ "torch", "safetensors" or "pt2", by suffix and by the first bytes."""
    if file.is_dir():
        which = "a .pt, .pth, .pt2 or .safetensors file"
        raise InputError(f"{file} is a folder without a config.json, so no Hugging Face model; give one, or {which}.")
    if not file.exists():
        raise InputError(f"There is no file {file}; check the path.")
    if file.stat().st_size == 0:
        raise InputError(f"{file} is empty; save or download it again.")
    suffix = file.suffix.lower()
    if suffix == ".safetensors":
        return "safetensors"
    if suffix not in (*_TORCH_SUFFIXES, ".pt2"):
        raise InputError(f"{file} ends in {suffix!r}; a model file ends in .pt, .pth, .th, .bin, .pt2 or .safetensors.")
    with file.open("rb") as stream:
        start = stream.read(len(_LEGACY_MAGIC))
    if start == _LEGACY_MAGIC and suffix != ".pt2":
        return "torch"
    if start[:2] != b"PK":
        plain_pickle = start[:1] == b"\x80" and suffix != ".pt2"
        what = "is a plain pickle, not written by torch.save" if plain_pickle else "is not a PyTorch file"
        raise InputError(f"{file} {what} (it begins with {start[:8]!r}); save the model with torch.save.")
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()} | set(archive.namelist())
            # A cut archive of torch.export still ends in a whole one, that of its example inputs.
            if min((entry.header_offset for entry in archive.infolist()), default=0) > 0:
                raise zipfile.BadZipFile("its list of members is cut off")
            check_archive(file, archive)
            if (wrong := archive.testzip()) is not None:  # torch itself does not look
                raise zipfile.BadZipFile(f"the checksum of {wrong} is wrong")
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, zlib.error) as error:
        raise InputError(f"{file} is truncated or damaged ({one_line(error)}); save or download it again.") from error
    if "archive_format" in names or "serialized_exported_program.json" in names:
        if suffix != ".pt2":
            raise InputError(f"{file} was written by torch.export.save; rename it to {file.stem}.pt2.")
        return "pt2"
    if "data.pkl" not in names:
        raise InputError(f"{file} is a zip archive but not a PyTorch file; save the model with torch.save.")
    if suffix == ".pt2":
        raise InputError(f"{file} was written by torch.save, not torch.export.save; rename it to {file.stem}.pt.")
    return "torch"


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{file} is truncated or no safetensors file ({one_line(error)}); get it again.") from error


def _model_part(content: object, file: Path) -> torch.nn.Module | dict[str, torch.Tensor]:
    """The module or the flat state dict inside what a file holds."""
    for _ in range(_NESTED):  # a dictionary may hold itself
        inner = [content.get(key) for key in STATE_KEYS] if isinstance(content, Mapping) else []
        content = next((each for each in inner if isinstance(each, Mapping | torch.nn.Module)), content)
    if isinstance(content, torch.nn.Module):
        return content
    if not isinstance(content, Mapping):
        what = f"one tensor of shape {list(content.shape)}" if isinstance(content, torch.Tensor) else ""
        raise InputError(
            f"{file} holds {what or f'an object of type {type(content).__name__}'}, not a model or its weights; save "
            "the model with torch.save(model, path) or its state_dict()."
        )
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors or not all(isinstance(name, str) for name in content):
        keys = ", ".join(repr(key) for key in list(content)[:5]) or "nothing"
        raise InputError(
            f"{file} holds a dictionary without weights (keys: {keys}); save model.state_dict(), alone or under "
            '"state_dict".'
        )
    return tensors


def _conversion_note(tensors: Iterable[torch.Tensor]) -> list[str]:
    """A sentence about the floating-point tensors that are not float32, if there are any."""
    kinds = Counter(
        str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point() and t.dtype != torch.float32
    )
    if not kinds:
        return []
    return [", ".join(f"{count} {kind} tensors" for kind, count in sorted(kinds.items())) + " converted to float32."]


def to_float_eval(
    module: torch.nn.Module, file: Path, notes: list[str], example: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...] | None:
    """Eval mode and float32, in place; returns the example inputs in float32 as well."""
    if isinstance(module, torch.fx.GraphModule):
        for part in module.modules():
            part.training = False  # exported modules refuse eval(); their graph was checked for training mode
    else:
        module.eval()
    converted = _conversion_note([tensor for _, tensor in _tensors(module) if not tensor.is_meta])
    if converted:
        notes += converted
        try:
            module.float()
            for part in module.modules():
                for name, value in vars(part).items():
                    if isinstance(value, torch.Tensor) and value.is_floating_point():
                        setattr(part, name, value.float())
            if example is not None:
                example = tuple(x.float() if x.is_floating_point() else x for x in example)
                with torch.no_grad():
                    module(*example)  # a traced graph can hold casts of its own
        except Exception as error:
            raise InputError(
                f"{file} does not run after its weights became float32 ({one_line(error)}); call model.float() before "
                "saving or exporting it."
            ) from error
    return example


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, all buffers, and plain tensor attributes (the constants of exported modules), tied ones once."""
    yield from module.named_parameters()
    yield from module.named_buffers()
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{name}" if prefix else name, value


def _check_weights(module: torch.nn.Module, file: Path) -> None:
    parameters = {name for name, _ in module.named_parameters()}
    for name, tensor in _tensors(module):
        if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
            raise InputError(f"{file}: {name} has no values (a lazy or meta tensor); run the model once and save it.")
        if not tensor.is_floating_point():
            continue
        statistic = re.search(r"(^|\.)running_(mean|var)$", name)
        # A buffer may hold -inf on purpose: that is how attention masks are written.
        bad = ~torch.isfinite(tensor) if name in parameters or statistic else torch.isnan(tensor)
        if bool(bad.any()):
            raise InputError(
                f"{file}: {name} holds {int(bad.sum())} values that are NaN or infinite; the model was damaged in "
                "training or saving, use an earlier checkpoint."
            )
