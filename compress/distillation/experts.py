"""Expert trajectories: a network's parameters after every epoch of training on the real data, kept on disk.

AST (arXiv 2310.10541, section 3) makes experts that are strong and still smooth enough to be followed: SGD with
momentum, a cross-entropy that is turned up over the first ten epochs, and a gradient penalty (here: where asked for).
MTT's are plain SGD.

A file holds one expert: ``trajectory`` [epochs + 1, P], and who it is in its metadata. An expert in training is a file
of its own, written after every epoch, from which the next run goes on to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import safetensors
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from compress.distillation.augment import augment
from compress.distillation.network import FlatNetwork
from compress.distillation.parts import differences, expert_parts
from compress.distillation.penalty import gradient_penalty
from compress.distillation.tensorfile import read_tensors, write_tensors
from compress.errors import InputError
from compress.files.cache import digest
from compress.files.outputs import remove_abandoned
from compress.progress import Progress, silent

__all__ = ["ExpertSettings", "Experts", "accuracy_of", "clipping_factor", "require_learned", "train_expert"]

_RAMP, _RAMP_STEP = 10, 0.05
_LEARNED, _SAME_ACCURACY = 0.2, 0.01


@dataclass(frozen=True)
class ExpertSettings:
    """How experts are trained; defaults are AST's, but for their number, length, batch and rate, which suit small data.

    Attributes:
        rate: learning rate; falls to 0.6 of it after half of the epochs, where momentum starts anew (``drop``).
        clipping: multiply the cross-entropy by 0.50, 0.55 ... 0.95 over the first ten epochs.
        penalty: weight of :func:`~compress.distillation.penalty.gradient_penalty`. AST publishes 2, under which these
            short experts go where no student can follow: a part that is off until it is asked for.
    """

    count: int = 3
    epochs: int = 10
    batch: int = 100
    rate: float = 0.01
    momentum: float = 0.9
    decay: float = 1e-3
    clipping: bool = True
    penalty: float = 0.0
    drop: bool = True
    augmentations: tuple[str, ...] = ()
    seed: int = 0

    def mtt(self) -> ExpertSettings:
        """MTT's experts: plain SGD, whose fitting rate is ten times as large."""
        return replace(self, rate=10 * self.rate, momentum=0.0, decay=0.0, clipping=False, penalty=0.0, drop=False)

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            InputError: with the option's name.
        """
        for name, value in (
            ("--experts", self.count),
            ("--expert-epochs", self.epochs),
            ("--expert-batch", self.batch),
        ):
            if value < 1:
                raise InputError(f"{name} {value}: at least 1")
        if not 0 < self.rate < float("inf"):
            raise InputError(f"--expert-lr {self.rate:g}: a number above 0")
        for name, factor in (("--penalty", self.penalty), ("momentum", self.momentum), ("decay", self.decay)):
            if not 0 <= factor < float("inf"):
                raise InputError(f"{name} {factor:g}: a number, 0 or above")


def clipping_factor(epoch: int) -> float:
    """AST's clipping loss: 0.50, 0.55 ... 0.95 in epochs 0 to 9, then 1.

    It scales the cross-entropy alone, not decay or penalty: a warm-up of the data's part.
    """
    return 0.5 + _RAMP_STEP * epoch if epoch < _RAMP else 1.0


class Experts:
    """Experts of one network, data and settings in ``folder``, trained where they are missing.

    Args:
        x: training images [N, C, H, W], standardised or whitened.
        labels: classes [N].
        classes: how many there are.
        data: hash of images, labels and what was done to them.
    """

    def __init__(
        self,
        folder: Path,
        network: FlatNetwork,
        x: Tensor,
        labels: Tensor,
        classes: int,
        settings: ExpertSettings,
        data: str,
    ) -> None:
        settings.check()
        self.folder, self.network, self.settings = folder, network, settings
        self._x, self._labels, self._classes = x, labels, classes
        # Not their number: more of the same may be trained later.
        recipe = {name: value for name, value in asdict(settings).items() if name != "count"}
        self.identity = {"network": network.fingerprint, "data": data, "settings": digest(recipe)}
        # Beside the hash, so that a refusal can say which option it is.
        self._told = {**self.identity, "recipe": json.dumps(expert_parts(recipe))}

    def train(self, progress: Progress = silent) -> list[float]:
        """Make all experts that ``folder`` lacks; their accuracies on the training images.

        Raises:
            InputError: ``folder`` holds another network's, data's or recipe's, an expert has not learned (said as soon
                as the first one is done), or its parameters are not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        accuracies = []
        for number in range(self.settings.count):
            path = self.path(number)
            if path.exists():
                trajectory, claimed = self.read(number)
            else:
                claimed = None
                trajectory = train_expert(
                    self.network, self._x, self._labels, self.settings, number, self._told,
                    partial=path.with_suffix(".partial"), progress=progress,
                )  # fmt: skip
            if claimed is not None:
                self._require_same(path, trajectory, claimed)
            accuracy = require_learned(
                self.network, trajectory, self._x, self._labels, self._classes, number,
                batch=self.settings.batch,
            )  # fmt: skip
            if claimed is None:
                write_tensors(path, {"trajectory": trajectory}, {**self._told, "accuracy": repr(accuracy)})
                path.with_suffix(".partial").unlink(missing_ok=True)
            accuracies.append(accuracy)
            progress("experts", (number + 1) * self.settings.epochs, self.settings.count * self.settings.epochs)
        return accuracies

    def _clean(self) -> None:
        """Delete what processes that were killed have left and nothing goes on from."""
        remove_abandoned(self.folder, "expert-*")
        for partial in self.folder.glob("expert-*.partial"):
            if partial.with_suffix(".safetensors").exists():
                partial.unlink(missing_ok=True)

    def path(self, number: int) -> Path:
        """Of expert ``number``."""
        return self.folder / f"expert-{number:03}.safetensors"

    def read(self, number: int) -> tuple[Tensor, float]:
        """Trajectory [epochs + 1, P] of expert ``number``, and its accuracy when it was trained.

        Raises:
            InputError: the file is damaged or another network's, data's or recipe's.
        """
        tensors, told = read_tensors(self.path(number))
        _require_own(self.path(number), told, self._told)
        return tensors["trajectory"], float(told["accuracy"])

    def rows(self, number: int, first: int, last: int) -> Tensor:
        """Parameters [last - first, P] after epochs ``first`` to ``last`` - 1; the rest of the file is not read."""
        with safetensors.safe_open(self.path(number), framework="pt") as file:
            return file.get_slice("trajectory")[first:last]

    def _require_same(self, path: Path, trajectory: Tensor, claimed: float) -> None:
        """Names and shapes of parameters say nothing about a forward() that was edited since."""
        accuracy = accuracy_of(self.network, trajectory[-1], self._x, self._labels)
        if abs(claimed - accuracy) > _SAME_ACCURACY:
            raise InputError(
                f"{path} is a trajectory of another network: it says that {100 * claimed:.1f} % of the images were "
                f"right, and this one of the same parameters gives {100 * accuracy:.1f} %; give another "
                "--expert-folder, or delete it"
            )


