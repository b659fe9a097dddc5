"""Where a model is handed transformed copies: its images, its sequences, or the embeddings of its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from compress.calib.blocks import find_blocks
from compress.calib.reconstruction import BlockMethod
from compress.errors import InputError
from compress.graph.traced import TracedModel
from compress.quant.methods import METHODS
from compress.records.registry import resolve

__all__ = ["check_transformable", "find_site"]


def find_site(traced: TracedModel, inputs: Sequence[Tensor]) -> str:
    """The node of the float graph whose value is transformed.

    That is the only input of images, floats [N, C, H, W], or of sequences, floats [N, L, C]; of a model that takes
    token ids, what the first block reads: the embeddings [N, L, C], positions and norms included. All other inputs
    stay as they are.

    Raises:
        InputError: there is none, or several.
    """
    floats = [name for name, x in zip(traced.input_names, inputs, strict=True) if x.is_floating_point()]
    shapes = dict(zip(traced.input_names, (x.shape for x in inputs), strict=True))
    for dims in (4, 3):
        found = [name for name in floats if len(shapes[name]) == dims]
        if len(found) == 1:
            return found[0]
        if found:
            raise _refusal(f"takes {len(found)} inputs of {'images' if dims == 4 else 'sequences'}")
    if floats:
        listed = ", ".join(str(["N", *shapes[name][1:]]).replace("'", "") for name in floats)
        raise _refusal(f"takes inputs of shape {listed}")
    blocks = find_blocks(traced)
    embedded = blocks[0].input if blocks else None
    value = next((node.meta["val"] for node in traced.graph.nodes if node.name == embedded), None)
    if embedded is None or value is None or value.dim() != 3:
        raise _refusal("takes integers, and what its first block reads is not one value of embeddings [N, L, C]")
    return embedded


def check_transformable(methods: Iterable[str], traced: TracedModel, inputs: Sequence[Tensor]) -> None:
    """Refuse a model whose inputs one of ``methods``, names of the table, would transform and cannot.

    Raises:
        InputError: see :func:`find_site`.
    """
    for name in methods:
        method = resolve(METHODS, name, "method")
        if isinstance(method, BlockMethod) and method.transform is not None:
            find_site(traced, inputs)


def _refusal(found: str) -> InputError:
    return InputError(
        "--method metaaug learns to transform one input of images [N, C, H, W] or sequences [N, L, C], or the "
        f"embeddings of token ids; the model {found}. Choose --method genie, which learns the same blocks on the "
        "samples alone"
    )
