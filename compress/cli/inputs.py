"""Options that are lists of numbers."""

from __future__ import annotations

from compress.errors import InputError

__all__ = ["numbers", "shape"]


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
    from compress.shapes import parse_shape

    return parse_shape(text)
