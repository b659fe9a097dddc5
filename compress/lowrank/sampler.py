"""Ordered dropout: which layer is cut to which rank in the next step (arXiv 2308.14929, algorithm 1)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from compress.lowrank.layers import LowRankLayer

__all__ = ["SAMPLERS", "RankSampler"]

SAMPLERS = ("pair", "independent", "shared", "full")


class RankSampler:
    """Cuts layers for one step at a time.

    Args:
        layers: decomposed ones by name; their ranks may shrink between steps.
        kind: ``pair``: one layer to one rank, every pair of them once in random order before any comes again, all other
            layers whole, so that a layer is drawn in proportion to its rank. ``independent``: every layer to a rank of
            its own. ``shared``: all layers to one rank, those that have fewer whole; low ranks more often, in
            proportion to one over the root of the rank, as few components must do alone what many do together.
            ``full``: none.
        seed: of the order.

    Raises:
        ValueError: ``kind`` is unknown.
    """

    def __init__(self, layers: Mapping[str, LowRankLayer], kind: str = "pair", seed: int = 0) -> None:
        if kind not in SAMPLERS:
            raise ValueError(f"unknown sampler {kind!r}; known: {', '.join(SAMPLERS)}")
        self.layers, self.kind = dict(layers), kind
        self._random = random.Random(seed)
        self._pairs: list[tuple[str, int]] = []
        self._ranks: dict[str, int] = {}
        self._shared: list[float] = []  # weights of ranks, summed up

    def draw(self) -> dict[str, int]:
        """Ranks of the next step by layer; layers that are not named are whole."""
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        if self.kind == "full":
            return {}
        if self.kind == "independent":
            return {name: self._random.randint(1, rank) for name, rank in ranks.items() if rank}
        if self.kind == "shared":
            highest = max(ranks.values(), default=1) or 1
            if highest != len(self._shared):
                self._shared = list(itertools.accumulate(each**-0.5 for each in range(1, highest + 1)))
            (rank,) = self._random.choices(range(1, highest + 1), cum_weights=self._shared)
            return {name: min(rank, most) for name, most in ranks.items() if most}
        if ranks != self._ranks:  # pairs of ranks that are gone would be drawn in vain
            self._ranks, self._pairs = ranks, []
        if not self._pairs:
            self._pairs = [(name, rank) for name, most in ranks.items() for rank in range(1, most + 1)]
            self._random.shuffle(self._pairs)
        if not self._pairs:
            return {}
        name, rank = self._pairs.pop()
        return {name: rank}

    @contextmanager
    def step(self) -> Iterator[dict[str, int]]:
        """Cut the layers as drawn while the block runs; whole again behind it."""
        drawn = self.draw()
        for name, rank in drawn.items():
            self.layers[name].active = rank
        try:
            yield drawn
        finally:
            for name in drawn:
                self.layers[name].active = None

    def state_dict(self) -> dict[str, Any]:
        """All that a continued run needs to draw the same."""
        return {"random": self._random.getstate(), "pairs": list(self._pairs), "ranks": dict(self._ranks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        version, numbers, gauss = state["random"]
        self._random.setstate((version, tuple(numbers), gauss))
        self._pairs = [(name, rank) for name, rank in state["pairs"]]
        self._ranks = dict(state["ranks"])
