"""LT-SFT in a training loop of one's own (arXiv 2110.07560, section 3): train, select, go back, train the selected.

tuner = SparseFineTuner(model, density=0.05, head=("classifier",))
for phase in ("full", "sparse"):
    optimizer = torch.optim.AdamW(model.parameters(), ...)             # a new one: its state must not outlive the phase
    for x, y in batches:
        with tuner.step():
            loss = criterion(model(x), y) + tuner.penalty()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
    if phase == "full":
        tuner.select()                                                 # the mask; everything is as it was at the start
write_delta(tuner.delta(), "task.safetensors")

Baselines of the same size need no full phase: ``SparseFineTuner(model, density=0.05, criterion="random").select()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.criteria import (
    BY_GRADIENT,
    CRITERIA,
    UNTRAINED,
    count_entries,
    given_scores,
    scores_of,
    with_earlier,
)
from compress.sparse.delta import SparseDelta, SparseTensor, put, take
from compress.sparse.parts import divide, keeping_statistics
from compress.sparse.selection import top_k, top_n_of_m

__all__ = ["SparseFineTuner"]


class SparseFineTuner:
    """Finds and trains a sparse difference to ``module`` as it is now; the module is trained in place.

    Args:
        density: share of the maskable entries that are selected, rounded down; 0.01 if ``k`` is not given either.
        k: how many, instead.
        criterion: see :mod:`compress.sparse.criteria`. All but ``change`` select without a full phase; ``snip`` and
            ``gradient`` by what :meth:`gather` has added up.
        rounds: times that both phases are gone through, each selecting an equal part of ``k``; the next begins with
            :meth:`reopen`.
        pattern: (n, m): n of every m neighbours in a tensor are selected, instead of ``k`` of all; m a power of two.
            For research: nothing runs faster for it.
        head, frozen, train_norms: see :func:`~compress.sparse.parts.divide`. Norms that stay keep their running
            statistics too.
        l1: weights of the L1 distance from the start in the full and in the sparse phase: l1 / N * sum |p - p0|, N all
            parameters of the model.
        l1_everywhere: over all that is trained, as published; False: over maskable parameters alone.
        sources: deltas by name, one of which may be added for the time of a step (several languages of one task).
        seed: of ``random``.

    Attributes:
        parts: which parameters are selected from, trained whole, frozen.
        mask: selected flat indices, int64, by maskable parameter; None in the full phase.
        base: hash of the base that the delta is for; None: of the module as it was at the start. Whoever has added a
            delta before, to start from the sum, puts the hash of what was before that here.

    Raises:
        ValueError: an option is impossible, a pattern matches nothing, or there are fewer maskable entries than ``k``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        density: float | None = None,
        k: int | None = None,
        criterion: str = "change",
        rounds: int = 1,
        pattern: tuple[int, int] | None = None,
        head: Sequence[str] = (),
        frozen: Sequence[str] = (),
        train_norms: bool = False,
        l1: tuple[float, float] = (0.0, 0.0),
        l1_everywhere: bool = True,
        sources: Mapping[str, SparseDelta] | None = None,
        seed: int = 0,
    ) -> None:
        if criterion not in CRITERIA:
            raise ValueError(f"criterion {criterion!r}: known are {', '.join(CRITERIA)}")
        if not all(0 <= each < float("inf") for each in l1):
            raise ValueError(f"l1 {l1}: two finite numbers, neither below 0")
        self.module, self.criterion, self.seed = module, criterion, seed
        self.parts = divide(module, head=head, frozen=frozen, train_norms=train_norms)
        if not self.parts.maskable:
            raise ValueError("no parameter is left to select from: all are frozen, in the head or in norms")
        self.pattern, self.rounds = pattern, rounds
        self.k = count_entries(self.parts.maskable, criterion, density, k, pattern)
        if not self.k and not self.parts.dense:
            raise ValueError(
                f"0 of {self.parts.count:,} entries would be selected, and there is no head: nothing would be learned; "
                "give a larger k or density"
            )
        if not 1 <= rounds <= max(1, self.k) or (rounds > 1 and (criterion != "change" or pattern is not None)):
            raise ValueError(f"rounds {rounds}: with the criterion change and no pattern 1 to k, else 1")
        self.mask: dict[str, Tensor] | None = None
        self._round, self._earlier = 0, dict[str, Tensor]()
        self._gathered = dict[str, Tensor]()
        self._l1, self._penalised = l1, {**self.parts.maskable, **(self.parts.dense if l1_everywhere else {})}
        self._total = sum(each.numel() for each in module.parameters())
        self._parameters = dict(module.named_parameters())
        self._start = {name: each.detach().clone() for name, each in self._parameters.items()}
        self._buffers = {name: each.detach().clone() for name, each in module.named_buffers()}
        self.base: str | None = None
        self._sources = dict(sources or {})
        for name, each in self._sources.items():
            self._check_source(name, each)
        self._still = keeping_statistics(module, self.parts)
        self._running, self._handles = False, list[RemovableHandle]()
        self._added: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # indices, values before, values with the source

    @property
    def sparse(self) -> bool:
        """Whether the mask is there and training is in the sparse phase."""
        return self.mask is not None

    @contextmanager
    def step(self, source: str | None = None) -> Iterator[None]:
        """Around forward, backward and the optimizer's step; ``source`` is added for its time.

        After it everything that is not trained has the bits it had at the start, whatever the optimizer did: weight
        decay and momentum move entries whose gradient is zero.
        """
        self.begin_step(source)
        try:
            yield
        finally:
            self.end_step()

    def begin_step(self, source: str | None = None) -> None:
        """The first half of :meth:`step`, for loops that are not one's own.

        Raises:
            ValueError: there is no such source, or the last step was not ended.
        """
        self._check_ended()
        self._follow()
        if source is not None:
            if source not in self._sources:
                raise ValueError(f"source {source!r}: known are {', '.join(self._sources) or 'none'}")
            self._add(self._sources[source])
        self._running = True
        for layer in self._still:
            self._handles.append(layer.register_forward_pre_hook(_evaluating))
        for each in self.parts.frozen.values():
            if each.requires_grad:
                self._handles.append(each.register_hook(torch.zeros_like))
        for name, index in (self.mask or {}).items():
            each = self.parts.maskable[name]
            if len(index) < each.numel():
                self._handles.append(each.register_hook(_masking(index)))

    @torch.no_grad()
    def end_step(self) -> None:
        """The second half of :meth:`step`, after the optimizer's."""
        for handle in self._handles:
            handle.remove()
        self._running, self._handles = False, []
        for name, (index, before, added) in self._added.items():
            # The step's update goes to the value without the source; where there was none its bits come back.
            moved = take(self._parameters[name], index)
            put(self._parameters[name], index, torch.where(moved == added, before, before + (moved - added)))
        self._added = {}
        for name, each in self.parts.frozen.items():
            if each.requires_grad:  # others no optimizer touches
                each.copy_(self._start[name])
        for name, index in (self.mask or {}).items():
            each = self.parts.maskable[name]
            if len(index) < each.numel():
                trained = take(each, index)
                each.copy_(self._start[name])
                put(each, index, trained)

    def penalty(self) -> Tensor:
        """The L1 distance from the start, weighted; to be added to the loss, once an optimizer's step."""
        weight = self._l1[self.sparse]
        if not weight:
            return torch.zeros(())
        terms = []
        for name, each in self._penalised.items():
            start = self._start[name]
            if name in self._added:
                index, before, added = self._added[name]
                start = start.clone()
                put(start, index, take(start, index) + (added - before))
            terms.append((each - start).abs().sum())
        return weight / self._total * torch.stack(terms).sum()

    def select(self, scores: Mapping[str, Tensor] | None = None) -> None:
        """Choose the mask, exactly ``k`` entries over all maskable parameters, and begin the sparse phase.

        With ``rounds``, of round r exactly k r // rounds, those of earlier rounds among them.

        Parameters, head and buffers go back to where they were at the start. Ties go to the earlier parameter, then to
        the lower index.

        Args:
            scores: of one's own, instead of the criterion's: by maskable parameter, of its shape, none below 0.

        Raises:
            ValueError: it was called before, nothing has been trained or gathered yet, or a weight or score is not
                finite.
        """
        if self.mask is not None:
            raise ValueError("the mask is chosen already")
        self._check_ended()
        now = {name: each.detach() for name, each in self.parts.maskable.items()}
        if scores is not None:
            chunks = given_scores(scores, self._start_of(now))
        elif self.criterion in BY_GRADIENT:
            if not self._gathered:
                raise ValueError(f"{self.criterion} scores gradients: call gather() after backward, before select()")
            chunks = scores_of(self.criterion, self._gathered, self._start, self.seed)
        else:
            chunks = scores_of(self.criterion, now, self._start, self.seed)
            if self.criterion not in UNTRAINED and self.k and self._unmoved(now):
                raise ValueError("no maskable parameter has changed: train before select()")
        if self.pattern is not None:
            mask = top_n_of_m(chunks, *self.pattern)
        else:
            mask = top_k(with_earlier(chunks, self._earlier), self.k * (self._round + 1) // self.rounds)
        self.mask = {name: index.to(now[name].device) for name, index in mask.items()}
        self._gathered = {}
        self.rewind()

    def reopen(self) -> None:
        """Begin the next round with a full phase, from where the sparse phase has come to.

        Raises:
            ValueError: there is no mask yet, or this was the last round.
        """
        if self.mask is None or self._round + 1 >= self.rounds:
            raise ValueError(f"round {self._round + 1} of {self.rounds} is not over, or the last")
        self._earlier, self.mask = self.mask, None
        self._round += 1

    @torch.no_grad()
    def gather(self) -> None:
        """Add up the gradients there are, for ``snip`` and ``gradient``: after backward, nothing trained yet.

        Gradients of a mean over a batch count as often as they are gathered; weight the loss by the batch's size where
        batches differ.
        """
        for name, each in self.parts.maskable.items():
            sum_ = self._gathered.setdefault(name, torch.zeros_like(each))
            if each.grad is not None:
                sum_ += each.grad

    def use_mask(self, mask: Mapping[str, Tensor]) -> None:
        """Take a mask that was chosen before, instead of :meth:`select`, to go on in the sparse phase.

        Args:
            mask: flat indices, int64 and increasing, by maskable parameter, ``k`` in all.

        Raises:
            ValueError: it is another model's or run's.
        """
        for name in sorted(mask.keys() ^ self.parts.maskable.keys()):
            raise ValueError(f"{name} is {'no maskable parameter' if name in mask else 'not in the mask'}")
        for name, index in mask.items():
            size = self.parts.maskable[name].numel()
            inside = not len(index) or (int(index[0]) >= 0 and int(index[-1]) < size)
            if not inside or not bool((index.diff() > 0).all()):
                raise ValueError(f"{name}: indices must increase within its {size:,} entries")
        if self.rounds > 1:
            raise ValueError("a mask that was chosen before does not say its round; use rounds=1")
        if (count := sum(map(len, mask.values()))) != self.k:
            raise ValueError(f"the mask has {count:,} entries, not {self.k:,}")
        self.mask = {name: index.to(self.parts.maskable[name].device) for name, index in mask.items()}

    @torch.no_grad()
    def rewind(self) -> None:
        """Parameters and buffers as they were at the start, gradients gone."""
        self._check_ended()
        for name, each in self._parameters.items():
            each.copy_(self._start[name])
            each.grad = None
        for name, buffer in self.module.named_buffers():
            buffer.copy_(self._buffers[name])

    def delta(self) -> SparseDelta:
        """The difference that was learned: exactly ``k`` entries, zeros among them, and what was trained whole.

        Raises:
            ValueError: the mask is not chosen yet, a value is not finite, or an entry outside the mask has moved.
        """
        if self.mask is None:
            raise ValueError("the mask is not chosen yet: call select() after the full phase, and train again")
        if self._round + 1 < self.rounds:
            raise ValueError(f"round {self._round + 1} of {self.rounds} is not the last: call reopen()")
        self._check_ended()
        self._follow()
        tensors, dense = {}, {}
        for name, each in self._parameters.items():
            if not bool(each.isfinite().all()):
                raise ValueError(f"{name} is not finite after training; try a smaller learning rate")
            start = self._start[name]
            if name in self.parts.dense:
                dense[name] = each.detach().cpu().clone()
                continue
            rest, index = each.detach().clone(), self.mask.get(name, torch.empty(0, dtype=torch.int64))
            put(rest, index, take(start, index))
            if not torch.equal(rest, start):
                raise ValueError(f"{name} has moved outside the mask: put `with tuner.step():` around every step")
            if name in self.mask:
                values = take(each, index).double() - take(start, index).double()
                dtype = str(each.dtype).removeprefix("torch.")
                tensors[name] = SparseTensor(tuple(each.shape), dtype, index.cpu(), values.cpu())
        stored = base_tensors(self.module)
        for name, buffer in self.module.named_buffers():
            if name in stored and not torch.equal(buffer, self._buffers[name]):
                dense[name] = buffer.detach().cpu().clone()
        notes = {"criterion": self.criterion, "maskable": str(self.parts.count)}
        base = self.base
        if base is None:
            base = base_hash(tensor_hashes(self._start_of(stored)), dense)
        return SparseDelta(base, tensors, dense, notes, tuple(dense))

    def _check_ended(self) -> None:
        if self._running:
            raise ValueError("a step has begun and not ended: a source may be added, and gradients are masked")

    def _start_of(self, names: Mapping[str, object]) -> dict[str, Tensor]:
        return {name: self._start[name] if name in self._start else self._buffers[name] for name in names}

    def _unmoved(self, now: Mapping[str, Tensor]) -> bool:
        return all(torch.equal(each, self._start[name]) for name, each in now.items())

    def _check_source(self, source: str, delta: SparseDelta) -> None:
        for name, each in delta.tensors.items():
            there = tuple(self._parameters[name].shape) if name in self._parameters else None
            if there != each.shape:
                what = f"has shape {list(there)} here" if there else "is no parameter here"
                raise ValueError(f"source {source!r}: {name} of shape {list(each.shape)} {what}")

    @torch.no_grad()
    def _add(self, delta: SparseDelta) -> None:
        for name, each in delta.tensors.items():
            tensor = self._parameters[name]
            before = take(tensor, each.index)
            put(tensor, each.index, before.double() + each.values.to(before.device))
            self._added[name] = (each.index, before, take(tensor, each.index))

    def _follow(self) -> None:
        """Have the start where the module is: whoever trains may have moved it since."""
        for name, each in self._parameters.items():
            if self._start[name].device != each.device:
                self._start[name] = self._start[name].to(each.device)
                if self.mask is not None and name in self.mask:
                    self.mask[name] = self.mask[name].to(each.device)
        for name, buffer in self.module.named_buffers():
            self._buffers[name] = self._buffers[name].to(buffer.device)


def _evaluating(layer: nn.Module, _: object) -> None:
    """Before each call, as Trainers call train() within the step."""
    layer.eval()


def _masking(index: Tensor) -> Callable[[Tensor], Tensor]:
    """For a gradient: zero outside ``index``, so that clipping and shared statistics see only what is trained."""

    def mask(gradient: Tensor) -> Tensor:
        masked = torch.zeros_like(gradient)
        put(masked, index, take(gradient, index))
        return masked

    return mask
