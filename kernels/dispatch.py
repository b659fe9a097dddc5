"""Which kernel runs a call: the first of the table's that does not refuse it; each refusal says why.

A kernel declares what it takes as data (:class:`Requires`), beside its code. Nothing here imports triton, and nothing
is decided before a call is there to look at.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from compress.kernels.launch import capability
from compress.kernels.table import KERNELS
from compress.records.registry import resolve

__all__ = ["Call", "Choice", "Kernel", "Requires", "choose", "has_triton"]


class Call(NamedTuple):
    """A call of an operator, as far as the choice of a kernel depends on it. A tuple: one is made at every call, and
    what was chosen for it is looked up by it.

    Attributes:
        operator: its name in the kernel table.
        device: ``cuda`` or ``cpu``.
        capability: the GPU's compute capability, None elsewhere.
        dtype: of the inputs.
        rows: M, rows of the flattened inputs; ``outputs`` O, ``inputs`` I.
        bits: of a packed weight's codes; 0 where the weight is not packed.
        group_size: inputs that share a grid; I where a row has one.
        rank: of a low-rank weight or branch; 0 without.
        mixed: whether rows belong to different sparse deltas.
        groups: of a convolution; ``outputs`` are those of all.
        trained: whether weights require gradients or were copied for this call: what was launched just before may
            still be writing them.
        aligned: whether packed units begin at a multiple of 4 bytes.
    """

    operator: str
    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    rows: int
    outputs: int
    inputs: int
    bits: int = 0
    group_size: int = 0
    rank: int = 0
    mixed: bool = False
    groups: int = 1
    trained: bool = False
    aligned: bool = True

    @classmethod
    def on(
        cls,
        x: torch.Tensor,
        operator: str,
        outputs: int,
        rows: int | None = None,
        inputs: int | None = None,
        gpu: tuple[int, int] | None = None,
        **rest: Any,
    ) -> Call:
        """A call on ``x`` [..., I]; ``rest`` are the fields that it does not tell.

        Args:
            rows: with ``inputs``, of a convolution, whose ``x`` has neither as its last dimension.
            gpu: capability of a GPU that is not here: what the call would be there.
        """
        device, found = ("cuda", gpu) if gpu else (x.device.type, capability(x))
        inputs = x.shape[-1] if inputs is None else inputs
        rows = x.numel() // inputs if rows is None else rows
        return cls(operator, device, found, x.dtype, rows, outputs, inputs, **rest)


@dataclass(frozen=True)
class Requires:
    """What a kernel takes. ``capability`` is the least; None: any device, also without triton."""

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    rows: tuple[int, int | None] = (1, None)
    bits: tuple[int, ...] | None = None
    group_sizes: tuple[int, ...] | None = None
    rank: int | None = None
    inputs: int | None = None
    mixed: bool = True
    trained: bool = True
    unaligned: bool = True
    group_outputs: int | None = None
    capability: tuple[int, int] | None = (8, 0)

    def refusals(self, call: Call) -> Iterator[str]:
        """Everything about ``call`` that the kernel does not take: what it takes only, and what the call is."""
        if self.capability is not None:
            if call.device != "cuda":
                yield f"only on GPUs, not on {call.device}"
            elif call.capability is None or call.capability < self.capability:
                yield f"only compute capability {_version(self.capability)} and above, not {_version(call.capability)}"
            if not has_triton():
                yield "triton is not installed"
        if call.dtype not in self.dtypes:
            yield f"only inputs of {', '.join(map(str, self.dtypes))}, not {call.dtype}"
        low, high = self.rows
        if call.rows < low or (high is not None and call.rows > high):
            allowed = f"{low} and more" if high is None else str(low) if low == high else f"{low} to {high}"
            yield f"only {allowed} row{'' if high == 1 else 's'}, not {call.rows}"
        if self.bits is not None and call.bits not in self.bits:
            yield f"only weights of {_listed(self.bits)} bits, not {call.bits}"
        if self.group_sizes is not None and call.group_size < call.inputs and call.group_size not in self.group_sizes:
            yield f"only one scale an output, or groups of {_listed(self.group_sizes)}, not of {call.group_size}"
        if self.rank is not None and call.rank > self.rank:
            yield f"only ranks up to {self.rank}, not {call.rank}"
        if self.inputs is not None and call.inputs > self.inputs:
            yield f"only up to {self.inputs} inputs, whose sum fits into 32 bits, not {call.inputs}"
        own = call.outputs // call.groups
        if self.group_outputs is not None and call.groups > 1 and own < self.group_outputs:
            yield f"only groups of {self.group_outputs} outputs and more, which fill tensor cores, not of {own}"
        if call.mixed and not self.mixed:
            yield "only one delta for all rows, not each row's own"
        if call.trained and not self.trained:
            yield "only weights that stay as they are, not trained ones: it reads ahead of what may still write them"
        if not call.aligned and not self.unaligned:
            yield "only units that begin at a multiple of 4 bytes, as it reads them in pairs"


@dataclass(frozen=True)
class Kernel:
    """A row of the kernel table: ``run`` takes the operator's own arguments."""

    run: Callable[..., Any]
    requires: Requires


@dataclass(frozen=True)
class Choice:
    """The kernel that runs a call, and why those before it in the table do not: ``name: reason; reason``."""

    name: str
    run: Callable[..., Any]
    refused: tuple[str, ...] = field(default=())


def choose(call: Call) -> Choice:
    """The first kernel of ``call.operator`` that takes ``call``; each operator's last one runs anywhere.

    Raises:
        TypeError: not even that one takes the inputs' type.
    """
    return _chosen(call, has_triton())


# Nothing but the call decides, and a model makes the same few calls again and again.
@lru_cache(maxsize=4096)
def _chosen(call: Call, triton: bool) -> Choice:
    refused = []
    for name, home in KERNELS[call.operator].items():
        # A kernel's module imports triton: without one, only the rows that need none can be looked at.
        if name != "reference" and not triton:
            refused.append(f"{name}: triton is not installed")
            continue
        kernel: Kernel = resolve({name: home}, name, "kernel")
        if reasons := "; ".join(kernel.requires.refusals(call)):
            refused.append(f"{name}: {reasons}")
            continue
        return Choice(name, kernel.run, tuple(refused))
    raise TypeError(f"no kernel of {call.operator} takes the call. {'. '.join(refused)}")


def _listed(numbers: tuple[int, ...]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def _version(capability: tuple[int, int] | None) -> str:
    return "unknown" if capability is None else f"{capability[0]}.{capability[1]}"


@cache
def has_triton() -> bool:
    """Whether the package that kernels are written in is installed."""
    return importlib.util.find_spec("triton") is not None
