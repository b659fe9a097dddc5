"""A plain training loop for classes or numbers: SGD or AdamW, checkpoints after every epoch, a stop at NaN."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from compress.errors import InputError, one_line
from compress.files.cache import digest
from compress.files.outputs import new_file
from compress.training.data import TrainingData

__all__ = ["Companion", "Epoch", "Recipe", "best_epoch", "criterion_of", "evaluate", "fit"]

_EVALUATED = 256


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        rate: learning rate at the start.
        schedule: "cosine" or "linear" to zero, "steps" (a tenth at half and at three quarters) or "constant".
        optimizer: "sgd", or "adamw", which has no use for ``momentum``.
    """

    epochs: int = 30
    batch: int = 128
    rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    optimizer: str = "sgd"
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            InputError: with the option's name.
        """
        for name, value, least in (("--epochs", self.epochs, 1), ("--batch", self.batch, 1)):
            if value < least:
                raise InputError(f"{name} {value}: at least {least}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise InputError(f"--lr {self.rate:g}: a number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"--weight-decay {self.weight_decay:g}: a number, 0 or above")
        if self.schedule not in ("cosine", "linear", "steps", "constant"):
            raise InputError(f"--schedule {self.schedule}: known are cosine, linear, steps, constant")
        if self.optimizer not in ("sgd", "adamw"):
            raise InputError(f"--optimizer {self.optimizer}: known are sgd, adamw")

    def factor(self, done: float) -> float:
        """Of the rate, when a share ``done`` of the training is over."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "linear":
            return 1 - done
        return 0.1 ** ((done >= 0.5) + (done >= 0.75)) if self.schedule == "steps" else 1.0

    def build_optimizer(self, module: nn.Module) -> Optimizer:
        """A new one over all parameters of ``module``."""
        if self.optimizer == "adamw":
            return AdamW(module.parameters(), self.rate, weight_decay=self.weight_decay)
        return SGD(module.parameters(), self.rate, self.momentum, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to; ``notes`` are the companion's sentences, ``judged`` what the judge said of it."""

    number: int
    loss: float
    rate: float
    notes: tuple[str, ...] = ()
    judged: float | None = None


class Companion(Protocol):
    """What a technique adds to the loop."""

    def step(self, source: str | None = None) -> AbstractContextManager[object]:
        """Around forward, backward and the optimizer's step on samples of ``source``, where there are several."""

    def penalty(self) -> Tensor:
        """Added to the loss."""

    def end_epoch(self, optimizer: Optimizer) -> tuple[str, ...]:
        """After every epoch; sentences about what changed."""

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        """Before the module's own state and the optimizer's are loaded; parameters may be replaced, in both."""


class Nothing:
    """A companion that adds nothing: ordinary training."""

    def step(self, source: str | None = None) -> AbstractContextManager[object]:
        """See :class:`Companion`."""
        return contextlib.nullcontext()

    def penalty(self) -> Tensor:
        """See :class:`Companion`."""
        return torch.zeros(())

    def end_epoch(self, optimizer: Optimizer) -> tuple[str, ...]:
        """See :class:`Companion`."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Companion`."""
        return {}

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        """See :class:`Companion`."""


@dataclass
class _State:
    """Where a run stands: everything that decides how it goes on."""

    epoch: int
    module: dict[str, Any]
    optimizer: dict[str, Any]
    companion: dict[str, Any]
    history: list[Epoch] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def beaten(self, judged: float) -> bool:
        """Whether ``judged`` is better than every epoch so far."""
        return all(judged > each.judged for each in self.history if each.judged is not None)


def criterion_of(data: TrainingData) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy for classes, mean squared error for numbers."""
    if data.classes:
        return F.cross_entropy

    def squared(output: Tensor, wanted: Tensor) -> Tensor:
        return F.mse_loss(output.reshape(wanted.shape), wanted)

    return squared


@torch.no_grad()
def evaluate(module: nn.Module, data: TrainingData) -> float:
    """Share of right classes, or mean squared error, in evaluation mode."""
    training = module.training
    module.eval()
    outputs = torch.cat([data.output(module, inputs) for inputs, _ in data.batches(_EVALUATED)])
    module.train(training)
    if data.classes:
        return float((outputs.argmax(1) == data.labels).double().mean())
    return float(F.mse_loss(outputs.reshape(data.labels.shape), data.labels))


def fit(
    module: nn.Module,
    data: TrainingData,
    recipe: Recipe,
    *,
    companion: Companion | None = None,
    judge: Callable[[nn.Module], float] | None = None,
    checkpoint: Path | None = None,
    fingerprint: str = "",
    discard: bool = False,
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> tuple[list[Epoch], str | None]:
    """Train ``module`` in place.

    Args:
        companion: what a technique adds; with ``judge`` one that leaves all shapes as they are.
        judge: called after every epoch; the module is left as it was after the one judged highest, the first of equals.
        checkpoint: written after every epoch, whole or not at all; a run that finds one of the same ``fingerprint`` and
            recipe goes on from it, to the same bytes.
        discard: throw a checkpoint away that is damaged or another run's; one of the same run is gone on from.
        progress: batches done, of all, and the last loss.

    Returns:
        All epochs, and why training stopped before its end (a loss that is not finite); the module is then as it was
        after the last good epoch.

    Raises:
        InputError: the recipe is impossible, or the checkpoint is damaged or another run's, and not to be discarded.
    """
    recipe.check()
    companion = companion or Nothing()
    optimizer = recipe.build_optimizer(module)
    state = _continued(module, optimizer, companion, recipe, checkpoint, fingerprint, discard)
    history = list(state.history)
    good = state
    module.train()
    with torch.random.fork_rng():
        for epoch in range(state.epoch, recipe.epochs):
            # Dropout too begins anew with every epoch, so that a run that goes on draws what it would have drawn.
            torch.manual_seed(recipe.seed * 100_003 + epoch)
            loss, broken = _train_epoch(module, data, recipe, optimizer, companion, epoch, progress)
            if broken:
                _restore(module, optimizer, companion, good)
                kept = _take_best(module, good)
                return good.history, (
                    f"{broken} of epoch {epoch + 1}: the model is as it was after epoch {kept}; try a smaller --lr"
                )
            notes = companion.end_epoch(optimizer)
            judged = judge(module) if judge is not None else None
            best = copy.deepcopy(module.state_dict()) if judged is not None and good.beaten(judged) else good.best
            history.append(Epoch(epoch + 1, loss, optimizer.param_groups[0]["lr"], notes, judged))
            good = _snapshot(epoch + 1, module, optimizer, companion, history, best)
            if checkpoint is not None:
                _write(checkpoint, good, recipe, fingerprint)
    _take_best(module, good)
    return history, None


def best_epoch(history: Sequence[Epoch]) -> int:
    """Number of the epoch judged highest, the first of equals; of the last where none was judged; 0 of none."""
    judged = [each for each in history if each.judged is not None]
    if judged:
        return max(judged, key=lambda each: each.judged or 0.0).number
    return history[-1].number if history else 0


def _take_best(module: nn.Module, state: _State) -> int:
    """Leave ``module`` as it was after the best epoch; its number."""
    if state.best is not None:
        module.load_state_dict(state.best)
    return best_epoch(state.history)


def _train_epoch(
    module: nn.Module,
    data: TrainingData,
    recipe: Recipe,
    optimizer: Optimizer,
    companion: Companion,
    epoch: int,
    progress: Callable[[int, int, float], None],
) -> tuple[float, str | None]:
    """The mean loss of all samples, and where it or the weights ceased to be finite (None: nowhere)."""
    criterion = criterion_of(data)
    batches = data.epoch(recipe.batch, recipe.seed * 100_003 + epoch)
    total = 0.0
    for step, (source, index) in enumerate(batches):
        done, steps = epoch * len(batches) + step, recipe.epochs * len(batches)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * recipe.factor(done / steps)
        inputs, labels = data.take(index)
        with companion.step(source):
            loss = criterion(data.output(module, inputs), labels)
            optimizer.zero_grad(set_to_none=True)
            (loss + companion.penalty()).backward()
            optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            return value, f"the loss was {value} at step {step + 1}"
        total += value * len(index)
        progress(done + 1, steps, value)
    # The last step's weights meet no other loss of this epoch, and would be what the next one goes back to.
    broken = None if _finite(module) else f"the weights were not finite after step {len(batches)}"
    return total / sum(len(index) for _, index in batches), broken


def _finite(module: nn.Module) -> bool:
    return all(bool(each.isfinite().all()) for each in module.state_dict().values())


def _snapshot(
    epoch: int,
    module: nn.Module,
    optimizer: Optimizer,
    companion: Companion,
    history: list[Epoch],
    best: dict[str, Any] | None = None,
) -> _State:
    parts = copy.deepcopy((module.state_dict(), optimizer.state_dict(), companion.state_dict()))
    return _State(epoch, *parts, list(history), best)


def _restore(module: nn.Module, optimizer: Optimizer, companion: Companion, state: _State) -> None:
    companion.load_state_dict(state.companion, optimizer)
    module.load_state_dict(state.module)
    optimizer.load_state_dict(state.optimizer)


def _continued(
    module: nn.Module,
    optimizer: Optimizer,
    companion: Companion,
    recipe: Recipe,
    checkpoint: Path | None,
    fingerprint: str,
    discard: bool,
) -> _State:
    found = None
    if checkpoint is not None and checkpoint.exists():
        found = _read(checkpoint, _run(recipe, fingerprint), discard)
    if found is None:
        return _snapshot(0, module, optimizer, companion, [])
    history = [Epoch(**{**each, "notes": tuple(each["notes"])}) for each in found["history"]]
    state = _State(found["epoch"], found["module"], found["optimizer"], found["companion"], history, found.get("best"))
    _restore(module, optimizer, companion, state)
    return state


def _read(checkpoint: Path, run: str, discard: bool) -> dict[str, Any] | None:
    """What ``checkpoint`` holds of ``run``; None if that is nothing, and to be thrown away."""
    try:
        found: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    except (RuntimeError, OSError, ValueError, LookupError, pickle.UnpicklingError) as error:
        if discard:
            return None
        raise InputError(f"{checkpoint} is damaged ({one_line(error)}); throw it away with --overwrite") from error
    if found["run"] == run:
        return found
    if discard:
        return None
    raise InputError(
        f"{checkpoint.parent} holds the checkpoint of another run (model, data or options); finish that one, "
        "choose another --out, or throw it away with --overwrite"
    )


def _write(checkpoint: Path, state: _State, recipe: Recipe, fingerprint: str) -> None:
    content = asdict(state)
    content["history"] = [{**asdict(each), "notes": list(each.notes)} for each in state.history]
    content["run"] = _run(recipe, fingerprint)
    with new_file(checkpoint) as temporary:
        torch.save(content, temporary)


def _run(recipe: Recipe, fingerprint: str) -> str:
    return digest({"recipe": asdict(recipe), "fingerprint": fingerprint})
