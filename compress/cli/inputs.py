"""Options that several verbs share, and those that are lists of numbers."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.errors import InputError

__all__ = [
    "Allow", "Classes", "Delta", "Factory", "For", "InputShape", "Length", "Mean", "Seed", "Size", "Std", "numbers",
    "shape",
]  # fmt: skip

Factory = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="PACKAGE.MODULE:FACTORY", help="Builds the module when the file holds weights only"
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PKG.CLASS",
        help="Let the model file use this class, or with unused:PATTERN hold weights that --model lacks; several times",
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(metavar="N", help="Put a new head of N outputs on a Hugging Face encoder, for deltas with heads"),
]
Delta = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Delta of `compress sparse`, added to the model first; several times"),
]
InputShape = Annotated[
    str | None, typer.Option(metavar="C,H,W", help="Shape of one input  [default: from file or data, or tried]")
]
Mean = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Subtracted from images, after bytes are scaled to 0..1")
]
Std = Annotated[str | None, typer.Option(metavar="R,G,B", help="Divides them after that")]
# What numpy's generators take, too.
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random")]
Size = Annotated[int | None, typer.Option(help="Crop size for a folder of images")]
For = Annotated[
    str,
    typer.Option(
        "--for",
        metavar="SET",
        help="Instruction set the file is for: avx2 (x86-64 without VNNI), vnni, arm, or any: layers that were "
        "measured slower than as floats on some x86-64 stay float",
    ),
]
Length = Annotated[
    int | None, typer.Option(help="Tokens of a sample of text, at most  [default: 128, or what the model takes]")
]


def numbers(text: str | None, option: str) -> list[float] | None:
    """``"0.5,0.5,0.5"`` as floats; None stays None.

    Raises:
        InputError: a part is not a number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"{option} {text!r}: numbers separated by commas are needed, as in 0.485,0.456,0.406"
        ) from error


def shape(text: str | None) -> tuple[int, ...] | None:
    """``"3,32,32"`` as a tuple; None stays None."""
    if text is None:
        return None
    from compress.models.input_shape import parse_shape

    return parse_shape(text)
