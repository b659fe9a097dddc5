"""Which parameters a sparse fine-tuning may select from, which it trains whole, and which stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["Parts", "divide", "keeping_statistics"]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Parts:
    """The parameters of a module by name, tied ones once.

    Attributes:
        maskable: selected from; the rest of them is frozen.
        dense: trained in full and stored whole, as the head of a task is.
        frozen: not trained.
    """

    maskable: dict[str, nn.Parameter]
    dense: dict[str, nn.Parameter]
    frozen: dict[str, nn.Parameter]

    @property
    def count(self) -> int:
        """Entries to select from."""
        return sum(each.numel() for each in self.maskable.values())


def divide(
    module: nn.Module, *, head: Sequence[str] = (), frozen: Sequence[str] = (), train_norms: bool = False
) -> Parts:
    """Sort the parameters of ``module``.

    Args:
        head: names, or shell patterns, of parameters or modules that are trained in full (``classifier``).
        frozen: the same of those that stay as they are, beside what does not require a gradient.
        train_norms: normalisation layers are dense too; else they are frozen, as published.

    Raises:
        ValueError: a pattern matches nothing, or a parameter cannot be trained sparsely.
    """
    norms = {id(each) for part in module.modules() if isinstance(part, _NORMS) for each in part.parameters()}
    found = Parts({}, {}, {})
    used: set[str] = set()
    for name, each in module.named_parameters():
        stays, whole = _matching(name, frozen), _matching(name, head)
        used |= stays | whole
        if not each.requires_grad or stays or (id(each) in norms and not train_norms and not whole):
            found.frozen[name] = each
        elif whole or id(each) in norms:
            found.dense[name] = each
        elif not each.is_floating_point():
            raise ValueError(f"{name} holds {each.dtype}; only floating-point parameters can be fine-tuned sparsely")
        else:
            found.maskable[name] = each
    for pattern in (*head, *frozen):
        if pattern not in used:
            names = ", ".join(name for name, _ in module.named_parameters())
            raise ValueError(f"{pattern!r} is the name of no parameter or module with some; there are {names[:300]}")
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            raise ValueError(f"{name} has sparse gradients, which cannot be masked; make it with sparse=False")
    return found


def keeping_statistics(module: nn.Module, parts: Parts) -> list[nn.Module]:
    """Layers whose running statistics stay, because they have no parameter that is trained."""
    trained = {id(each) for each in (*parts.dense.values(), *parts.maskable.values())}
    return [
        each
        for each in module.modules()
        if isinstance(each, _NormBase) and not any(id(one) in trained for one in each.parameters())
    ]


def _matching(name: str, patterns: Sequence[str]) -> set[str]:
    """Those patterns that match a parameter's name or the name of a module it is in."""
    pieces = name.split(".")
    prefixes = [".".join(pieces[:end]) for end in range(1, len(pieces) + 1)]
    return {pattern for pattern in patterns if any(fnmatchcase(each, pattern) for each in prefixes)}
