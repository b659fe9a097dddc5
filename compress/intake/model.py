"""From what the user has (a file or a module, maybe data) to a folded graph with its list of layers."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.data.samples import Samples
from compress.errors import InputError
from compress.graph.exportable import make_exportable
from compress.graph.fold import fold_batch_norm
from compress.graph.layers import list_layers, list_others
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, is_tokens, trace
from compress.models.checkpoint import LoadedModel, fingerprint, load_model, to_float_eval
from compress.models.huggingface import TextReader
from compress.models.input_shape import find_input_shape
from compress.records.layers import LayerSpec

__all__ = ["Intake", "ModelLike", "check_fits", "noise", "read_model", "take_in"]

ModelLike = str | os.PathLike[str] | torch.nn.Module


@dataclass(frozen=True)
class Intake:
    """A model ready to be compressed.

    Attributes:
        traced: its graph, simplified and folded; edited by transforms.
        layers: every layer, compressible or not.
        original: the module as it was loaded, for comparison.
        fingerprint: hash of the module's tensors and graph.
        name: stem of the file, or the module's class.
        notes: what was assumed (input shape, conversions), as sentences.
        names: parameters of ``original`` that take the inputs; () where they go by position.
        text: how text becomes its inputs; None for models that take no token ids, or are no Hugging Face folder.
    """

    traced: TracedModel
    layers: list[LayerSpec]
    original: torch.nn.Module
    fingerprint: str
    name: str
    notes: list[str]
    names: tuple[str, ...] = ()
    text: TextReader | None = None

    @property
    def others(self) -> dict[str, int]:
        """How many floats the graph reads that are in none of ``layers``, by tensor, the largest first."""
        return list_others(self.traced)


def read_model(
    model: ModelLike, *, factory: str | None = None, allow: Sequence[str] = (), classes: int | None = None
) -> LoadedModel:
    """Load ``model`` if it is a path; else a copy of it, so that the caller's module stays in the mode it is in.

    Raises:
        InputError: see :func:`compress.models.checkpoint.load_model`; or ``classes`` are given for a module.
    """
    if classes is not None and classes < 1:
        raise InputError(f"--classes {classes}: at least 1")
    if isinstance(model, torch.nn.Module):
        if classes is not None:
            raise InputError(f"classes={classes}: only a Hugging Face folder gets a new head; give the folder")
        scripted = next(
            (name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)), None
        )
        if scripted is not None:
            raise InputError(
                f"{scripted or 'the model'} is a TorchScript module, which cannot be traced; give the nn.Module that "
                "it was made of"
            )
        copied, source, notes = _copy(model), type(model).__name__.lower(), list[str]()
        to_float_eval(copied, Path(source), notes, None)
        return LoadedModel(copied, None, source, fingerprint(model), tuple(notes))
    return load_model(model, model=factory, allow=allow, classes=classes)


def _copy(module: torch.nn.Module) -> torch.nn.Module:
    # What a call has left behind (the older weight_norm keeps its product) has a history, and is not copied with it.
    left = [value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(module, {id(value): value.detach() for value in left if not value.is_leaf})


def take_in(
    model: ModelLike | LoadedModel,
    *,
    factory: str | None = None,
    allow: Sequence[str] = (),
    input_shape: Sequence[int] | None = None,
    samples: Samples | None = None,
) -> Intake:
    """Read ``model`` if that is still to be done, find its input shape, trace and fold it.

    Raises:
        InputError: see :func:`compress.models.checkpoint.load_model`,
            :func:`compress.models.input_shape.find_input_shape` and :func:`compress.graph.traced.trace`.
    """
    loaded = model if isinstance(model, LoadedModel) else read_model(model, factory=factory, allow=allow)
    notes = list(loaded.notes)
    names: tuple[str, ...] = ()
    if loaded.example is not None:
        inputs = loaded.example
        notes.append(f"input shape {_shapes(inputs)}, from the .pt2 file")
    elif samples is not None and input_shape is None:
        inputs, names = tuple(x[:2] for x in samples.inputs), samples.names
        if loaded.text is not None:
            loaded.text.check_ids(samples.inputs[0], samples.source)
        notes.append(f"input shape {_shapes(inputs)}, from {samples.source}")
    elif loaded.text is not None:
        made = loaded.text.example()
        inputs, names = tuple(made.values()), loaded.text.call_names(made)
        notes.append(f"input shape {_shapes(inputs)}: token ids at random")
    else:
        found = find_input_shape(
            loaded.module, given=input_shape, data_shape=samples.inputs[0].shape[1:] if samples else None
        )
        inputs = (found.example(),)
        notes.append(f"input shape {_shapes(inputs)}, {found.source}")
    try:
        traced = trace(loaded.module, inputs, names=names)
    except InputError:
        if samples is not None and not names:  # where their shape is at fault, this says what the first layer expects
            find_input_shape(loaded.module, data_shape=samples.inputs[0].shape[1:])
        raise
    simplify(traced)
    make_exportable(traced)
    fold_batch_norm(traced)
    if samples is not None:
        check_fits(samples, traced)
    notes += traced.notes
    # The same weights in another architecture, or at another size, are another model.
    content = "\0".join((loaded.fingerprint, str(traced.graph), _shapes(traced.example)))
    identity = hashlib.sha256(content.encode()).hexdigest()
    name = Path(loaded.source).stem
    return Intake(traced, list_layers(traced), loaded.module, identity, name, notes, names, loaded.text)


def check_fits(samples: Samples, traced: TracedModel) -> None:
    """Refuse samples of another shape or kind than the graph was traced with.

    Raises:
        InputError: with both shapes.
    """
    kinds = ([x.is_floating_point() for x in xs] for xs in (samples.inputs, traced.example))
    if _shapes(samples.inputs, traced.dynamic_length) != _shapes(traced.example, traced.dynamic_length):
        raise InputError(
            f"{samples.source} holds samples of shape {_shapes(samples.inputs)}; the model takes "
            f"{_shapes(traced.example)}"
        )
    if next(kinds) != next(kinds):
        raise InputError(f"{samples.source}: the model takes whole numbers where this holds fractions, or the reverse")
    if len(samples) < len(traced.example[0]) and not traced.dynamic_batch:
        raise InputError(f"{samples.source} holds {len(samples)} samples; one batch takes {len(traced.example[0])}")


def noise(traced: TracedModel, count: int, seed: int) -> tuple[Tensor, ...]:
    """``count`` samples of seeded noise for every input of ``traced``: what there is to compare on without data."""
    generator = torch.Generator().manual_seed(seed)
    count = count if traced.dynamic_batch else len(traced.example[0])
    # Whole numbers are ids, masks and the like: only those of the example are known to be valid.
    return tuple(
        torch.randn((count, *x.shape[1:]), generator=generator)
        if x.is_floating_point()
        else torch.cat([x] * -(-count // len(x)))[:count]
        for x in traced.example
    )


def _shapes(inputs: Sequence[Tensor], any_length: bool = False) -> str:
    """Of one sample; with ``any_length`` token inputs of all lengths look alike."""
    return " and ".join(
        "tokens" if any_length and is_tokens(x) else "x".join(map(str, x.shape[1:])) or "scalar" for x in inputs
    )
