"""Transformed copies along the walk: one transformation for all blocks, each block learned on originals and copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.calib.blocks import Block
from compress.calib.frontier import Frontier
from compress.calib.metaaug.network import make_network
from compress.calib.metaaug.phase import MetaPhase, Outcome
from compress.calib.metaaug.settings import MetaAug
from compress.calib.metaaug.site import find_site
from compress.calib.metaaug.stretch import Stretch
from compress.calib.metaaug.warm_start import warm_start
from compress.calib.reconstruction import BlockMethod, BlockProblem, LearnedBlock
from compress.calib.resume import ResumeStore
from compress.calib.tokens import real_tokens
from compress.calib.walk import Walk
from compress.graph.layers import layer_calls
from compress.graph.traced import TracedModel

__all__ = ["Augmentation"]


class Augmentation:
    """The transformation of a walk's samples, as it is after the blocks so far.

    Args:
        walk: has samples.
        seed: function from a name to its seed.
        store: the transformation, after its warm-up and after each block's phase.
        say: called with how far it is.

    Raises:
        InputError: nothing that the graph reads can be transformed; see :func:`find_site`.
    """

    def __init__(
        self,
        walk: Walk,
        settings: MetaAug,
        seed: Callable[[str], int],
        store: ResumeStore,
        say: Callable[[str], None],
    ) -> None:
        assert walk.inputs is not None
        self.walk, self.settings, self.seed, self.store, self.say = walk, settings, seed, store, say
        self.inputs = walk.inputs
        self.site = find_site(walk.float_model, self.inputs)
        self.values = self.plain = self._at_site(walk.float_model)
        mask = real_tokens(walk.float_model, self.inputs)
        if mask is not None and self.values.shape[:2] == mask.shape:
            self.values = self.plain * mask[..., None]  # what stands at padding is no neighbour of what is real
        layers = list(layer_calls(walk.model))
        self.ends = {layers[0], layers[-1]}
        self._unusable = _unusable(walk.model, self.values)
        self._after: str | None = None
        self._network: nn.Module | None = None

    def passed(self, block: Block) -> None:
        """The block was finished by an earlier run: what the transformation was after it is what it is now."""
        if self.store.has(_after(block)):
            self._after, self._network = _after(block), None

    @contextmanager
    def augmented(self, problem: BlockProblem, method: BlockMethod) -> Iterator[tuple[BlockProblem, str | None]]:
        """The problem on originals and copies, once the transformation has learned on its block, and a remark.

        The first and the last layer, each a block of its own, are learned on the originals alone, as published.
        """
        block = problem.block
        if len(block.layers) == 1 and block.layers[0] in self.ends:
            yield problem, None
            return
        outcome = self._phase(problem, method)
        if outcome.failure is not None:
            yield problem, f"learned without transformed copies: {outcome.failure}"
            return
        note = None
        if self.settings.margin_weight and outcome.change < self.settings.margin:
            collapsed = outcome.change < _COLLAPSED * self.settings.margin
            note = (
                f"{'the transformation collapsed to the identity' if collapsed else 'margin not quite met'}: "
                f"it changes the samples by {outcome.change:.2g} of their variance, {self.settings.margin:g} are wanted"
            )
        elif outcome.change > _LARGEST_CHANGE:
            note = f"copies are {outcome.change:.2g} of the samples' variance away from them, hardly like them any more"
        ahead, reference = self._frontiers()
        try:
            kept = [block.output]
            if block.input is not None:
                kept.append(block.input)
                ahead.advance(block.input)
            reference.advance(block.output, keep=tuple(kept))
            # Published are twice as many images a step as without copies. Measured on ResNet-20 (W2A2, 64 images, five
            # seeds): no better, 78.2 against 78.9 %, and 1.45 times as long.
            yield replace(problem, ahead=ahead, reference=reference, samples=2 * problem.samples), note
        finally:
            ahead.close()
            reference.close()

    def _phase(self, problem: BlockProblem, method: BlockMethod) -> Outcome:
        if self._unusable is not None:
            return Outcome(self._unusable, 0.0)
        name = _after(problem.block)
        found = self.store.load(name)
        if found is not None:
            self._after, self._network = name, None
            return Outcome(found[1].get("failure"), float(found[1]["change"]))
        network = self.network()
        seed = self.seed(name)
        learned = LearnedBlock(problem, method, torch.Generator().manual_seed(seed))
        phase = MetaPhase(
            network,
            learned,
            self.walk.float_model,
            self.walk.model,
            self.inputs,
            self.site,
            self.values,
            self.settings,
            seed,
        )
        outcome = phase.run(self._say(f"block {problem.block.name}: meta step"))
        strings = {"change": repr(outcome.change)}
        if outcome.failure is not None:
            strings["failure"] = outcome.failure
        self.store.save(name, dict(network.state_dict()), strings)
        return outcome

    def network(self) -> nn.Module:
        """The transformation as it is, made and warmed up on first use."""
        if self._network is None:
            shape = tuple(self.values.shape[1:])
            network = make_network(shape, self.settings.published_network, self.seed(_WARM))
            found = self.store.load(self._after or _WARM)
            if found is not None:
                network.load_state_dict(found[0])
            else:
                margin = self.settings.margin * float(self.values.var(correction=0))
                said = self._say("transformation: warm-up step")
                warm_start(network, self.values, self.settings.warm_up, margin, self.seed(_WARM), said)
                self.store.save(_WARM, dict(network.state_dict()), {})
            self._network = network.train(self.settings.batch_statistics)
        return self._network

    @torch.no_grad()
    def _copies(self) -> Tensor:
        network = self.network()
        return torch.cat([network(x) for x in self.values.split(self.settings.batch)])

    @torch.no_grad()
    def _at_site(self, model: TracedModel) -> Tensor:
        """The value that is transformed, of all samples, as ``model`` has it: a quantized one looks up rounded rows."""
        if self.site in model.input_names:
            return self.inputs[model.input_names.index(self.site)]
        batch = self.settings.batch if model.dynamic_batch else len(model.example[0])
        site = Stretch(model, [self.site])
        batches = zip(*(x.split(batch) for x in self.inputs), strict=True)
        return torch.cat([site(each, {})[0] for each in batches])

    def _frontiers(self) -> tuple[Frontier, Frontier]:
        """Of the quantized and of the float graph, over all samples and, behind them, their copies."""
        names, plain, quantized = self.walk.model.input_names, self.plain, self._at_site(self.walk.model)
        copies = self._copies()
        both = torch.cat([plain, copies])
        # What is transformed may be all the memory there is to speak of: an input stands in its own place, and once.
        twice = tuple(
            both if name == self.site else torch.cat([x, x]) for name, x in zip(names, self.inputs, strict=True)
        )
        ahead = both if quantized is plain else torch.cat([quantized, copies])
        scratch = self.walk.scratch
        return (
            Frontier(self.walk.model, twice, scratch / "copies-quantized", given={self.site: ahead}),
            Frontier(self.walk.float_model, twice, scratch / "copies-float", given={self.site: both}),
        )

    def _say(self, label: str) -> Callable[[int, int, float], None]:
        started = time.monotonic()

        def say(done: int, total: int, loss: float) -> None:
            left = (time.monotonic() - started) / done * (total - done)
            self.say(f"{label} {done} of {total}, loss {loss:.3g}, {left:.0f} s left")

        return say


_WARM = "metaaug warm-up"
_FEWEST = 3
_COLLAPSED = 0.5
_LARGEST_CHANGE = 1.0  # of the samples' variance: as far as samples are from their mean


def _unusable(model: TracedModel, values: Tensor) -> str | None:
    batch = len(values) if model.dynamic_batch else len(model.example[0])
    if batch < _FEWEST:
        return f"{batch} samples in a batch are fewer than the {_FEWEST} whose similarities can be compared"
    return None if bool((values != values[:1]).any()) else "all samples are the same"


def _after(block: Block) -> str:
    return f"metaaug {block.output}"
