"""The shape of a model's one input: given, taken from data or file, or found by trying usual sizes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from compress.errors import InputError, one_line
from compress.graph.traced import tensors_in

__all__ = ["InputShape", "find_input_shape", "parse_shape"]

# Height and width to try, most likely first.
_SMALL_STEM = (32, 28, 64, 96, 128, 224, 256)
_LARGE_STEM = (224, 256, 192, 160, 128, 96, 64, 32, 28)
_ONE_CHANNEL = (28, 32, 8, 64, 224)
_LENGTHS = (128, 256, 512, 1024, 4096, 16000)
_TOKENS = 16


@dataclass(frozen=True)
class InputShape:
    """Shape of one sample, without the batch dimension, and where it comes from.

    ``vocabulary``: it holds whole numbers, ids from 0 to below this; None: fractions.
    """

    shape: tuple[int, ...]
    source: str
    vocabulary: int | None = None

    def example(self) -> torch.Tensor:
        """One sample, [1, ...]: zeros, or ids at random."""
        if self.vocabulary is None:
            return torch.zeros(1, *self.shape)
        return torch.randint(self.vocabulary, (1, *self.shape), generator=torch.Generator().manual_seed(0))


def parse_shape(text: str) -> tuple[int, ...]:
    """`"3,32,32"` or `"3x32x32"` as (3, 32, 32).

    Raises:
        InputError: it is not a list of positive numbers.
    """
    parts = [part.strip() for part in re.split(r"[,xX×]", text.strip().strip("()[]").rstrip(","))]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(
            f"--input-shape {text!r} is not a list of positive numbers; write the shape of one input without the "
            "batch, as 3,32,32."
        )
    return tuple(int(part) for part in parts)


def find_input_shape(
    module: torch.nn.Module,
    *,
    data_shape: Sequence[int] | None = None,
    given: Sequence[int] | None = None,
    example: tuple[torch.Tensor, ...] | None = None,
) -> InputShape:
    """The shape of one sample of the first input.

    `given` (from --input-shape) goes before `data_shape` (one calibration sample, no batch dimension), before
    `example` (the inputs [N, ...] of a .pt2 file), before trying sizes that suit the first layer with weights.

    Raises:
        InputError: the shape does not run through the model, or none of the usual ones does; or it has several inputs,
            and there is nothing to take them from.
    """
    first = _first_layer(module)
    if data_shape is None and example is None:
        _check_one_input(module)
    if given is not None:
        shape = tuple(given)
        if data_shape is not None and tuple(data_shape) != shape:
            raise InputError(
                f"--input-shape {_text(shape)} differs from the calibration data, whose samples are "
                f"{_text(tuple(data_shape))}; leave --input-shape out."
            )
        return _checked(module, shape, "from --input-shape", first, example)
    if data_shape is not None:
        return _checked(module, tuple(data_shape), "from the calibration data", first, example)
    if example is not None:
        return InputShape(tuple(example[0].shape[1:]), "from the .pt2 file")
    tried = []
    for shape in (*_usual_shapes(first, module), *([(_TOKENS,)] if _vocabulary(module) else [])):
        complaint, ids = _complaint(module, shape)
        if complaint is None:
            how = f"found by trying: {_text(shape)} {'token ids run' if ids else 'runs'} through the model"
            return InputShape(shape, how, _vocabulary(module) if ids else None)
        tried.append(_text(shape))
    if first is None:
        raise InputError(
            "The input shape is not known and the model has no Conv2d, Conv1d or Linear to guess it from; "
            "give --input-shape C,H,W."
        )
    complaint, _ = _complaint(module, next(_usual_shapes(first, module)))
    raise InputError(
        f"The input shape is not known and none of the usual ones runs through the model (tried {', '.join(tried)}; "
        f"the first: {complaint}); give --input-shape C,H,W."
    )


def _first_layer(module: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """The first convolution or linear layer in the order of registration, with its name."""
    kinds = (torch.nn.Conv2d, torch.nn.Conv1d, torch.nn.Linear)
    return next(((name, m) for name, m in module.named_modules() if isinstance(m, kinds)), None)


def _check_one_input(module: torch.nn.Module) -> None:
    """Samples of several inputs are not made up."""
    needed = [
        name
        for name, each in inspect.signature(module.forward).parameters.items()
        if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) > 1:
        raise InputError(
            f"The model takes several inputs ({', '.join(needed)}), which are not made up: give calibration samples, "
            "an .npz with arrays of these names, or, as `compress export` takes none, save the model with its inputs: "
            "torch.export.save(torch.export.export(model, inputs), 'model.pt2')."
        )


def _vocabulary(module: torch.nn.Module) -> int | None:
    """Ids that every embedding has a row for are below this; None: the model has no embedding."""
    sizes = [part.num_embeddings for part in module.modules() if isinstance(part, torch.nn.Embedding)]
    return min(sizes, default=None)


def _usual_shapes(first: tuple[str, torch.nn.Module] | None, module: torch.nn.Module) -> Iterator[tuple[int, ...]]:
    layer = None if first is None else first[1]
    if isinstance(layer, torch.nn.Linear):
        yield (layer.in_features,)
    elif isinstance(layer, torch.nn.Conv1d):
        yield from ((layer.in_channels, length) for length in _LENGTHS)
    elif isinstance(layer, torch.nn.Conv2d):
        said = getattr(getattr(module, "config", None), "image_size", None)  # Hugging Face's: a side, or both
        if said:
            yield (layer.in_channels, *(said if isinstance(said, list | tuple) else (said, said)))
        if layer.in_channels == 1:
            sizes: tuple[int, ...] = _ONE_CHANNEL
        else:
            large = max(layer.stride) >= 2 or max(layer.kernel_size) >= 7
            sizes = _LARGE_STEM if large else _SMALL_STEM
        yield from ((layer.in_channels, size, size) for size in sizes)


def _complaint(
    module: torch.nn.Module, shape: tuple[int, ...], example: tuple[torch.Tensor, ...] | None = None
) -> tuple[str | None, bool]:
    """Why a batch of two does not run through the model (one line), or None when it does, without NaN; and
    whether it did as token ids."""
    uniform = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    if example is not None:
        # Further inputs, dtypes, and a batch size that the export may have fixed are the example's.
        fixed = torch.rand((len(example[0]), *shape), generator=torch.Generator().manual_seed(0))
        trials = [(uniform, *(x[:1].expand(2, *x.shape[1:]) for x in example[1:])), (fixed, *example[1:])]
        trials = [(first.to(example[0].dtype), *rest) for first, *rest in trials]
    else:
        trials = [(uniform,)]
        if any(isinstance(part, torch.nn.Embedding) for part in module.modules()):
            trials.append((torch.zeros(2, *shape, dtype=torch.int64),))  # row 0 exists in every embedding
    complaints = []
    for inputs in trials:
        try:
            with torch.no_grad():
                outputs = module(*inputs)
        except Exception as error:  # noqa: BLE001 - any error of the user's forward() means: not this shape
            complaints.append(one_line(error))
            continue
        found = [y for y in tensors_in(outputs) if y.is_floating_point() and y.dim()]  # one number is not about samples
        if any(len(inputs[0]) not in y.shape for y in found[:1]):  # a view that takes samples apart
            complaints.append(f"its output has shape {list(found[0].shape)} for a batch of {len(inputs[0])}")
        # Scores of what is forbidden are minus infinity; not all of them.
        elif all(bool(y.isfinite().any()) and not bool(y.isnan().any()) for y in found):
            return None, example is None and not inputs[0].is_floating_point()
        else:
            complaints.append("its output is not finite")
    return complaints[0], False


def _checked(
    module: torch.nn.Module,
    shape: tuple[int, ...],
    source: str,
    first: tuple[str, torch.nn.Module] | None,
    example: tuple[torch.Tensor, ...] | None,
) -> InputShape:
    complaint, ids = _complaint(module, shape, example)
    needs_more_inputs = complaint is not None and "required positional argument" in complaint
    if complaint is None or (needs_more_inputs and source != "from --input-shape"):  # the data may hold those as well
        return InputShape(shape, source, _vocabulary(module) if ids else None)
    expects = ""
    if first is not None:
        name, layer = first
        width = (
            f"{layer.in_features} features" if isinstance(layer, torch.nn.Linear) else f"{layer.in_channels} channels"
        )
        expects = f" Its first layer ({name or type(layer).__name__}) expects {width}."
    remedy = (
        "Give --input-shape C,H,W as the model was trained on."
        if source == "from --input-shape"
        else "Give calibration data of the shape the model was trained on."
    )
    raise InputError(
        f"An input of shape {_text(shape)} ({source}) does not run through the model: {complaint}.{expects} {remedy}"
    )


def _text(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
