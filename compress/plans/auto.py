"""``--method auto``: the method that keeps most accuracy for the widths, the samples and the time there is.

What each costs and gains is measured (README, "Which method"): at 4-bit weights with 8-bit inputs layer-wise learning
is within noise of the float model, and blocks take longer for nothing; below that blocks keep more, if they get steps
enough and more samples than a step takes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from compress.data.samples import Samples
from compress.errors import InputError
from compress.files.cache import remembered
from compress.intake.model import Intake
from compress.options import Options
from compress.plans.estimate import pass_seconds
from compress.quant.methods import METHODS
from compress.quant.problem import STEP_SAMPLES, Method
from compress.records.registry import resolve

__all__ = ["AUTO", "check_method", "settle_method"]

AUTO = "auto"

_LAYER_WISE, _BLOCK_WISE = "adaquant", "genie"
_ENOUGH_BITS, _ENOUGH_ACT_BITS = 4, 8
_MOST_STEPS, _FEWEST_STEPS, _ROUND = 5000, 300, 50


def check_method(options: Options) -> None:
    """Refuse methods that are unknown, and a limit on time that goes with none.

    Raises:
        InputError: naming the option.
    """
    asked = [] if options.method in (None, AUTO) else str(options.method).split(",")
    for each in asked:
        if each == AUTO:
            raise InputError(f"--method {options.method}: auto chooses alone; leave out the others")
        if each not in METHODS:
            raise InputError(f"unknown method {each!r}; known: {', '.join((*METHODS, AUTO))}")
    if options.method != AUTO and options.minutes is not None:
        raise InputError(f"--minutes limits --method auto; {options.method or 'the default'} takes --iterations")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise InputError(f"--minutes {options.minutes:g}: allowed is more than 0, and not without end")


def settle_method(intake: Intake, options: Options, samples: Samples | None) -> tuple[Options, str | None]:
    """``options`` with a method in place of ``auto``, and a sentence that says why; as they are without ``auto``.

    Raises:
        InputError: an unknown method; a time limit without ``auto``, or one that is not positive.
    """
    check_method(options)
    if options.method != AUTO:
        return options, None
    name, why = _wanted(options, samples)
    if name is None:
        return replace(options, method=None, minutes=None), f"method auto: the default, {why}"
    steps = _steps(name) if options.iterations is None else options.iterations
    if options.minutes is not None and options.iterations is None:
        affordable = _affordable(name, intake, options.minutes)
        why += f"; --minutes {options.minutes:g} allows for about {affordable} steps each"
        if name == _BLOCK_WISE and affordable < _FEWEST_STEPS:
            name, steps = _LAYER_WISE, _steps(_LAYER_WISE)
            affordable = _affordable(name, intake, options.minutes)
            why += f", too few for blocks, and {affordable} layer by layer"
        most = _MOST_STEPS if name == _BLOCK_WISE else steps
        steps = max(min(affordable // _ROUND * _ROUND, most), _ROUND)
        if affordable < _ROUND:
            why += f"; {_ROUND} are the fewest, and take longer"
    elif options.minutes is not None:
        why += "; --iterations is what counts, --minutes does not"
    return replace(options, method=name, iterations=steps, minutes=None), f"method auto: {name}, {steps} steps: {why}"


def _steps(name: str) -> int:
    method: Method = resolve(METHODS, name, "method")
    return method.iterations


def _affordable(name: str, intake: Intake, minutes: float) -> int:
    method: Method = resolve(METHODS, name, "method")
    # Kept from run to run: one that was stopped is to continue with the number of steps that it had.
    key = [intake.fingerprint, torch.get_num_threads()]
    seconds = remembered("pass", key, lambda: pass_seconds(intake.traced) * STEP_SAMPLES)
    return int(60 * minutes / (method.step_cost * seconds))


def _wanted(options: Options, samples: Samples | None) -> tuple[str | None, str]:
    """The method, None for the default, if time does not matter; and why."""
    if samples is None:
        return None, "as there are no calibration data"
    if options.group_size is not None or options.rows is not None:
        return None, "as groups of weights have grids of their own"
    if options.budgets:
        return _LAYER_WISE, "budgets choose widths by errors of single layers"
    bits = 4 if options.bits is None else options.bits
    act_bits = 8 if options.act_bits is None else options.act_bits
    if bits >= _ENOUGH_BITS and act_bits >= _ENOUGH_ACT_BITS:
        return _LAYER_WISE, f"W{bits}A{act_bits} loses next to nothing layer by layer"
    if len(samples) <= STEP_SAMPLES:
        return _LAYER_WISE, f"{len(samples)} samples are no more than one step of a block takes"
    return _BLOCK_WISE, f"W{bits}A{act_bits} needs layers learned together, and {len(samples)} samples suffice"
