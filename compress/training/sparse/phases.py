"""The phases of LT-SFT (arXiv 2110.07560, section 3): full fine-tuning, selection, sparse fine-tuning, a round each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from compress.errors import InputError
from compress.progress import Progress
from compress.sparse.criteria import BY_GRADIENT
from compress.sparse.tuner import SparseFineTuner
from compress.training.data import TrainingData
from compress.training.loop import Epoch, Recipe, best_epoch, criterion_of, evaluate, fit

__all__ = ["Phases", "SparseCompanion"]


class SparseCompanion:
    """:class:`~compress.sparse.tuner.SparseFineTuner` as the loop's companion, in either phase."""

    def __init__(self, tuner: SparseFineTuner) -> None:
        self.tuner = tuner

    def step(self, source: str | None = None) -> AbstractContextManager[object]:
        return self.tuner.step(source)

    def penalty(self) -> Tensor:
        return self.tuner.penalty()

    def end_epoch(self, optimizer: Optimizer) -> tuple[str, ...]:
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {}  # the mask is chosen again, the same, from the full phase's checkpoint

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        """Nothing to load."""


@dataclass
class Phases:
    """What a run's phases share, and what they have come to.

    Attributes:
        data: what is trained on.
        dev: of each phase the epoch is kept that is best on these; None: the last.
        source: beside whose delta epochs are judged; None: beside none.
        work: the folder of checkpoints.
        identity: what makes a run another one, for its checkpoints.
        discard: throw away another run's checkpoints.
        full_epochs, sparse_epochs: of all rounds.
        full_metric: what ``measure`` said after the last full phase; None where there was none.
        notes: sentences on which epochs were kept.
        stops: why phases ended early, as sentences.
    """

    tuner: SparseFineTuner
    data: TrainingData
    dev: TrainingData | None
    source: str | None
    work: Path
    identity: object
    discard: bool
    progress: Progress
    full_epochs: tuple[Epoch, ...] = ()
    sparse_epochs: tuple[Epoch, ...] = ()
    full_metric: float | None = None
    notes: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)

    def run(self, first: Recipe, second: Recipe, measure: Callable[[], float | None]) -> None:
        """Go through all of them, each from its checkpoint if there is one.

        Args:
            first, second: recipes of the full and the sparse phase.
            measure: the metric of the module as it is.

        Raises:
            InputError: training breaks in a phase's first epoch.
            ValueError: there is nothing to select.
        """
        for turn in range(self.tuner.rounds):
            if turn:
                self.tuner.reopen()
            if self.tuner.criterion == "change" and self.tuner.k:
                self.full_epochs += self._train("full", turn, first, second if turn else None)
                self.full_metric = measure()
            elif self.tuner.criterion in BY_GRADIENT:
                self._gather(first.batch)
            self.tuner.select()
            self.sparse_epochs += self._train("sparse", turn, second, first)

    def _train(self, kind: str, turn: int, recipe: Recipe, earlier: Recipe | None) -> tuple[Epoch, ...]:
        """One phase's epochs; on ``earlier``, the recipe of the phase before, it depends too."""
        number = f" {turn + 1}" if self.tuner.rounds > 1 else ""
        name = f"{kind} phase{number}"
        history, stopped = fit(
            self.tuner.module, self.data, recipe, companion=SparseCompanion(self.tuner),
            judge=self._judge if self.dev else None,
            checkpoint=self.work / f"{kind}{number}.pt",
            fingerprint=repr((self.identity, name, earlier)),
            discard=self.discard,
            progress=lambda done, total, loss: self.progress(f"{name}, loss {loss:.4f}", done, total),
        )  # fmt: skip
        if stopped and not history:
            raise InputError(f"{name}: {stopped}")
        if stopped:
            self.stops.append(f"{name} stopped early: {stopped}")
        if self.dev is not None:
            best = best_epoch(history)
            self.notes.append(f"{name}: of {len(history)} epochs number {best} was best on the samples of --dev")
        return tuple(history)

    def _judge(self, module: nn.Module) -> float:
        """The loop's judge: the accuracy on ``dev``, or minus the squared error."""
        assert self.dev is not None
        with self.tuner.step(self.source):
            return (1 if self.dev.classes else -1) * evaluate(module, self.dev)

    def _gather(self, batch: int) -> None:
        """The gradient of the summed loss over all ``data``, in evaluation mode, where dropout adds no chance."""
        tuner, data = self.tuner, self.data
        criterion = criterion_of(data)
        tuner.module.eval()
        for source, index in data.in_order(batch):
            inputs, labels = data.take(index)
            tuner.module.zero_grad(set_to_none=True)
            with tuner.step(source):
                (criterion(data.output(tuner.module, inputs), labels) * len(labels)).backward()
            tuner.gather()
        tuner.module.zero_grad(set_to_none=True)
