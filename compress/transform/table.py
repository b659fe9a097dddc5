"""Every transform of the float graph by name, and the check that it keeps its word.

A transform is a function ``(traced, **options) -> list[str]``: it edits the traced model in place, leaves the function
it computes as it is, and returns sentences for the report. :func:`apply_transform` holds it to that. What does change
the function, because an option asks for it, is a step of its own that runs first, named in ``PREPARATIONS``; its
difference is reported, not judged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import GateError
from compress.graph.traced import TracedModel, tensors_in
from compress.records.registry import resolve

__all__ = ["PREPARATIONS", "TRANSFORMS", "apply_transform"]

TRANSFORMS = {
    "equalize": "compress.transform.equalize:equalize",
    "smoothquant": "compress.transform.scaling:smoothquant",
    "awq": "compress.transform.scaling:awq",
}

PREPARATIONS = {
    "equalize": "compress.transform.equalize:prepare",
}


def apply_transform(
    name: str,
    traced: TracedModel,
    inputs: tuple[Tensor, ...] | None = None,
    tolerance: float = 1e-4,
    **options: Any,
) -> list[str]:
    """Apply the transform called ``name`` in place and check that the model's outputs stay the same.

    Args:
        name: a row of ``TRANSFORMS``.
        traced: the model; left as it was when the check fails.
        inputs: one batch of real samples; without it the example's shape filled with seeded normal noise is used.
        tolerance: largest relative L2 difference of any output; 1e-4 leaves room for float32 sums in deep networks.
        options: the transform's own.

    Returns:
        Sentences for the report, the measured difference the last.

    Raises:
        InputError: no transform is called ``name``, or it refuses the value of an option.
        GateError: an output differs by more than ``tolerance``.
    """
    transform = resolve(TRANSFORMS, name, "transform")
    batch = inputs if inputs is not None else _noise(traced.example)
    original = traced.copy()
    sentences: list[str] = []
    try:
        if name in PREPARATIONS:
            sentences += _prepare(name, traced, inputs, options)
        before = _outputs(traced, batch)
        sentences += transform(traced, **options)
        difference = _difference(before, _outputs(traced, batch))
        # Written so that a difference that is not a number fails.
        if not difference <= tolerance:
            raise GateError(
                f"transform {name!r} changed the model's outputs by {difference:.3g} (relative L2), allowed is "
                f"{tolerance:.3g}; it was undone. Leave it out, and please report the model."
            )
    except Exception:
        traced.module, traced.statistics, traced.notes = original.module, original.statistics, original.notes
        raise
    return [
        *sentences,
        f"{name} changed the outputs by {difference:.2g} (relative L2, at most {tolerance:.2g} allowed)",
    ]


def _prepare(name: str, traced: TracedModel, inputs: tuple[Tensor, ...] | None, options: dict[str, Any]) -> list[str]:
    """Run the preparation; add what it changed on ``inputs``. Noise would say nothing about that, so it is not used."""
    before = _outputs(traced, inputs) if inputs is not None else []
    sentences: list[str] = resolve(PREPARATIONS, name, "preparation")(traced, **options)
    if sentences and inputs is not None:
        difference = _difference(before, _outputs(traced, inputs))
        sentences.append(
            f"this alone changed the outputs by {difference:.2g} (relative L2) on {len(inputs[0])} samples"
        )
    return sentences


def _noise(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Normal noise in the shape of ``example``; integers (token ids) stay as they are."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x for x in example)


def _outputs(traced: TracedModel, batch: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [output.double() for output in tensors_in(traced.module(*batch))]


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest ``|after - before| / |before|`` over the outputs."""
    tiny = torch.finfo(torch.float64).tiny
    return max(float((y - x).norm() / x.norm().clamp_min(tiny)) for x, y in zip(before, after, strict=True))
