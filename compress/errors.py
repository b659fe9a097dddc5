"""What can go wrong, as exceptions that carry the command's exit code.

Every message names the file, layer or option, says what was got and what is allowed, and what to do next: the
command line prints it as it stands.
"""

from __future__ import annotations

__all__ = ["CompressError", "FactoryError", "GateError", "InfeasibleBudget", "InputError", "SolverError", "one_line"]


class CompressError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class InputError(CompressError):
    """The user's model, data or options cannot be used as given."""

    exit_code = 2


class FactoryError(InputError):
    """The file holds weights alone: the command needs ``--model``, and the command line says it in full."""


class InfeasibleBudget(CompressError):
    """No plan fits the budget; the message holds the smallest reachable one."""

    exit_code = 3


class GateError(CompressError):
    """The exported file does not compute, or does not run, what was calibrated."""

    exit_code = 4


class SolverError(CompressError):
    """The integer program's solver is missing, died, or found nothing in its time."""

    exit_code = 2


def one_line(error: BaseException, limit: int = 200) -> str:
    """The kind and first line of an exception, for the end of a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