def accuracy_of(network: FlatNetwork, theta: Tensor, x: Tensor, labels: Tensor) -> float:
    """Share of ``x`` [N, C, H, W] that ``theta`` [P] gives the class of in ``labels`` [N]."""
    return float((network.logits(theta, x).argmax(1) == labels).double().mean())


def train_expert(
    network: FlatNetwork,
    x: Tensor,
    labels: Tensor,
    settings: ExpertSettings,
    number: int = 0,
    identity: Mapping[str, str] = MappingProxyType({}),
    *,
    partial: Path | None = None,
    progress: Progress = silent,
) -> Tensor:
    """One trajectory [epochs + 1, P]: parameters at the start and after every epoch.

    Args:
        partial: written after every epoch, and gone on from if it is there.

    Raises:
        InputError: the parameters are not finite after an epoch, or ``partial`` is another run's.
    """
    trajectory = [network.start(settings.seed * 1_000_003 + number)]
    velocity = torch.zeros_like(trajectory[0])
    if partial is not None and partial.exists():
        found, told = read_tensors(partial)
        _require_own(partial, told, identity)
        trajectory, velocity = list(found["trajectory"]), found["velocity"]
    whole = settings.count * settings.epochs
    for epoch in range(len(trajectory) - 1, settings.epochs):
        late = settings.drop and epoch >= settings.epochs // 2 + 1
        if settings.drop and epoch == settings.epochs // 2 + 1:
            velocity = torch.zeros_like(velocity)  # the published code makes a new optimizer
        rate = settings.rate * (0.6 if late else 1.0)
        # Everything random in an epoch comes from its number, so that a continued run sees the same.
        generator = Generator().manual_seed(((settings.seed * 10_007 + number) * 10_007 + epoch) % 2**63)
        theta = trajectory[-1]
        for index in torch.randperm(len(x), generator=generator).split(settings.batch):
            gradient = _gradient(network, theta, x[index], labels[index], settings, epoch, generator)
            velocity = settings.momentum * velocity + gradient
            theta = theta - rate * velocity
        if not bool(theta.isfinite().all()):
            raise InputError(
                f"expert {number + 1}: its parameters are not finite after epoch {epoch + 1}; try a smaller --expert-lr"
            )
        trajectory.append(theta)
        if partial is not None:
            write_tensors(partial, {"trajectory": torch.stack(trajectory), "velocity": velocity}, identity)
        progress(f"expert {number + 1} of {settings.count}", number * settings.epochs + epoch + 1, whole)
    return torch.stack(trajectory)


