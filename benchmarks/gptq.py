"""Seconds that GPTQ takes for one linear, beside the published algorithm written out plainly, in the same run.

``python -m benchmarks.gptq`` writes ``benchmarks/results/gptq.json``: a 4096x4096 weight, 128 samples of 2048 rows, 4
bits in groups of 128. The plain one follows the paper's algorithm 1 as public implementations do: the Hessian as a
running mean of outer products, its inverse's Cholesky factor, columns of a row-major weight one by one within blocks of
128.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.accuracy import RESULTS
from compress.calib.gptq import OptimalRounding
from compress.measure.machine import describe_environment
from compress.quant.problem import Effort, LayerProblem
from compress.quant.rtn import MIN_MAX
from compress.records.layers import QuantOption

BITS, GROUP = 4, 128


@dataclass(frozen=True)
class Noise:
    """[N, rows, width] of correlated noise, made again at every reading so that it takes no memory."""

    count: int
    rows: int
    mix: Tensor

    def __len__(self) -> int:
        return self.count

    def take(self, index: Tensor) -> Tensor:
        """Samples at ``index``."""
        return torch.stack([self._sample(number) for number in index.tolist()])

    def _sample(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randn(self.rows, len(self.mix), generator=generator) * self.mix


@dataclass(frozen=True)
class Outputs:
    """What the float layer makes of ``inputs``."""

    inputs: Noise
    weight: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: Tensor) -> Tensor:
        """Samples at ``index``."""
        return self.inputs.take(index) @ self.weight.T


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rows", type=int, default=2048)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(arguments.width, arguments.width) * 0.02
    inputs = Noise(arguments.samples, arguments.rows, torch.rand(arguments.width) ** 2 + 0.05)
    reading = timed(lambda: [inputs.take(torch.tensor([number])) for number in range(len(inputs))])[0]
    option = QuantOption(bits=BITS, group_size=GROUP, symmetric=False)
    problem = LayerProblem(
        "linear", weight, None, torch.nn.functional.linear, inputs=inputs, targets=Outputs(inputs, weight)
    )
    ours, solution = timed(lambda: OptimalRounding().solve(problem, option, Effort(0, 0)))
    plain, rounded = timed(lambda: published(weight, (x[0] for x in batches(inputs))))
    judged = inputs.take(torch.arange(2)).flatten(0, 1)
    wanted = judged @ weight.T
    nearest = MIN_MAX.solve(problem, option, Effort(0, 0)).weight.dequantize()
    errors = {
        name: float((judged @ found.T - wanted).square().sum() / wanted.square().sum())
        for name, found in (("ours", solution.weight.dequantize()), ("plain", rounded), ("nearest", nearest))
    }
    result = {
        "command": f"python -m benchmarks.gptq --width {arguments.width} --samples {arguments.samples} "
        f"--rows {arguments.rows}",
        "environment": describe_environment().model_dump(),
        "seconds": {"ours": ours - reading, "plain": plain - reading, "making the rows, in neither": reading},
        "ratio": (ours - reading) / (plain - reading),
        "output_error": errors,
    }
    print(json.dumps(result["seconds"]), result["ratio"], errors)
    (RESULTS / "gptq.json").write_text(json.dumps(result, indent=1) + "\n")


def timed(call):  # type: ignore[no-untyped-def]
    """Seconds, and what it returned."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def batches(inputs: Noise) -> Iterator[Tensor]:
    """One sample at a time."""
    for number in range(len(inputs)):
        yield inputs.take(torch.tensor([number]))


@torch.no_grad()
def published(weight: Tensor, samples: Iterator[Tensor]) -> Tensor:
    """The rounded weight [O, I], min-max grids a group found as the columns come."""
    width = weight.shape[1]
    hessian = torch.zeros(width, width)
    for seen, rows in enumerate(samples):
        hessian *= seen / (seen + 1)
        scaled = (2 / (seen + 1)) ** 0.5 * rows.T
        hessian += scaled.matmul(scaled.T)
    left, rounded = weight.clone(), torch.zeros_like(weight)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    top = (1 << BITS) - 1
    for start in range(0, width, 128):
        stop = min(start + 128, width)
        block, errors = left[:, start:stop].clone(), torch.zeros(len(weight), stop - start)
        factor = inverse[start:stop, start:stop]
        for column in range(stop - start):
            if (start + column) % GROUP == 0:
                group = left[:, start + column : start + column + GROUP]
                low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                scale = (high - low) / top
                zero = torch.round(-low / scale)
            value = block[:, column]
            q = scale * (torch.clamp(torch.round(value / scale) + zero, 0, top) - zero)
            rounded[:, start + column] = q
            error = (value - q) / factor[column, column]
            block[:, column:] -= error.unsqueeze(1).matmul(factor[column, column:].unsqueeze(0))
            errors[:, column] = error
        left[:, stop:] -= errors.matmul(inverse[start:stop, stop:])
    return rounded


if __name__ == "__main__":
    main()
