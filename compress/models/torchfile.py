"""Files of torch.save, read without running code from them.

torch's weights_only reader knows torch's own tensors, plain data (compress/models/trust.py), torch.nn's layers, which a
file may hold but not call, and the names that the user allowed. What will be called is known before
(compress/models/pickles.py).
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.errors import InputError, one_line
from compress.models.pickles import MADE, Call, Name, Survey, survey
from compress.models.trust import DATA, is_layer, is_model_class, may_be_allowed, runs_code
from compress.models.user_code import import_dotted

__all__ = ["STATE_KEYS", "read_safely"]

# Where checkpoints keep the model.
STATE_KEYS = ("state_dict", "model_state", "model", "model_state_dict")
# Functions and classes outside torch.nn.modules that torch.nn's own layers keep as attributes.
_LAYER_PARTS = ("torch.nn.functional.relu", "torch._C._nn.gelu", "torch.nn.parallel.data_parallel.DataParallel")
_REBUILD, _REBUILD_TYPE = "torch._utils._rebuild_", "torch._tensor._rebuild_from_type_v2"
# These make no more than their arguments say; those below go through what they are given, which may be without end.
_HARMLESS = {"torch.device", "torch.serialization._get_layout", "_codecs.encode", "builtins.complex"}
_HARMLESS |= {"torch.nn.parameter.Parameter", *DATA}
_CONTAINERS = {"builtins.set", "builtins.bytearray", "torch.Size", "collections.OrderedDict", "collections.Counter"}
_CONTAINERS |= {name for name in DATA if name.startswith(("builtins.", "collections."))}

# What torch.serialization.safe_globals takes: an object, and the name it has in the file.
_Entry = tuple[Callable[..., Any], str]


def read_safely(file: Path, allow: Sequence[str] = (), stand_ins: Sequence[_Entry] = ()) -> object:
    """What torch.save wrote, without running code from the file; ``stand_ins`` are called instead of what it names.

    Raises:
        InputError: the file is damaged, needs names that are neither torch.nn's layers nor allowed, or calls what is
            stored by its state.
    """
    entries: list[_Entry] = [*stand_ins, *(entry for entry in map(_layer, _LAYER_PARTS) if entry is not None)]
    entries += [(found, name) for name, found in DATA.items()]  # type: ignore[misc]  # typing.Any is never called
    surveyed, needed = _survey(file, entries)
    callable_names = {name for _, name in stand_ins}
    for name in needed:
        if (entry := _layer(name)) is not None:
            entries.append(entry)
        elif (spec := _allowed_as(name, allow)) is not None and may_be_allowed(name):
            entries.append((_allowed(spec), name))
            callable_names.add(name)
    known = {name for _, name in entries}
    foreign = [name for name in needed if name not in known]
    if foreign and _is_zip(file):
        raise InputError(_refusal(file, foreign, surveyed, allow))
    _check_calls(file, [call for call in surveyed.calls if call.name not in foreign], callable_names)
    try:
        with torch.serialization.safe_globals([*entries]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Files from before torch 1.6 name torch's own types too, so only a failure tells that a name is foreign.
        foreign = [name for name in foreign if f"GLOBAL {name.removeprefix('builtins.')} " in str(error)]
        if foreign:
            raise InputError(_refusal(file, foreign, surveyed, allow)) from error
        if not _is_zip(file) and "persistent_load" in str(error):
            raise InputError(
                f"{file} holds a whole module in the format before torch 1.6, which cannot be read without running "
                "code; save its state_dict() where you trust it and give --model package.module:factory."
            ) from error
        raise InputError(
            f"{file} could not be read ({_reason(error)}); it is truncated, damaged or of another kind: save the model "
            "again with torch.save, or save its state_dict()."
        ) from error


def _reason(error: Exception) -> str:
    """torch's own without its advice, which is to load unsafely, or to allow whatever the file asks for."""
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or repr(error)
    reason = one_line(ValueError(reason)).removeprefix("ValueError: ")
    for advice in ("Please use", "Re-running", "Check the documentation", "via `add_safe_globals`", "add_safe_globals"):
        reason = reason.partition(advice)[0].strip()
    return reason or type(error).__name__


def _survey(file: Path, entries: list[_Entry]) -> tuple[Survey, list[str]]:
    """What the file's pickle asks for, and its names, sorted; of zip files those that torch does not know already."""
    try:
        if not _is_zip(file):
            with file.open("rb") as stream:
                # Magic number, protocol, system, and the object itself; raw tensors follow.
                surveyed = survey(stream, programs=4)
            return surveyed, sorted(map(str, surveyed.names))
        # By torch's own reader: of several members by that name it takes the one that will be loaded.
        surveyed = survey(io.BytesIO(torch._C.PyTorchFileReader(str(file)).get_record("data.pkl")))
        with torch.serialization.safe_globals([*entries]):
            return surveyed, sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception as error:
        raise InputError(
            f"{file} is truncated, damaged or saved with a pickle protocol other than torch's default "
            f"({one_line(error)}); save it again with torch.save(model, path)."
        ) from error