def require_learned(
    network: FlatNetwork, trajectory: Tensor, x: Tensor, labels: Tensor, classes: int, number: int = 0, *, batch: int
) -> float:
    """The last epoch's accuracy on ``x``; ``batch`` images a step made the trajectory.

    Raises:
        InputError: it is less than a fifth of the way to 1, from what guessing the largest class or the expert's own
            random start gives: there would be noise to match.
    """
    before, accuracy = (accuracy_of(network, trajectory[place], x, labels) for place in (0, -1))
    chance = max(float(torch.bincount(labels, minlength=classes).max()) / len(labels), before)
    epochs, needed = len(trajectory) - 1, chance + _LEARNED * (1 - chance)
    if accuracy < needed:
        steps = -(-len(x) // batch)
        raise InputError(
            f"expert {number + 1} did not learn: {100 * accuracy:.1f} % of its own training images are right after "
            f"{epochs} epochs of {steps} steps ({epochs * steps} in all), guessing or its random start gives "
            f"{100 * chance:.1f} %, and {100 * needed:.1f} % are needed for a trajectory worth matching; check the "
            "labels, or change --expert-lr, --expert-epochs or --expert-batch (fewer images a step make more steps)"
        )
    return accuracy


def _gradient(
    network: FlatNetwork,
    theta: Tensor,
    x: Tensor,
    labels: Tensor,
    settings: ExpertSettings,
    epoch: int,
    generator: Generator,
) -> Tensor:
    """Of the whole loss at ``theta`` [P]."""
    theta = theta.detach().requires_grad_()
    logits = network(theta, augment(x, settings.augmentations, generator))
    loss = F.cross_entropy(logits, labels) * (clipping_factor(epoch) if settings.clipping else 1.0)
    if settings.penalty:
        loss = loss + settings.penalty * gradient_penalty(lambda clean: network(theta, clean), x)
    (gradient,) = torch.autograd.grad(loss, theta)
    return gradient + settings.decay * theta.detach()


def _require_own(path: Path, told: Mapping[str, str], identity: Mapping[str, str]) -> None:
    for part, what in (("network", "another network"), ("data", "other data"), ("settings", "other expert settings")):
        if told.get(part) != identity.get(part):
            apart = f"it names {told.get(part)}, needed is {identity.get(part)}"
            if part == "settings" and "recipe" in identity:
                apart = f"different: {differences(told.get('recipe'), json.loads(identity['recipe']))}"
            raise InputError(f"{path} is a trajectory of {what} ({apart}); give another --expert-folder, or delete it")
