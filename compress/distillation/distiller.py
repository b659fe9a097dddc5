"""The outer loop: images and the student's step size learned so that students end where experts went.

Algorithm 1 of AST (arXiv 2310.10541); with ``DistillSettings.mtt()`` that of MTT (arXiv 2203.11932). The state is a
file, written every few iterations; what is random in an iteration comes from its number, so that a killed run ends in
the same bytes.
The set that is kept is the best of a few looks at it along the way, the real images it began with among them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from compress.distillation.episode import BETAS, Episode, balanced_factor, checkpoints, inner_batches, perturb
from compress.distillation.experts import Experts
from compress.distillation.judge import Judge
from compress.distillation.model_terms import ModelTerms
from compress.distillation.parts import expert_parts, loop_parts
from compress.distillation.state import State, read_state, write_state
from compress.distillation.student import GRADIENTS, Student
from compress.errors import InputError
from compress.files.cache import digest
from compress.files.outputs import remove_abandoned
from compress.progress import Progress, silent

__all__ = ["PREVIEW_FILE", "PROBED", "TRIED_RATES", "DistillSettings", "Distilled", "Distiller"]

PREVIEW_FILE = "preview.png"
_LEAST_RATE, _USUAL_RATE = 1e-5, 0.01
PROBED, _FIRST_MOVE, _FIRST_CHANGE = 5, 0.05, 0.02
TRIED_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
# Everything random has a seed of its own, made of this one's multiples, in 63 bits; clusters take 32.
_MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class DistillSettings:
    """How a set is distilled; defaults are AST's in kind, with numbers measured on small data (benchmarks/distill.py).

    Attributes:
        each: images a class.
        steps: N, the student's steps. ahead: M, epochs of the expert they are to cover.
        last: T+; students start at the expert's epochs 0 to T+ - 1.
        batch: synthetic images a step; None for all.
        rate: a at the start; it is learned. None: of a few, that with the least loss at the start. With one too large
            students overshoot, a collapses, and with it all gradients of images.
        rate_images, rate_rate: step sizes of the outer loop for images and a, with momentum 0.5. None: the first steps
            move images by 0.05 of a standard deviation and a by 2 %. The published ones (100 to 10,000; 1e-6 to 1e-4)
            differ by data set, images a class and N, as gradients do.
        representative, beta, balance, perturbation, momentum: AST's parts; see :mod:`compress.distillation.episode`.
            The balanced inner loss made sets worse (benchmarks/results/distill.md), and is off.
        looks: how often the set is judged, apart from the start; 0 keeps the last iterate unjudged.
        model_weight: length of the step on the model's terms, of that on the trajectories'.
        model_steps: on the model's terms alone, when all iterations are done; see compress/distillation/model_terms.py.
    """

    each: int = 1
    iterations: int = 150
    steps: int = 15
    ahead: int = 2
    last: int = 8
    batch: int | None = None
    rate: float | None = None
    rate_images: float | None = None
    rate_rate: float | None = None
    momentum: float = 0.9
    representative: bool = True
    beta: str = "aggregate"
    balance: bool = False
    perturbation: float = 1.0
    augmentations: tuple[str, ...] = ()
    gradients: str = "recomputed"
    looks: int = 4
    model_weight: float = 1.0
    model_steps: int = 200
    seed: int = 0

    def mtt(self) -> DistillSettings:
        """The same without AST's parts: MTT's student is plain SGD, whose fitting step size is ten times as large."""
        rate = None if self.rate is None else 10 * self.rate
        return replace(
            self, representative=False, beta="none", balance=False, perturbation=0.0, momentum=0.0, rate=rate
        )

    def check(self, epochs: int) -> None:
        """Refuse what cannot be with experts of ``epochs`` epochs.

        Raises:
            InputError: with the option's name.
        """
        least = {"--ipc": (self.each, 1), "--iterations": (self.iterations, 1), "--steps": (self.steps, 1)}
        least |= {"--ahead": (self.ahead, 1), "--start-epochs": (self.last, 1), "--looks": (self.looks, 0)}
        least |= {"--model-steps": (self.model_steps, 0)}
        least |= {"--batch": (self.batch, 1)} if self.batch is not None else {}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise InputError(f"{name} {value}: at least {minimum}")
        if not 0 <= self.seed <= _MOST_SEED:
            raise InputError(f"--seed {self.seed}: 0 to {_MOST_SEED}")
        if self.steps < self.ahead:
            raise InputError(f"--steps {self.steps} --ahead {self.ahead}: at least one student step for an epoch")
        if self.last + self.ahead - 1 > epochs:
            raise InputError(
                f"--start-epochs {self.last} --ahead {self.ahead}: students would be compared with epoch "
                f"{self.last + self.ahead - 1}, and experts have {epochs}; give --expert-epochs or fewer of the others"
            )
        numbers = {"--lr-images": self.rate_images, "--lr-step": self.rate_rate, "--step-size": self.rate}
        for name, number in numbers.items():
            if number is not None and not 0 < number < math.inf:
                raise InputError(f"{name} {number:g}: a number above 0")
        factors = {"--perturbation": self.perturbation, "--model-weight": self.model_weight, "momentum": self.momentum}
        for name, factor in factors.items():
            if not 0 <= factor < math.inf:
                raise InputError(f"{name} {factor:g}: a number, 0 or above")
        if self.beta not in BETAS:
            raise InputError(f"--intermediate {self.beta}: known are {', '.join(BETAS)}")
        if self.gradients not in GRADIENTS:
            raise InputError(f"--gradients {self.gradients}: known are {', '.join(GRADIENTS)}")


@dataclass(frozen=True, eq=False)
class Distilled:
    """What came out.

    Attributes:
        images: [n, C, H, W], in the standardised form.
        rate: step size to train on them with: the learned one, or a usual one where networks became better with it.
        iteration: which iterate it is; 0 for the real images of the start.
        scores: accuracy by iteration judged, on the judge's images.
        losses: L_out of every iteration. matching: L_TM of every iteration.
        stopped: why the loop ended early, or None.
        learned: the step size as learned; None: from a state that an older version wrote.
    """

    images: Tensor
    rate: float
    iteration: int
    scores: dict[int, float]
    losses: list[float]
    matching: list[float]
    stopped: str | None = None
    learned: float | None = None


class Distiller:
    """Distils from ``experts``, which are trained.

    Args:
        start: real images to begin with, standardised [n, C, H, W]. labels: their classes [n].
        judge: None to keep the last iterate.
        terms: of a model that the set is to suit.
        state: file to go on from, and to write.
        every: iterations between two writes, and two calls of ``show``.
        discard: begin anew where ``state`` is another run's, in the place of refusing it.
        show: called with the images as they are.
    """

    def __init__(
        self,
        experts: Experts,
        start: Tensor,
        labels: Tensor,
        settings: DistillSettings,
        *,
        judge: Judge | None = None,
        terms: ModelTerms | None = None,
        state: Path | None = None,
        every: int = 25,
        discard: bool = False,
        show: Callable[[Tensor], None] = lambda images: None,
    ) -> None:
        settings.check(experts.settings.epochs)
        self.experts, self.labels, self.settings = experts, labels, settings
        self._start, self._judge, self._terms = start, judge, terms
        self._file, self._every, self._show, self._discard = state, every, show, discard
        self._student = Student(experts.network, settings.momentum, augmentations=settings.augmentations)
        judged = judge.fingerprint if judge else None
        identity, suited = experts.identity, terms.fingerprint if terms else ""
        self.fingerprint = digest([asdict(settings), identity, experts.settings.count, suited, judged, every])
        self._parts = {
            "the data": identity["data"], "the network": identity["network"], "the model": suited or "none",
            "what sets are judged on": judged or "nothing", "iterations between writes": str(every),
            **expert_parts(asdict(experts.settings)), **loop_parts(asdict(settings)),
        }  # fmt: skip

    def run(self, progress: Progress = silent) -> Distilled:
        """All iterations, from where the state's file stands.

        Raises:
            InputError: the file is another run's, or the loop ended early and there is no judge to say whether what it
                had come to is worth keeping.
        """
        state = self._continued()
        try:
            stopped = self._go_on(state, progress)
        except KeyboardInterrupt:  # it holds the last iteration that was finished, whole
            self._write(state)
            raise
        images, rate, iteration = state.images, state.rate, state.iteration
        learned: float | None = rate
        if state.best is not None:
            images, rate, iteration = state.best, state.best_rate, state.best_iteration
            learned = state.best_learned
        return Distilled(images, rate, iteration, state.scores, state.losses, state.matching, stopped, learned)

    def _go_on(self, state: State, progress: Progress) -> str | None:
        """To the last iteration; a sentence if there can be no more before it."""
        settings, saved = self.settings, state.iteration
        while True:
            if self._looks_at(state.iteration) and state.iteration not in state.scores:
                self._look(state, progress)
            due = state.iteration % self._every == 0 and state.iteration > saved
            if due or state.iteration == settings.iterations:
                self._write(state)
                self._show(state.images)
            if state.iteration == settings.iterations:
                return None
            stopped = self._iterate(state)
            if stopped and state.best is None:
                raise InputError(f"{stopped}, or give --looks, so that the best set so far is kept")
            if stopped:
                return stopped
            progress(f"distilling, loss {state.losses[-1]:.3f}", state.iteration, settings.iterations)

    def episode(self, iteration: int) -> Episode:
        """What iteration ``iteration`` matches; the same at every call."""
        settings, count = self.settings, self.experts.settings.count
        generator = Generator().manual_seed(settings.seed * 1_000_003 + iteration)
        order = torch.randperm(count, generator=Generator().manual_seed(settings.seed + iteration // count))
        expert = int(order[iteration % count])
        epoch = int(torch.randint(settings.last, (), generator=generator))
        rows = self.experts.rows(expert, epoch, epoch + settings.ahead + 1)
        parts = perturb(self.experts.network.parts(rows[0]), settings.perturbation, generator)
        start = torch.cat([each.reshape(-1) for each in parts])
        batches = inner_batches(len(self.labels), settings.batch or len(self.labels), settings.steps, generator)
        return Episode(
            start,
            checkpoints(start, list(rows[1:]), settings.steps, settings.beta),
            batches,
            balanced_factor(epoch, settings.last) if settings.balance else 1.0,
            settings.seed * 1_000_003 + iteration,
        )

    def _iterate(self, state: State) -> str | None:
        """One outer step; a sentence if there can be no more."""
        settings = self.settings
        outcome = self._student.outcome(
            state.images, self.labels, state.rate, self.episode(state.iteration), settings.gradients
        )
        gradient = outcome.images
        if self._terms is not None:
            extra = self._terms.gradient(state.images, self.labels)
            # The two have no common unit: the model's terms get a step of the same length, times a weight.
            gradient = gradient + settings.model_weight * gradient.norm() / extra.norm().clamp(min=1e-12) * extra
        velocity = 0.5 * state.velocity + gradient
        images = state.images - state.rate_images * velocity
        numbers = math.isfinite(outcome.loss) and math.isfinite(outcome.rate)
        if not (numbers and bool(images.isfinite().all())):  # what the state holds is still good
            return (
                f"the loss was {outcome.loss} at iteration {state.iteration + 1}, step size {state.rate:.3g}, and "
                "images would not be finite after it; try a smaller --lr-images, --lr-step or --step-size"
            )
        rate_velocity = 0.5 * state.rate_velocity + outcome.rate
        state.change(
            images=images,
            velocity=velocity,
            rate_velocity=rate_velocity,
            # A step size of 0 or less would let students stand still or climb, from where no gradient leads back.
            rate=max(state.rate - state.rate_rate * rate_velocity, _LEAST_RATE),
            losses=[*state.losses, outcome.loss],
            matching=[*state.matching, outcome.matching],
            iteration=state.iteration + 1,
        )
        return None

    def _rates(self) -> tuple[float, float, float]:
        """a, and the outer step sizes for images and for a: those given, or by the first iterations at the start."""
        settings, episodes = self.settings, [self.episode(number) for number in range(PROBED)]
        rate = settings.rate
        if rate is None:
            tried = [each if settings.momentum else 10 * each for each in TRIED_RATES]
            losses = [
                sum(self._student.losses(self._start, self.labels, each, episode)[0] for episode in episodes)
                for each in tried
            ]
            finite = [each if math.isfinite(each) else math.inf for each in losses]
            rate = tried[finite.index(min(finite))]
        if settings.rate_images is not None and settings.rate_rate is not None:
            return rate, settings.rate_images, settings.rate_rate
        outcomes = [
            self._student.outcome(self._start, self.labels, rate, episode, settings.gradients) for episode in episodes
        ]
        pixels = sum(float(each.images.square().mean().sqrt()) for each in outcomes) / PROBED
        change = sum(abs(each.rate) for each in outcomes) / PROBED
        if not (0 < pixels < math.inf and 0 < change < math.inf):
            raise InputError(
                f"gradients of images are {pixels:.3g}, of step size {change:.3g}: students stand still or blow up; "
                "try another --step-size"
            )
        return (
            rate,
            _FIRST_MOVE / pixels if settings.rate_images is None else settings.rate_images,
            _FIRST_CHANGE * rate / change if settings.rate_rate is None else settings.rate_rate,
        )

    def _looks_at(self, iteration: int) -> bool:
        looks, whole = self.settings.looks, self.settings.iterations
        return self._judge is not None and looks > 0 and iteration in {whole * n // looks for n in range(looks + 1)}

    def _look(self, state: State, progress: Progress) -> None:
        assert self._judge is not None
        progress("training networks on the set", state.iteration, self.settings.iterations)
        # The step size of the start was searched for short students, not for training: a usual one is tried beside it,
        # so that the real images are not called worse for it.
        usual = _USUAL_RATE if self.settings.momentum else 10 * _USUAL_RATE
        score, rate = max((self._judge.accuracy(state.images, self.labels, each), each) for each in (state.rate, usual))
        better = state.best is None or score >= max(state.scores.values())
        best = {
            "best": state.images.clone(),
            "best_rate": rate,
            "best_iteration": state.iteration,
            "best_learned": state.rate,
        }
        state.change(scores=state.scores | {state.iteration: score}, **(best if better else {}))

    @property
    def kept(self) -> bool:
        """Whether a state is on disk."""
        return self._file is not None and self._file.exists()

    def forget(self) -> None:
        """Delete the state and the preview beside it, and their folder if nothing else is in it."""
        if self._file is None:
            return
        for name in (self._file.name, PREVIEW_FILE):
            (self._file.parent / name).unlink(missing_ok=True)
            remove_abandoned(self._file.parent, name)
        with contextlib.suppress(OSError):  # there is none, or it holds what is not ours
            self._file.parent.rmdir()

    def _begun(self) -> State:
        return State(self._start.clone(), torch.zeros_like(self._start), *self._rates())

    def _continued(self) -> State:
        if self._file is None or not self.kept:
            return self._begun()
        state = read_state(self._file, self.fingerprint, self._parts, discard=self._discard)
        if state is None:
            self.forget()
            return self._begun()
        return state

    def _write(self, state: State) -> None:
        if self._file is not None:
            write_state(self._file, state, self.fingerprint, self._parts)
