"""Calibration inputs made of noise, for a model whose data is not at hand (``--calib synthetic``).

Noise is moved until the model's BatchNorm layers see the statistics that they keep from training (ZeroQ,
arXiv 2001.00281, section 3.1; compress/data/norm_distance.py). Nothing else is asked of it: no labels, no prior that
makes it look like pictures. It serves ranges and the reconstruction of layers; accuracy is never measured on it.
"""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from compress.data.image_fit import fit_images
from compress.data.input_scale import implied_scale
from compress.data.norm_distance import norm_distance
from compress.data.samples import Samples
from compress.data.sources import SYNTHETIC
from compress.errors import InputError
from compress.files.cache import cache_folder, digest
from compress.progress import Progress, silent

__all__ = ["FIT_NEEDED", "SYNTHETIC", "is_synthetic", "synthesize", "synthetic_count"]

_STEPS, _RATE = 300, 0.05
FIT_NEEDED = 0.5
"""The distance from BatchNorm's statistics that calibration accepts of made inputs: noise as it is is at 0.8 to 1.2 on
trained networks (see compress/intake/doubts.py), inputs that fit are at a hundredth."""
_VERSION = 2  # of how they are made: what is kept of another is made anew
# Inputs in all and in a batch, which has the statistics by itself: that of 3 x 32 x 32 images, and fewer of large ones,
# which have more places each and take longer.
_COUNT, _BATCH, _PLACES = (32, 128), (16, 64), 32 * 32


def is_synthetic(source: object) -> bool:
    """Whether ``source`` asks for made inputs in the place of samples; a file of that name is ``./synthetic``."""
    return isinstance(source, str) and source == SYNTHETIC


def synthesize(
    module: nn.Module,
    example: tuple[Tensor, ...],
    fingerprint: str,
    *,
    most: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    steps: int = _STEPS,
    rate: float = _RATE,
    needed: float = math.inf,
    progress: Progress = silent,
) -> Samples:
    """32 to 128 inputs for ``module``, which is in evaluation mode; the same ones for the same arguments.

    They are kept in the cache under the model's ``fingerprint``.

    Args:
        example: the module's inputs [N, ...].
        most: how many, at most.
        batch: samples that the module takes at a time, where it takes no other number.
        steps, rate: of the descent; its rate falls to zero.
        needed: the largest distance that may be left.

    Raises:
        InputError: there are several, or whole numbers; no BatchNorm layer keeps statistics; the model makes NaN of
            noise; or what is made does not come as near as is ``needed``.
    """
    if most is not None and most < 1:
        raise InputError(f"{most} samples are not possible; ask for at least 1.")
    if len(example) > 1:
        raise InputError(f"--calib {SYNTHETIC}: the model takes {len(example)} inputs, one is made up; give samples")
    if not example[0].is_floating_point():
        raise InputError(
            f"--calib {SYNTHETIC}: the model takes whole numbers (token ids), only fractions are made up; give samples"
        )
    with torch.no_grad():
        norms = norm_distance(module, *example)[2]
    if not norms:
        raise InputError(
            f"--calib {SYNTHETIC}: inputs are made to fit the running statistics of BatchNorm layers, and the model "
            "has none; give samples (compress quantize without --calib quantizes the weights alone)"
        )
    shape = tuple(example[0].shape[1:])
    count, size = synthetic_count(shape), batch or _fewer(_BATCH, shape)
    count = count if most is None else min(count, most)
    count = -(-count // size) * size if batch else count
    # The same weights in another architecture are another model.
    key = digest([_VERSION, fingerprint, str(module), shape, count, size, seed, steps, rate])
    path = cache_folder() / f"synthetic-{key}.safetensors"
    notes: tuple[str, ...] = ()
    try:
        with safetensors.safe_open(path, "pt") as file:
            x, distance = file.get_tensor("x"), file.get_tensor("distance")
    except (OSError, safetensors.SafetensorError):  # not made yet, or cut short when the machine went down
        x, distance = _make(module, (count, *shape), size, seed, steps, rate, progress)
        if not distance.isfinite().all():
            raise InputError(
                f"--calib {SYNTHETIC}: the model makes NaN or infinity of noise (mean 0, deviation 1), so that no step "
                "leads anywhere; give samples"
            ) from None
        notes = _keep({"x": x, "distance": distance}, path)
    before, after = distance.tolist()
    if after > needed:
        raise InputError(
            f"--calib {SYNTHETIC}: {steps} steps brought made inputs from {before:.2g} to {after:.2g} of what the "
            f"BatchNorm layers keep (relative, squared), and {needed:g} at most is needed: they would not show what "
            "real ones do; give samples (compress quantize without --calib quantizes the weights alone)"
        )
    note = (
        f"{count} inputs made of noise, without data: {steps} steps brought their distance from the statistics of "
        f"{norms} BatchNorm {'layer' if norms == 1 else 'layers'} down from {before:.2g} to {after:.2g}"
    )
    return Samples((x,), None, "synthetic inputs", (note, *notes))


def _keep(tensors: dict[str, Tensor], path: Path) -> tuple[str, ...]:
    """Write ``tensors`` to ``path``, whole or not at all; a folder that takes no files costs only the next run time.

    Returns:
        a sentence if they are not kept.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Through Python's own file, whose errors are OSErrors that say why.
        temporary.write_bytes(safetensors.torch.save(tensors))
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return (f"the inputs are not kept for the next run: {path.parent}: {error.strerror or error}",)
    return ()


def synthetic_count(shape: tuple[int, ...]) -> int:
    """How many inputs of ``shape`` [C, ...] are made."""
    return _fewer(_COUNT, shape)


def _fewer(bounds: tuple[int, int], shape: tuple[int, ...]) -> int:
    """The upper one up to 32 x 32 places, and fewer in proportion to them above, down to the lower one."""
    places = math.prod(shape[1:])
    return max(bounds[0], bounds[1] * _PLACES // max(places, _PLACES))


def _make(
    module: nn.Module, shape: tuple[int, ...], batch: int, seed: int, steps: int, rate: float, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Inputs of ``shape`` [N, ...], and their mean distance before and after [2]."""
    parts: list[Tensor] = []
    distances: list[tuple[float, ...]] = []
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).split(batch)

    def placed(noise: Tensor, level: Tensor, spread: Tensor) -> tuple[Tensor]:
        return (norm_distance(module, _place(noise, level, spread))[1],)

    def advance(what: str, done: int, of: int) -> None:
        progress(what, len(parts) * of + done, len(noise) * of)

    start = implied_scale(module, noise[0])
    for each in noise:
        fit = fit_images(each, placed, steps, rate, advance, (start.level / start.spread, start.spread.log()))
        parts.append(_place(fit.images, *fit.others))
        distances.append((*fit.before, *fit.after))
    return torch.cat(parts), torch.tensor(distances).mean(0)


def _place(noise: Tensor, level: Tensor, spread: Tensor) -> Tensor:
    """``noise`` at ``level``, which is in units of the spread, and with the logarithm of that."""
    return (noise + level) * spread.exp()
