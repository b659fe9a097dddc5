"""Which of a graph's inputs is transformed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from compress.calib.reconstruction import BlockMethod
from compress.errors import InputError
from compress.methods import METHODS
from compress.registry import resolve

__all__ = ["check_transformable", "image_position"]


def image_position(inputs: Sequence[Tensor]) -> int:
    """The only input that is images, floats [N, C, H, W]; all others stay as they are.

    Raises:
        InputError: there is none, or several.
    """
    images = [position for position, x in enumerate(inputs) if x.is_floating_point() and x.dim() == 4]
    if len(images) == 1:
        return images[0]
    if not any(x.is_floating_point() for x in inputs):
        found = "takes token ids, which have no neighbours to be moved to"
    elif images:
        found = f"takes {len(images)} inputs of images"
    else:
        found = "takes inputs of shape " + ", ".join(str(["N", *x.shape[1:]]).replace("'", "") for x in inputs)
    raise InputError(
        f"--method metaaug learns to transform images, one input [N, C, H, W] of floats; the model {found}. "
        "Choose --method genie, which learns the same blocks on the samples alone"
    )


def check_transformable(methods: Iterable[str], inputs: Sequence[Tensor]) -> None:
    """Refuse inputs that one of ``methods``, names of the table, would transform and cannot.

    Raises:
        InputError: see :func:`image_position`.
    """
    for name in methods:
        method = resolve(METHODS, name, "method")
        if isinstance(method, BlockMethod) and method.transform is not None:
            image_position(inputs)