def _check_calls(file: Path, calls: Sequence[Call], allowed: Collection[str]) -> None:
    for call in calls:
        if call.name not in allowed and not _is_bounded(call):
            raise InputError(
                f"{file} was not loaded: it has {call.name} called, which takes as much time and memory as a file of "
                "any size likes; torch.save stores layers and tensors by their state: save the model with it again."
            )


def _is_bounded(call: Call) -> bool:
    """Whether a call of what torch's reader knows makes no more than the file holds."""
    name, arguments = call.name, call.arguments
    if name.startswith(_REBUILD):
        return True
    if name == _REBUILD_TYPE:  # calls its first argument
        return bool(arguments) and isinstance(arguments[0], Name) and arguments[0].startswith(_REBUILD)
    if name in _CONTAINERS:
        return not any(each is MADE for each in arguments)
    # To make a layer without its constructor costs nothing; torch's tensors and storages take sizes.
    return name in _HARMLESS or (call.new and is_layer(name)) or (call.new and not arguments)


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _layer(name: str) -> _Entry | None:
    """The class of torch.nn.modules (or one of _LAYER_PARTS) of that exact name, with its name in the file."""
    module_name, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module_name), attribute, None)  # nothing is imported because a file says so
    if name in _LAYER_PARTS and callable(found):
        return (found, name)
    if not module_name.startswith("torch.nn.modules.") or not isinstance(found, type):
        return None
    return (found, name) if issubclass(found, torch.nn.Module) and found.__module__ == module_name else None


def _allowed_as(name: str, allow: Sequence[str]) -> str | None:
    """The entry of `allow` that stands for a name: itself, or for a script's own __main__.Net any module's Net."""
    if name in allow:
        return name
    if name.startswith("__main__."):
        return next((spec for spec in allow if spec.rpartition(".")[2] == name.removeprefix("__main__.")), None)
    return None


def _allowed(spec: str) -> Callable[..., Any]:
    """What the user means by ``--allow spec``; a name can lead to what runs code by way of another module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy.core, numpy's name before 2.0
        found = import_dotted(spec, "--allow")
    if not callable(found):
        raise InputError(f"--allow {spec} is a {type(found).__name__}, not a class or function.")
    origin = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', '')}"
    if not may_be_allowed(origin):
        raise InputError(f"--allow {spec} is {origin}, which is no part of a model and can run code; leave it out.")
    return found


def _refusal(file: Path, foreign: Sequence[str], surveyed: Survey, allow: Sequence[str]) -> str:
    code = [name for name in foreign if runs_code(name)]
    if code:
        return (
            f"{file} was not loaded: it asks for {', '.join(code)}, which is no part of a model and can run commands "
            "when loaded; get the weights as .safetensors from someone you trust."
        )
    own = [name for name in foreign if is_model_class(name)]
    if len(own) == len(foreign):
        flags = " ".join(f"--allow {name.replace('__main__.', 'your_module.')}" for name in own)
        main = any(name.startswith("__main__.") for name in own)
        hint = " (__main__ was the script that saved it: name the module that defines the class)" if main else ""
        return (
            f"{file} was not loaded: it needs {', '.join(own)}, beyond torch.nn's own layers{hint}. If you trust "
            f"them, add {flags}; or save the state_dict() and give --model package.module:factory."
        )
    # Classes first, a configuration's before those of its entries.
    rest = sorted(set(foreign) - set(own), key=lambda name: (not name.endswith(("Config", "Dict", "Namespace")), name))
    shown, count = [*own, *rest][:2], len(foreign) - 2
    more = f" and {count} more" if count > 0 else ""
    key = next((each for each in STATE_KEYS if each in surveyed.words and not own), None)
    weights = f"torch.load({str(file)!r}, weights_only=False)" + (f"[{key!r}]" if key else ".state_dict()")
    named = [name for name in foreign if name in allow]
    given = f" (--allow takes no {', '.join(named)}, which wraps whatever it is given)" if named else ""
    return (
        f"{file} was not loaded: beside weights it holds {', '.join(shown)}{more}{given}, and not all of that is a "
        f"class of a model. Where you trust it, save the weights alone: torch.save({weights}, 'w.pt'); then give w.pt "
        "and --model package.module:factory."
    )
