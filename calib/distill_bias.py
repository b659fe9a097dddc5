"""Bias tuning: all biases learn from the float network's outputs, end to end (AdaQuant's last step).

Loss: ``KL(softmax(float) || softmax(quantized))`` for class scores, mean squared error for anything else; targets are
keyed by sample. Gradients pass activation quantizers straight through. The best state on samples held back from the
training is kept, the untuned one included: the result is never worse there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from compress.graph.traced import TracedModel, first_output

__all__ = ["distillation_loss", "tune_biases"]

_BATCH = 50
_HELD_BACK = 0.2
_CHECKS = 8
_RATE = 1e-3  # deviations of the bias an iteration


def distillation_loss(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the batch; ``outputs`` and ``wanted`` [N, ...] are logits when [N, C] with C > 1."""
    if wanted.dim() == 2 and wanted.shape[1] > 1:
        return torch.nn.functional.kl_div(
            outputs.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
        )
    return (outputs - wanted).square().mean()


def tune_biases(
    float_model: TracedModel,
    model: TracedModel,
    names: list[str],
    inputs: tuple[Tensor, ...],
    steps: int,
    seed: int,
    progress: Callable[[str], None],
) -> tuple[float, float]:
    """Tune the bias tensors called ``names`` in place; returns the loss on the held-back samples before and after."""
    count = len(inputs[0])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    batch = _BATCH if model.dynamic_batch else len(model.example[0])
    whole = 1 if model.dynamic_batch else batch  # a graph with a fixed batch takes whole ones only
    held = order[: max(int(count * _HELD_BACK) // whole * whole, whole)]
    train = order[len(held) :] if count > len(held) else order
    wanted = float_model.run(zip(*(x.split(batch) for x in inputs), strict=True))
    start = {name: model.tensor(name).clone() for name in names}
    biases = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(
        [{"params": [b], "base": float(b.detach().std(correction=0).clamp(min=1e-3))} for b in biases.values()]
    )

    def loss_of(index: Tensor) -> Tensor:
        outputs = first_output(functional_call(model.module, biases, tuple(x[index] for x in inputs)))
        return distillation_loss(outputs, wanted[index])

    def held_loss() -> float:
        with torch.no_grad():
            return sum(float(loss_of(part)) * len(part) for part in held.split(batch)) / len(held)

    before = best = held_loss()
    kept = start
    interval = max(steps // _CHECKS, 1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * group["base"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = train[torch.randperm(len(train), generator=generator)[:batch]]
        optimizer.zero_grad(set_to_none=True)
        loss_of(index).backward()
        optimizer.step()
        if (step + 1) % interval == 0 or step + 1 == steps:
            now = held_loss()
            if now < best:
                best, kept = now, {name: value.detach().clone() for name, value in biases.items()}
            progress(f"bias tuning {step + 1}/{steps}")
    for name, value in kept.items():
        model.set_tensor(name, value)
    return before, best
