"""Names that become Python: torch.fx writes a graph as the source of a function, and pastes the graph's names into it.

Inputs and keyword arguments stand there as they are; of a tensor's dotted name, parts that are no identifiers stand in
quotes: ``getattr(self, "0").weight``. Whatever a file or a module brings is checked here before it comes that far.
"""

from __future__ import annotations

import keyword
import re

from torch import nn

from compress.errors import InputError

__all__ = ["check_module_names", "is_identifier", "is_tensor_name", "shown"]

# Nothing here ends a string or a line.
_PART = re.compile(r"[\w\-/ ]+")
_SHOWN = 80


def is_identifier(name: object) -> bool:
    """Whether ``name`` can stand in Python's source as the name of a value."""
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def is_tensor_name(name: object) -> bool:
    """Whether ``name`` is a dotted name: parts of letters, digits, ``_``, ``-``, ``/`` and spaces, none a keyword."""
    return isinstance(name, str) and all(
        _PART.fullmatch(part) and not keyword.iskeyword(part) for part in name.split(".")
    )


def shown(value: object) -> str:
    """``value`` as a message names it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def check_module_names(module: nn.Module) -> None:
    """Refuse a module with names that cannot be pasted: they come from a file, or from keys of an ``nn.ModuleDict``.

    Raises:
        InputError: naming the first.
    """
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, part in [*module.named_modules(remove_duplicate=False), *tensors]:
        if name and not is_tensor_name(name):
            kind = "module" if isinstance(part, nn.Module) else "tensor"
            raise InputError(
                f"the model has a {kind} called {shown(name)}; names become Python when the model is traced, so parts "
                "between dots may hold letters, digits, _, -, / and spaces, and be no keyword: rename it"
            )
