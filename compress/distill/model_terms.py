"""A model's own terms: a distilled set that is to calibrate it should drive its layers as real data does.

BatchNorm's running statistics against those of the set, as in DeepInversion (arXiv 1912.08795, section 3.2), and the
mean logits of each class against those of the real images. Differences are relative to the statistics' own spread, so
that layers of any scale weigh alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.checkpoint import fingerprint
from compress.distill.standardisation import Standardisation
from compress.errors import InputError
from compress.factory import one_line

__all__ = ["ModelTerms"]

_BATCH = 256
_EPSILON = 1e-5


class ModelTerms:
    """The terms of ``module``, which is in evaluation mode and stays as it is.

    Args:
        x: real images as the model takes them [N, C, H, W]. labels: their classes [N].
        standardisation: between them and what is distilled.

    Attributes:
        norms: BatchNorm layers with running statistics, by name; where there are none, logits alone are matched.

    Raises:
        InputError: the model does not take the images, or gives no logits [N, classes].
    """

    def __init__(
        self, module: nn.Module, x: Tensor, labels: Tensor, classes: int, standardisation: Standardisation
    ) -> None:
        self.module = module
        self._standardisation, self._classes = standardisation, classes
        self.norms = {
            name: part
            for name, part in module.named_modules()
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and part.running_mean is not None
        }
        self.fingerprint = fingerprint(module)
        try:
            with torch.no_grad():
                logits = torch.cat([module(some) for some in x.split(_BATCH)])
        except Exception as error:
            raise InputError(
                f"--model: it does not take images of shape {list(x.shape[1:])} ({one_line(error)})"
            ) from error
        if logits.dim() != 2 or logits.shape[1] < classes:
            raise InputError(f"--model: its output has shape {list(logits.shape)}, not [{len(x)}, {classes}] or more")
        self._means = torch.stack([logits[labels == each].mean(0) for each in range(classes)])
        self._variance = logits.var(0, correction=0).mean().clamp(min=_EPSILON)

    def values(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The term of BatchNorm's statistics (a mean over channels and layers) and that of logits (over classes)."""
        seen: dict[str, Tensor] = {}
        handles = [
            part.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
            for name, part in self.norms.items()
        ]
        try:
            logits = self.module(self._standardisation.invert(images))
        finally:
            for handle in handles:
                handle.remove()
        terms = []
        for name, x in seen.items():
            mean, var = self.norms[name].running_mean, self.norms[name].running_var
            assert mean is not None
            assert var is not None
            places = [axis for axis in range(x.dim()) if axis != 1]
            shift = (x.mean(places) - mean).square() / (var + _EPSILON)
            spread = ((x.var(places, correction=0) + _EPSILON) / (var + _EPSILON)).sqrt() - 1
            terms.append((shift + spread.square()).mean())
        statistics = torch.stack(terms).mean() if terms else logits.new_zeros(())
        present = labels.unique()
        means = torch.stack([logits[labels == each].mean(0) for each in present])
        return statistics, (means - self._means[present]).square().mean() / self._variance

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of the sum of both terms with respect to ``images`` [n, C, H, W] in the standardised form."""
        images = images.detach().requires_grad_()
        statistics, logits = self.values(images, labels)
        return torch.autograd.grad(statistics + logits, images)[0]
