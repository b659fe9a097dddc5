"""A family at run time: one module in memory, any of its sizes a call, weights never copied.

    model = compress.load("small")             # every size; runs the largest
    with model.cut_to(7):                      # model.family.members[7], with its own BatchNorm statistics
        y = model(x)
    model.set_member(7)                        # from here on
    phone = model.view(7)                      # a module of its own on the same weights, for another thread

A member runs as two thin layers wherever it is cut; where those would cost more than one dense layer, ``extract`` makes
that one layer instead, which computes the same up to rounding.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress.lowrank.decompose import decomposed_layers
from compress.training.lowrank.family import Family, FamilyMember, read_family, read_statistics

__all__ = ["ElasticModel", "load_elastic"]


class ElasticModel(nn.Module):
    """``module``, decomposed, at the size that is set; the largest at first.

    The size is the module's state: of two threads each needs a :meth:`view` of its own.

    Attributes:
        family: its members say what each size costs and loses.
        current: the member that runs now, by its place.
    """

    def __init__(self, module: nn.Module, family: Family, statistics: Sequence[dict[str, Tensor]]) -> None:
        super().__init__()
        self.module, self.family, self.current = module, family, 0
        self._statistics = list(statistics)
        self.set_member(0)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the current member computes."""
        return self.module(*inputs, **named)

    def set_member(self, member: int | FamilyMember) -> None:
        """Run ``member`` from here on, named by its place in the family or by its record.

        Raises:
            ValueError: the family has no such member.
        """
        number = self._number(member)
        _set(self.module, self.family.members[number], self._statistics[number])
        self.current = number

    def cut_to(self, member: int | FamilyMember) -> AbstractContextManager[object]:
        """Run ``member``: under ``with`` while the block runs, then again what ran before it; called plainly, from here
        on, as :meth:`set_member`."""
        block = ExitStack()
        block.callback(self.set_member, self.current)
        self.set_member(member)
        return block

    def view(self, member: int | FamilyMember) -> nn.Module:
        """``member`` as a module of its own on the same parameters; move or convert the family, not a view."""
        number = self._number(member)
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        seen = copy.deepcopy(self.module, {id(each): each for each in tensors})
        _set(seen, self.family.members[number], self._statistics[number])
        return seen

    def _number(self, member: int | FamilyMember) -> int:
        if isinstance(member, FamilyMember):
            if member not in self.family.members:
                raise ValueError(f"a member of {member.macs:,} MACs is not in this family")
            return self.family.members.index(member)
        if not 0 <= member < len(self.family.members):
            raise ValueError(f"member {member}: this family has 0 (the largest) to {len(self.family.members) - 1}")
        return member

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ElasticModel:
        super()._apply(fn, recurse)
        self._statistics = [{name: fn(value) for name, value in each.items()} for each in self._statistics]
        self.set_member(self.current)
        return self


def load_elastic(folder: Path, allow: Sequence[str] = ()) -> ElasticModel:
    """The family in ``folder``; ``allow``: classes of the user's own that it may hold.

    Raises:
        InputError: see :func:`~compress.training.lowrank.family.read_family`.
    """
    module, family = read_family(folder, allow)
    return ElasticModel(module, family, read_statistics(folder, family)).eval()


def _set(module: nn.Module, member: FamilyMember, statistics: dict[str, Tensor]) -> None:
    """Ranks are numbers and statistics are handed over as they are: nothing is copied."""
    for name, layer in decomposed_layers(module).items():
        layer.active = member.ranks.get(name, layer.rank)
    for name, value in statistics.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, value)
