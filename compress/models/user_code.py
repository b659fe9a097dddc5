"""The user's own code and what it builds: import `package.module:name`, call a model factory, fit a state dict to it.

Only names the user typed on the command line are imported here, never names that a model file asks for.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch

from compress.errors import InputError, one_line

__all__ = ["build_module", "fit_state", "import_dotted", "import_object", "user_code"]

_SHOWN = 4
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


@contextlib.contextmanager
def user_code() -> Iterator[None]:
    """Put the current folder first on sys.path, as `python -m` does, while the user's code is imported and called."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have rearranged sys.path itself
            sys.path.remove(folder)


def import_object(spec: str, option: str) -> object:
    """The object that `package.module:name` means.

    Raises:
        InputError: naming `option`, when the spec is malformed, or its module or name cannot be had.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in (module_name + "." + name).split(".")):
        raise InputError(f"{option} {spec!r} is not of the form package.module:name.")
    with user_code():
        return _attribute(_import(module_name, option, spec), name, option, spec)


def import_dotted(spec: str, option: str) -> object:
    """The object that `package.module.name` means: the longest importable prefix, then attributes.

    Raises:
        InputError: naming `option`, when the spec is malformed, or no such object exists.
    """
    parts = spec.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise InputError(f"{option} {spec!r} is not of the form package.Class.")
    with user_code():
        for end in range(len(parts) - 1, 0, -1):
            prefix = ".".join(parts[:end])
            if end > 1 and not _exists(prefix):
                continue
            return _attribute(_import(prefix, option, spec), ".".join(parts[end:]), option, spec)
    raise AssertionError("the shortest prefix is always tried")


def _exists(module_name: str) -> bool:
    try:
        return importlib.util.find_spec(module_name) is not None
    except (ImportError, AttributeError, ValueError):
        return False


def _import(module_name: str, option: str, spec: str) -> object:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import inside the user's file that fails is another mistake than a wrong name on the command line.
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise InputError(
                f"{option} {spec}: there is no Python module {error.name!r} on PYTHONPATH or in the current folder "
                f"({os.getcwd()}); run from the folder that holds it, or set PYTHONPATH."
            ) from error
        raise InputError(
            f"{option} {spec}: importing {module_name} failed, it needs the module {error.name!r}; install it."
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{option} {spec}: importing {module_name} failed with {one_line(error)}.") from error


def _attribute(found: object, dotted: str, option: str, spec: str) -> object:
    for name in dotted.split("."):
        if not hasattr(found, name):
            public = sorted(n for n in vars(found) if not n.startswith("_")) if hasattr(found, "__dict__") else []
            has = f"; it has {', '.join(public[:8])}" if public else ""
            owner = getattr(found, "__name__", type(found).__name__)
            raise InputError(f"{option} {spec}: {owner} has no {name!r}{has}.")
        found = getattr(found, name)
    return found


def build_module(spec: str, option: str = "--model") -> torch.nn.Module:
    """The nn.Module that the factory `package.module:factory` returns when called without arguments.

    Raises:
        InputError: naming `option`, when the factory cannot be found, raises, or returns something else.
    """
    factory = import_object(spec, option)
    if isinstance(factory, torch.nn.Module):
        return factory
    if not callable(factory):
        raise InputError(f"{option} {spec} is a {type(factory).__name__}, not a function that returns the model.")
    with user_code():
        try:
            module = factory()
        except (Exception, SystemExit) as error:
            raise InputError(
                f"{option} {spec} raised {one_line(error)}; it is called without arguments, so wrap it in a function "
                "that needs none."
            ) from error
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"{option} {spec} returned a {type(module).__name__}, not a torch.nn.Module.")
    return module


def fit_state(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], *, source: str, spec: str, unused: Sequence[str] = ()
) -> list[str]:
    """Copy a state dict into a module; wrapper prefixes are taken off unless the module has them too.

    Args:
        unused: shell patterns of weights that the module may lack.

    Returns:
        The names of those that it lacks.

    Raises:
        InputError: with the first few missing, unexpected or differently shaped names.
    """
    own = module.state_dict(keep_vars=True)
    state = _without_wrappers(state, own)
    present = {id(own[name]) for name in state if name in own}
    missing, filled = [], dict(state)
    for name, tensor in own.items():
        if name in state:
            continue
        # Files from before torch 0.4.1 lack the counter, which eval mode never reads; files of tied weights
        # (safetensors) hold one of the names only.
        if name.rpartition(".")[2] == "num_batches_tracked" or id(tensor) in present:
            filled.pop(name, None)
        else:
            missing.append(name)
    too_many = [name for name in state if name not in own]
    left_out = [name for name in too_many if any(fnmatch.fnmatchcase(name, pattern) for pattern in unused)]
    filled = {name: tensor for name, tensor in filled.items() if name not in left_out}
    unexpected = [name for name in too_many if name not in left_out]
    mismatched = [
        f"{name} is {list(tensor.shape)} in the file and {list(own[name].shape)} in the model"
        for name, tensor in state.items()
        if name in own and isinstance(own[name], torch.Tensor) and tensor.shape != own[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"it lacks {_few(missing)}")
    if unexpected:
        problems.append(f"the model has no {_few(unexpected)}")
    if mismatched:
        problems.append(_few(mismatched))
    if problems:
        spare = not missing and not mismatched
        raise InputError(
            f"{source} does not fit --model {spec}: {'; '.join(problems)}. "
            "Give the factory of the model that was trained"
            + (f", or leave them out: {' '.join(_flags(unexpected))}." if spare else ".")
        )
    try:
        module.load_state_dict(filled, strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{source} does not fit --model {spec}: {one_line(error)}.") from error
    return left_out


def _flags(names: Sequence[str]) -> list[str]:
    """Options that leave ``names`` out, one for each of their first parts."""
    firsts = dict.fromkeys(name.partition(".")[0] + (".*" if "." in name else "") for name in names)
    return [f"--allow 'unused:{each}'" for each in firsts][:_SHOWN]


def _without_wrappers(state: Mapping[str, torch.Tensor], own: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Names as before DataParallel ("module." in front) and torch.compile ("_orig_mod." anywhere)."""
    stripped = dict(state)
    if not any("_orig_mod." in name for name in own):
        stripped = {name.replace("_orig_mod.", ""): tensor for name, tensor in stripped.items()}
    while stripped:
        prefix = next((p for p in _WRAPPER_PREFIXES if all(name.startswith(p) for name in stripped)), None)
        if prefix is None or (own and all(name.startswith(prefix) for name in own)):
            break
        stripped = {name[len(prefix) :]: tensor for name, tensor in stripped.items()}
    # Two names that become one would lose a tensor: then the names stay as they were and the error shows them.
    return stripped if len(stripped) == len(state) else dict(state)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
