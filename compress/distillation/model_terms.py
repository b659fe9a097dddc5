"""A model's own terms: a distilled set that is to calibrate it should drive its layers as real data does.

BatchNorm's running statistics against those of the set (compress/data/norm_distance.py), and the mean logits of each
class against those of the real images, relative to their spread.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.data.image_fit import ImageFit, fit_images
from compress.data.norm_distance import norm_distance
from compress.distillation.standardisation import Standardisation
from compress.errors import InputError, one_line
from compress.models.checkpoint import fingerprint
from compress.progress import Progress, silent

__all__ = ["ModelTerms"]

_BATCH = 256
_EPSILON = 1e-5
_RATE = 0.02  # deviations of the images
# ResNet-20: 0.02 on the images it takes, 0.14 with half of their contrast (93 % right), 0.4 where they are scaled to
# 0..1 (34 %), 3,000 where to 0..255 (10 %).
_FAR, _FITS = 0.3, 0.1


class ModelTerms:
    """The terms of ``module``, which is in evaluation mode and stays as it is.

    Args:
        x: real images as the model takes them [N, C, H, W]. labels: their classes [N].
        standardisation: between them and what is distilled.

    Attributes:
        accuracy: share of the real images that it gives their label.
        distance: of their statistics to BatchNorm's, as the set's is minimised; None where no layer keeps any, and
            logits alone are matched.

    Raises:
        InputError: the model does not take the images, or gives no logits [N, classes].
    """

    def __init__(
        self, module: nn.Module, x: Tensor, labels: Tensor, classes: int, standardisation: Standardisation
    ) -> None:
        self.module = module
        self._standardisation, self._classes = standardisation, classes
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
        self.accuracy = float((logits.argmax(1) == labels).double().mean())
        self._chance = float(torch.bincount(labels, minlength=classes).max()) / len(labels)
        # Some from everywhere: files are often sorted by class.
        some = torch.linspace(0, len(x) - 1, min(len(x), _BATCH)).long()
        with torch.no_grad():
            _, distance, norms = norm_distance(module, x[some])
        self.distance = float(distance) if norms else None

    @property
    def fit(self) -> str:
        """How well model and images go together, as a sentence."""
        right = f"the model gives {100 * self.accuracy:.1f} % of the real images their label"
        if self.distance is None:
            return right
        return f"{right}, and they are {self.distance:.2g} from its BatchNorm statistics (usual: below {_FAR:g})"

    @property
    def doubts(self) -> tuple[str, ...]:
        """A warning if the images seem to be none that the model was trained on."""
        if self.distance is None or self.distance <= _FAR:
            return ()
        return (f"{self.fit}: it seems to take images of another scale; see --mean and --std",)

    def require_fitting(self) -> None:
        """Refuse a model that knows nothing of the images.

        Raises:
            InputError: its accuracy is less than a tenth of the way from guessing to 1.
        """
        if self.accuracy >= self._chance + _FITS * (1 - self._chance):
            return
        raise InputError(
            f"--model: {self.fit}; guessing gives {100 * self._chance:.1f} %. Images are scaled otherwise than it "
            "takes them (see --mean and --std), or labels are in another order; if it is to be so, give "
            "--allow-poor-model"
        )

    def values(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The term of BatchNorm's statistics (a mean over channels and layers) and that of logits (over classes)."""
        logits, statistics, _ = norm_distance(self.module, self._standardisation.invert(images))
        present = labels.unique()
        means = torch.stack([logits[labels == each].mean(0) for each in present])
        return statistics, (means - self._means[present]).square().mean() / self._variance

    def fitted(self, images: Tensor, labels: Tensor, steps: int, progress: Progress = silent) -> ImageFit:
        """``images``, standardised, after ``steps`` steps on these terms alone (BatchNorm's, logits').

        Beside the trajectories' gradient, whose length theirs is given, the terms stay where steps of that length leave
        them; alone they come down by more than an order of magnitude while images move little.
        """
        return fit_images(images, lambda z: self.values(z, labels), steps, _RATE, progress)

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of the sum of both terms with respect to ``images`` [n, C, H, W] in the standardised form."""
        images = images.detach().requires_grad_()
        statistics, logits = self.values(images, labels)
        return torch.autograd.grad(statistics + logits, images)[0]
