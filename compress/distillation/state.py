"""The outer loop's state and its file: everything that decides how a run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from compress.distillation.parts import differences
from compress.distillation.tensorfile import read_tensors, write_tensors
from compress.errors import InputError

__all__ = ["State", "read_state", "write_state"]

_TENSORS = ("images", "velocity", "best")


@dataclass(eq=False)
class State:
    """After ``iteration`` iterations; ``best`` is the set that was judged best so far."""

    images: Tensor
    velocity: Tensor
    rate: float
    rate_images: float
    rate_rate: float
    rate_velocity: float = 0.0
    iteration: int = 0
    losses: list[float] = field(default_factory=list)
    matching: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    best: Tensor | None = None
    best_rate: float = 0.0
    best_learned: float | None = None
    best_iteration: int = 0

    def change(self, **fields: object) -> None:
        """Set ``fields``, all or none: in one call of C, an interrupt comes before or after it."""
        vars(self).update(fields)


def read_state(path: Path, run: str, parts: Mapping[str, str], *, discard: bool = False) -> State | None:
    """What ``path`` holds of ``run``; None if it is another run's, which ``discard`` allows to throw away.

    Args:
        parts: what ``run`` is made of, by name.

    Raises:
        InputError: it is another run's; with what differs.
    """
    tensors, strings = read_tensors(path)
    if strings.get("run") != run:
        if discard:
            return None
        raise InputError(
            f"{path.parent} holds the state of another run; different: {differences(strings.get('parts'), parts)}. "
            "Finish that run with what it was begun with, choose another --out, or throw it away with --overwrite"
        )
    told = json.loads(strings["state"])
    told["scores"] = {int(number): score for number, score in told["scores"].items()}
    return State(tensors["images"], tensors["velocity"], best=tensors.get("best"), **told)


def write_state(path: Path, state: State, run: str, parts: Mapping[str, str]) -> None:
    """Write ``path``, whole or not at all."""
    tensors = {"images": state.images, "velocity": state.velocity}
    tensors |= {"best": state.best} if state.best is not None else {}
    # JSON keeps a float's every bit.
    told = {name: value for name, value in vars(state).items() if name not in _TENSORS}
    write_tensors(path, tensors, {"run": run, "parts": json.dumps(dict(parts)), "state": json.dumps(told)})
