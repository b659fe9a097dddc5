"""Maestro in a training loop of one's own (arXiv 2308.14929): ordered factors, ranks found while they are trained.

maestro = Maestro(model, penalty=1e-3)
optimizer = torch.optim.SGD(model.parameters(), ...)
for epoch in range(epochs):
    for x, y in batches:
        with maestro.step():
            loss = criterion(model(x), y) + maestro.penalty()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
    maestro.end_epoch(optimizer)
recalibrate(model, batches)
maestro.extract()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.lowrank.decompose import decompose, decomposed_layers, extract
from compress.lowrank.sampler import RankSampler
from compress.lowrank.shrink import hierarchical_lasso, kept_rank, shrink

__all__ = ["Maestro"]


class Maestro:
    """Decomposes ``module`` in place, exactly, and trains its ranks with it.

    Args:
        module: anything with linears, convolutions or attention; layers that are decomposed already stay as they are.
        penalty: weight of the hierarchical group lasso. Weight decay on the factors is a penalty on ranks as well:
            hold it fixed when this one is swept. Large values first, halved until the accuracy is reached.
        threshold: components below this importance go at the end of an epoch.
        relative: whether ``threshold`` is a multiple of the layer's first importance when training began, or absolute.
        sampler: see :class:`~compress.lowrank.sampler.RankSampler`.
        ignore, keep_first, keep_last, unrolling: see :func:`~compress.lowrank.decompose.decompose`.
        seed: of the sampler.

    Attributes:
        layers: decomposed layers by name.
        dense: layers left as they were, with the reason.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        penalty: float = 1e-3,
        threshold: float = 1e-3,
        relative: bool = True,
        sampler: str = "pair",
        ignore: Sequence[str] = (),
        keep_first: int = 0,
        keep_last: bool = False,
        unrolling: str = "channel",
        seed: int = 0,
    ) -> None:
        if penalty < 0 or threshold < 0:
            raise ValueError(f"penalty {penalty:g} and threshold {threshold:g}: neither is below 0")
        self.module = module
        self.dense: dict[str, str] = {}
        if not decomposed_layers(module):
            done = decompose(module, ignore=ignore, keep_first=keep_first, keep_last=keep_last, unrolling=unrolling)
            self.dense = done.dense
        self.layers = decomposed_layers(module)
        self.weight, self.threshold = penalty, threshold
        self.scales = {
            name: float(layer.importance()[0]) if relative and layer.rank else 1.0
            for name, layer in self.layers.items()
        }
        self.sampler = RankSampler(self.layers, sampler, seed)

    def step(self) -> AbstractContextManager[dict[str, int]]:
        """Around one optimisation step: cuts the drawn layer to the drawn rank."""
        return self.sampler.step()

    def penalty(self) -> Tensor:
        """To be added to the loss."""
        return self.weight * hierarchical_lasso(self.layers) if self.weight else torch.zeros(())

    def end_epoch(self, optimizer: Optimizer | None = None) -> dict[str, int]:
        """Let worthless components go, from ``optimizer`` too; ranks that changed, by layer."""
        changed = {}
        for name, layer in self.layers.items():
            rank = kept_rank(layer, self.threshold, self.scales[name])
            if rank < layer.rank:
                shrink(layer, rank, optimizer)
                changed[name] = rank
        return changed

    @property
    def ranks(self) -> dict[str, int]:
        """Components by layer."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def extract(self) -> dict[str, str]:
        """Make the module one of ordinary layers; what became of each. The last call."""
        return extract(self.module)

    def state_dict(self) -> dict[str, Any]:
        """Ranks, the sampler's place, the scales; beside the module's own state it makes a run go on."""
        return {
            "ranks": self.ranks,
            "shapes": {name: [layer.outputs, layer.inputs] for name, layer in self.layers.items()},
            "sampler": self.sampler.state_dict(),
            "scales": dict(self.scales),
        }

    def load_state_dict(self, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
        """Cut the layers to the ranks of ``state``, ready for the module's own ``load_state_dict``.

        ``optimizer`` is one that has the layers' parameters already: cut ones are new.

        Raises:
            ValueError: it is of another architecture.
        """
        ranks = state["ranks"]
        if ranks.keys() != self.layers.keys():
            strange = sorted(ranks.keys() ^ self.layers.keys())
            raise ValueError(f"the checkpoint is of another architecture: {', '.join(strange[:5])} only in one of them")
        for name, rank in ranks.items():
            layer = self.layers[name]
            there, here = tuple(state["shapes"][name]), (layer.outputs, layer.inputs)
            if there != here:
                raise ValueError(
                    f"the checkpoint is of another architecture: layer {name} is {there[0]} x {there[1]} there, "
                    f"{here[0]} x {here[1]} here"
                )
            if rank > layer.rank:
                raise ValueError(
                    f"the checkpoint is of another architecture: layer {name} has rank {rank} there, at most "
                    f"{layer.rank} here"
                )
            shrink(layer, rank, optimizer)
        self.sampler.load_state_dict(state["sampler"])
        self.scales = dict(state["scales"])
