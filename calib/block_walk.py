"""Blocks along the walk: where one begins the frontiers are marked, where it ends they turn back and it is learned."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx

from compress.calib.blocks import Block, find_blocks
from compress.calib.importance import Importance
from compress.calib.metaaug.augmentation import Augmentation
from compress.calib.reconstruction import BlockMethod, BlockProblem, BlockSolution, reconstruct
from compress.calib.resume import ResumeStore
from compress.calib.walk import Walk
from compress.errors import InputError
from compress.graph.layers import is_stored, layer_calls, tied_tables
from compress.graph.quantizers import fake_quantize_op
from compress.graph.rewrite import layer_bias, set_bias, set_grid, set_weight
from compress.quant.methods import METHODS
from compress.quant.problem import STEP_SAMPLES, ActivationGrid, Effort, Solution
from compress.quant.weights import QuantizedWeight
from compress.records.plan import Plan
from compress.records.registry import resolve

__all__ = ["BlockWalk", "layer_seed"]


class BlockWalk:
    """Reconstructs the blocks of a plan whose layers are chosen by block methods; of no effect for others.

    Args:
        walk: the position that layers are quantized at.
        computes: what each chosen layer runs on.
        store: finished blocks.
        say: called with how far a block is.

    Raises:
        InputError: the plan has layers of two methods that transform samples, each in its way.
    """

    def __init__(
        self, walk: Walk, plan: Plan, computes: dict[str, str], store: ResumeStore, say: Callable[[str], None]
    ) -> None:
        self.walk, self.plan, self.computes, self.store, self.say = walk, plan, computes, store, say
        self.model = walk.model
        self.methods = _block_methods(walk, plan)
        self.starts: dict[str, Block] = {}
        self.ends: dict[str, Block] = {}
        self.augmentation: Augmentation | None = None
        transforms = {each.transform for each in self.methods.values() if each.transform is not None}
        if len(transforms) > 1:
            raise InputError("the plan has layers of metaaug and of metaaug-published; give all of them one of the two")
        for transform in transforms:
            self.augmentation = Augmentation(walk, transform, lambda name: layer_seed(plan.seed, name), store, say)
        self.order = [node.name for node in self.model.graph.nodes]
        for whole in (True, False):
            wanted = {layer for layer, method in self.methods.items() if method.whole_blocks is whole}
            for block in self._blocks(whole) if wanted else ():
                if wanted & set(block.layers):
                    self.starts[self._first(block, whole)] = block
                    self.ends[block.output] = block

    def _blocks(self, whole: bool) -> Iterator[Block]:
        """Blocks of the float graph, their layers as the changed one calls them: a split one keeps its place there."""
        names = {node.name: layer for layer, nodes in layer_calls(self.model).items() for node in nodes}
        calls = layer_calls(self.walk.float_model)
        for block in find_blocks(self.walk.float_model, whole):
            yield replace(block, layers=tuple(names[calls[layer][0].name] for layer in block.layers))

    def enter(self, node: str) -> None:
        """Mark the frontiers where a block begins at ``node``."""
        block = self.starts.get(node)
        if block is None:
            return
        for frontier in (self.walk.ahead, self.walk.reference):
            assert frontier is not None
            if block.input is not None and not frontier.passed(block.input):
                frontier.advance(block.input)
            frontier.mark()

    def leave(self, node: str) -> Iterator[tuple[str, Solution, str | None]]:
        """Where a block ends at ``node``: learn it, put it into the graph, and give its layers to be measured."""
        block = self.ends.get(node)
        if block is None:
            return
        ahead, reference = self.walk.ahead, self.walk.reference
        assert ahead is not None
        assert reference is not None
        ahead.turn_back()
        reference.turn_back()
        inputs = (block.input,) if block.input is not None else ()
        layers = self._layers(block)
        if not layers:
            return
        method = next(self.methods[layer] for layer in layers.values())
        found = self._stored(block, layers)
        if found is None:
            reference.advance(block.output, keep=(*inputs, block.output))
            problem = BlockProblem(
                block,
                ahead,
                reference,
                len(self.walk.inputs[0]),
                STEP_SAMPLES if self.model.dynamic_batch else len(self.model.example[0]),
                self._weights(layers),
                self._grids(block),
                self._biases(layers) if method.learn_biases else {},
            )
            effort = Effort(self.plan.iterations, layer_seed(self.plan.seed, block.output))
            found = self._learn(problem, method, effort)
            self._save(block, layers, found)
            reference.turn_back()
        elif self.augmentation is not None:
            self.augmentation.passed(block)
        for stored, layer in layers.items():
            set_weight(self.model, layer, found.weights[stored], self.computes[layer])
        for name, scale in found.scales.items():
            set_grid(self.model, name, scale, self.model.tensor(f"{name}.zero_point"))
        calls = {layer: layer_calls(self.model)[layer][0].name for layer in layers.values()}
        for layer, call in calls.items():
            if call in found.biases:
                set_bias(self.model, layer, found.biases[call])
        gained = f"block {block.name}: output error {found.before:.3%} rounded, {found.after:.3%} reconstructed"
        for stored, layer in layers.items():
            note = "; ".join(each for each in (gained, found.note) if each)
            yield layer, Solution(found.weights[stored], found.biases.get(calls[layer])), note

    def _learn(self, problem: BlockProblem, method: BlockMethod, effort: Effort) -> BlockSolution:
        if method.weighted:
            problem = replace(problem, importance=self._importance(problem, effort.seed))
        try:
            # Without steps copies would serve nothing.
            if self.augmentation is None or method.transform is None or not effort.iterations:
                return reconstruct(problem, method, effort, self._say(problem.block))
            with self.augmentation.augmented(problem, method) as (problem, remark):
                found = reconstruct(problem, method, effort, self._say(problem.block))
        finally:
            if problem.importance is not None:
                problem.importance.close()
        return replace(found, note="; ".join(each for each in (remark, found.note) if each) or None)

    def _importance(self, problem: BlockProblem, seed: int) -> Importance | None:
        """None where the block's output is one of the model's, or no output is a float: all numbers count the same."""
        (output,) = self.walk.float_model.graph.find_nodes(op="output")
        answers = [node.name for node in output.all_input_nodes if node.meta["val"].is_floating_point()]
        if not answers or problem.block.output in answers:
            return None
        batches = torch.arange(problem.samples).split(problem.batch)
        path = self.walk.scratch / "importance.samples"
        return Importance(problem.reference, problem.block.output, answers, batches, seed, path)

    def _first(self, block: Block, whole: bool) -> str:
        """The node of the changed graph that a block begins at."""
        if not whole:
            return layer_calls(self.model)[block.layers[0]][0].name
        return self.order[self.order.index(block.input) + 1] if block.input is not None else self.order[0]

    def _layers(self, block: Block) -> dict[str, str]:
        """Layers that are learned, by the node that unpacks their weight."""
        calls = layer_calls(self.model)
        found = {}
        for layer in block.layers:
            stored = calls[layer][0].args[1]
            if layer in self.methods and is_stored(stored):
                found[stored.name] = layer
        return found

    def _weights(self, layers: dict[str, str]) -> dict[str, tuple[Tensor, QuantizedWeight]]:
        found = {}
        for node, layer in layers.items():
            weight = self.walk.float_model.tensor(f"{layer}.weight")
            parts = {part: self.model.tensor(f"{layer}.weight_{part}") for part in ("packed", "scale", "zero_point")}
            choice = self.plan.choice(layer)
            assert choice is not None
            found[node] = (weight, QuantizedWeight.from_tensors(parts, choice.option.bits, tuple(weight.shape)))
        return found

    def _biases(self, layers: dict[str, str]) -> dict[str, tuple[Callable[..., Tensor], Tensor]]:
        found = {}
        for layer in layers.values():
            call = layer_calls(self.model)[layer][0]
            bias = layer_bias(self.model, call)
            outputs = len(self.walk.float_model.tensor(f"{layer}.weight"))
            found[call.name] = (call.target, torch.zeros(outputs) if bias is None else bias)
        return found

    def _grids(self, block: Block) -> dict[str, tuple[str, ActivationGrid]]:
        """Grids that are read nowhere but in the block, by each node that rounds to them."""
        order = [node for node in self.model.graph.nodes if node.op not in ("get_attr", "output")]
        names = [node.name for node in order]
        start = names.index(block.input) + 1 if block.input is not None else 0
        inside = set(order[start : names.index(block.output) + 1])
        nodes: dict[str, list[fx.Node]] = {}
        for node in self.model.graph.find_nodes(op="call_function", target=fake_quantize_op()):
            nodes.setdefault(node.args[1].target.removesuffix(".scale"), []).append(node)
        found: dict[str, tuple[str, ActivationGrid]] = {}
        for name, same in nodes.items():
            if all(node in inside for node in same):
                scale, zero_point = (self.model.tensor(f"{name}.{part}") for part in ("scale", "zero_point"))
                limit = self.walk.largest_scales.get(name, float("inf"))
                grid = ActivationGrid(scale, zero_point, same[0].args[3], learnable=True, largest_scale=limit)
                found |= {node.name: (name, grid) for node in same}
        return found

    def _say(self, block: Block) -> Callable[[int, int, float], None]:
        started = time.monotonic()

        def say(done: int, total: int, error: float) -> None:
            left = (time.monotonic() - started) / done * (total - done)
            self.say(f"block {block.name}: step {done} of {total}, error {error:.2%}, {left:.0f} s left")

        return say

    def _stored(self, block: Block, layers: dict[str, str]) -> BlockSolution | None:
        found = self.store.load(f"block {block.output}")
        if found is None:
            return None
        tensors, strings = found
        weights = {}
        for node, (weight, start) in self._weights(layers).items():
            parts = {part: tensors[f"{node}.{part}"] for part in ("packed", "scale", "zero_point")}
            weights[node] = QuantizedWeight.from_tensors(parts, start.bits, tuple(weight.shape))
        scales = {key.removeprefix("grid "): value for key, value in tensors.items() if key.startswith("grid ")}
        biases = {key.removeprefix("bias "): value for key, value in tensors.items() if key.startswith("bias ")}
        before, after = (float(strings[key]) for key in ("before", "after"))
        return BlockSolution(weights, scales, biases, before, after, strings.get("note"))

    def _save(self, block: Block, layers: dict[str, str], found: BlockSolution) -> None:
        tensors = {f"{node}.{part}": each for node in layers for part, each in found.weights[node].tensors().items()}
        tensors |= {f"grid {name}": scale for name, scale in found.scales.items()}
        tensors |= {f"bias {call}": bias for call, bias in found.biases.items()}
        strings = {"before": repr(found.before), "after": repr(found.after)}
        if found.note:
            strings["note"] = found.note
        self.store.save(f"block {block.output}", tensors, strings)


def layer_seed(seed: int, layer: str) -> int:
    """The seed of ``layer``: its own, whatever layers come before it."""
    return seed ^ zlib.crc32(layer.encode())


def _block_methods(walk: Walk, plan: Plan) -> dict[str, BlockMethod]:
    """By layer, where a block can be learned: called once, and with samples."""
    calls, tied = layer_calls(walk.model), tied_tables(walk.model)
    found = {}
    for choice in plan.choices:
        method = resolve(METHODS, choice.method, "method")
        alone = len(calls.get(choice.layer, ())) == 1 and choice.layer not in tied
        if isinstance(method, BlockMethod) and walk.inputs is not None and alone:
            found[choice.layer] = method
    return found
