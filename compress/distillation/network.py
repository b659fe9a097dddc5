"""A network as a function of one flat vector of parameters: what trajectories are made of and students unrolled on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from compress.errors import InputError, one_line
from compress.files.cache import digest

__all__ = ["FlatNetwork"]


class FlatNetwork:
    """``build()``'s architecture; parameters are a vector [P], in the order of ``named_parameters``.

    Args:
        build: gives a new network with random parameters at every call.

    Attributes:
        size: P.
        fingerprint: of the names and shapes of the parameters, and of the modules' own descriptions.

    Raises:
        InputError: the network keeps state besides parameters (running statistics) or is random (dropout): a
            trajectory of parameters would not say what it computes. Or it has BatchNorm, in which images of a batch see
            each other: what one image does, and the gradient penalty at it, would depend on the others.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self._build = build
        with torch.random.fork_rng(devices=[]):
            self._module = build().train()
        for name, part in self._module.named_modules():
            if isinstance(part, _BatchNorm) or getattr(part, "running_mean", None) is not None:
                raise InputError(
                    f"network: {name} ({type(part).__name__}) keeps running statistics, or lets images of a batch see "
                    "each other, and neither is in a trajectory; use nn.GroupNorm"
                )
            if isinstance(part, _DropoutNd) and part.p:
                raise InputError(f"network: {name} ({type(part).__name__}) is random; set its p to 0")
        named = dict(self._module.named_parameters())
        if not named:
            raise InputError("network: it has no parameters to learn")
        self._names = list(named)
        self.shapes = [tuple(each.shape) for each in named.values()]
        self._counts = [each.numel() for each in named.values()]
        self.size = sum(self._counts)
        self.fingerprint = digest([repr(self._module), list(zip(self._names, self.shapes, strict=True))])

    def start(self, seed: int) -> Tensor:
        """Parameters [P] as ``build`` draws them under ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self._build()
        return torch.cat([each.detach().reshape(-1) for each in module.parameters()])

    def parts(self, theta: Tensor) -> list[Tensor]:
        """Views of ``theta`` [P], one a parameter, in its shape."""
        pieces = theta.split(self._counts)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        """Logits [N, classes] for ``x`` [N, ...] with parameters ``theta`` [P]; differentiable in both, twice."""
        return functional_call(self._module, dict(zip(self._names, self.parts(theta), strict=True)), (x,))

    def double(self) -> FlatNetwork:
        """The same in float64, for checks of gradients."""
        return FlatNetwork(lambda: self._build().double())

    @torch.no_grad()
    def logits(self, theta: Tensor, x: Tensor, batch: int = 512) -> Tensor:
        """Like calling it, in batches and without a graph."""
        return torch.cat([self(theta, some) for some in x.split(batch)])

    def check(self, x: Tensor, classes: int) -> None:
        """Refuse a network that does not take ``x`` [N, ...], has not ``classes`` outputs, or is random in itself.

        Raises:
            InputError: with what it does instead.
        """
        try:
            theta = self.start(0)
            outputs, again = self.logits(theta, x[:2]), self.logits(theta, x[:2])
        except Exception as error:
            raise InputError(
                f"network: it does not take images of shape {list(x.shape[1:])} ({one_line(error)})"
            ) from error
        if outputs.shape != (len(x[:2]), classes):
            raise InputError(
                f"network: its output has shape {list(outputs.shape)} for {len(x[:2])} images, and {classes} classes "
                f"need [{len(x[:2])}, {classes}]"
            )
        if not torch.equal(outputs, again):
            raise InputError(
                "network: the same parameters gave two results for the same images: it is random, or keeps a state; "
                "take dropout and the like out of its forward()"
            )
