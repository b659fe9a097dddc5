"""Which names of a model file are data, which are a user's own classes, and which can run code.

Nothing is imported or looked up because a file says so: a name is judged by how it is spelt. Advice to ``--allow``
a name is given only for what looks like a class of a model.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import sys
import types
import typing
import uuid

__all__ = ["DATA", "is_layer", "is_model_class", "may_be_allowed", "runs_code"]

_TYPES: tuple[type, ...] = (bool, dict, float, frozenset, int, list, str, tuple)
_TYPES += (argparse.Namespace, types.SimpleNamespace, uuid.UUID, collections.defaultdict, collections.deque)
_TYPES += (datetime.date, datetime.datetime, datetime.timedelta, datetime.timezone)
_TYPES += (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
# Plain data of the standard library: read without being asked for, as torch's reader does with OrderedDict.
DATA: dict[str, object] = {f"{each.__module__}.{each.__qualname__}": each for each in _TYPES}
DATA |= {"typing.Any": typing.Any}

# What of torch's own a model may have as a part: layers, activations, distributions.
_TORCH_PARTS = ("torch.nn.", "torch._C._nn.", "torch.ao.nn.", "torch.distributions.", "torch.optim.")
# Of torch, what makes programs of what it is given.
_TORCH_CODE = ("fx", "jit", "hub", "serialization", "package", "utils", "export", "_dynamo", "_inductor")
# Unpicklers, and packages whose functions compile what they are given.
_CODE = ("cloudpickle", "dill", "joblib", "IPython", "setuptools", "pip", "numba", "jax", "tensorflow", "pkg_resources")
# Settings, numbers and the state of trainers: they lie beside weights and are no part of a model.
_BESIDE = frozenset({"omegaconf", "hydra", "numpy", "pandas", "pytorch_lightning", "lightning", "lightning_fabric"})
_BESIDE |= {"torchmetrics", "yacs", "easydict", "addict", "ml_collections"}


def runs_code(name: str) -> bool:
    """Whether ``name`` is, or may be, something that runs code or commands when it is called."""
    top, _, rest = name.partition(".")
    if name in DATA or name == "functools.partial":
        return False
    if top == "torch":
        inside = rest.partition(".")[0]
        return not name.startswith(_TORCH_PARTS) and (not _is_class(name) or inside in _TORCH_CODE)
    return top in ("nt", "posix") or top in sys.stdlib_module_names or top in _CODE


def may_be_allowed(name: str) -> bool:
    """Whether ``--allow`` takes ``name``: neither what runs code, nor what wraps whatever it is given."""
    return not runs_code(name) and name != "functools.partial"


def is_model_class(name: str) -> bool:
    """Whether ``name`` looks like a class of the user's, or of a library of models, or of torch.nn.utils."""
    top = name.partition(".")[0]
    if not _is_class(name) or not may_be_allowed(name) or name in DATA:
        return False
    if top == "torch":
        return name.startswith(("torch.nn.", "torch.ao.nn."))
    return top not in _BESIDE


def is_layer(name: str) -> bool:
    """Whether ``name`` is torch.nn's."""
    return name.startswith("torch.nn.")


def _is_class(name: str) -> bool:
    """By its spelling: dotted names whose last word begins with a capital."""
    *modules, last = name.split(".")
    return bool(modules) and all(each.isidentifier() for each in (*modules, last)) and last.lstrip("_")[:1].isupper()
