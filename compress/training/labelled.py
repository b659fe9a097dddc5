"""Labelled samples for a model, of one source or of several, read and compared with what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from compress.data.samples import Samples, load_samples
from compress.errors import InputError
from compress.models.checkpoint import LoadedModel
from compress.models.huggingface import is_classifier
from compress.training.data import TrainingData

__all__ = [
    "Source",
    "as_labels_of",
    "check_labels",
    "named_sources",
    "new_outputs",
    "read_labelled",
    "read_samples",
    "read_sources",
    "training_data",
]

_MASK = "attention_mask"


@dataclass(frozen=True)
class Source:
    """One of several sources of one task, a language of it for one (arXiv 2110.07560, section 4).

    Attributes:
        data: labelled samples.
        delta: a file that is added to the base while a batch of these is trained on, its head left out; None: none.
        repeats: how often its samples are seen in an epoch.
    """

    data: object
    delta: Path | None = None
    repeats: int = 1


def read_samples(data: object, loaded: LoadedModel, length: int | None, *, labelled: bool = False) -> Samples:
    """Samples for ``loaded``: arrays called like parameters of its ``forward`` are its inputs, text becomes tokens."""
    return load_samples(data, labelled=labelled, parameters=loaded.parameters, text=loaded.text, length=length)


def read_labelled(data: object, loaded: LoadedModel, length: int | None) -> tuple[Samples, TrainingData]:
    """Labelled samples for ``loaded``; text in batches as long as their longest."""
    samples = read_samples(data, loaded, length, labelled=True)
    return samples, training_data(samples, loaded)


def training_data(samples: Samples, loaded: LoadedModel) -> TrainingData:
    """``samples``, which have labels, to train ``loaded`` on; text in batches as long as their longest."""
    text = loaded.text
    masked = text is not None and _MASK in text.inputs and len(samples.inputs) == len(text.inputs)
    return TrainingData.of(samples, text.inputs.index(_MASK) if text and masked else None)


def read_sources(
    several: Mapping[str, Source], loaded: LoadedModel, length: int | None
) -> tuple[Samples, TrainingData]:
    """All sources' samples as one."""
    read = {name: read_labelled(each.data, loaded, length) for name, each in several.items()}
    repeats = {name: each.repeats for name, each in several.items()}
    for name, count in repeats.items():
        if count < 1:
            raise InputError(f"--repeat {name}={count}: at least 1")
    joined = TrainingData.joined({name: data for name, (_, data) in read.items()}, repeats)
    told = ", ".join(samples.source for samples, _ in read.values())
    notes = tuple(f"{name}: {note}" for name, (samples, _) in read.items() for note in samples.notes)
    return Samples(joined.inputs, joined.labels, told, notes, joined.names), joined


def new_outputs(loaded: LoadedModel, data: TrainingData, source: str) -> int | None:
    """How many outputs a new head of a Hugging Face folder's encoder needs; None: it has a head, or takes none."""
    if loaded.text is None or is_classifier(loaded.module):
        return None
    if loaded.text.causal:
        raise InputError(
            f"{loaded.source} predicts the next token, and its texts are cut from running text; labelled texts need an "
            "encoder"
        )
    if not data.classes:
        return 1
    found = data.labels.unique()
    least, most = int(found[0]), int(found[-1])
    hint = "numbers to predict need a fraction, as in 3.0"
    if least < 0 or most < 1:
        raise InputError(
            f"{source} has classes {least} to {most}; a new head needs them numbered from 0, two at least; {hint}"
        )
    if 2 * len(found) < most + 1:
        raise InputError(
            f"{source} has {len(found):,} of the classes 0 to {most:,}; number them without gaps, or, if they are no "
            f"classes: {hint}"
        )
    return most + 1


def as_labels_of(trained: TrainingData, other: TrainingData) -> TrainingData:
    """``other`` with numbers to predict where ``trained`` has those: by chance all of its labels may be whole."""
    if trained.classes or not other.classes:
        return other
    return replace(other, labels=other.labels.to(trained.labels.dtype))


@torch.no_grad()
def check_labels(module: nn.Module, data: TrainingData, source: str) -> None:
    """Refuse labels that the model has no output for, before a criterion says so in its own words."""
    inputs, some = data.take(torch.arange(min(2, len(data))))
    try:
        outputs = data.output(module, inputs)
    except Exception as error:
        raise InputError(f"the model does not take the samples of {source}: {error}") from error
    if not data.classes:
        if outputs.numel() != some.numel():
            raise InputError(
                f"{source} has numbers of shape {list(some.shape)} for {len(some)} samples, the model's output has "
                f"shape {list(outputs.shape)}; give whole numbers for classes, or a model with an output a number"
            )
        return
    if outputs.dim() != 2:
        raise InputError(f"{source} has classes, the model's output has shape {list(outputs.shape)}, not [N, classes]")
    least, most = int(data.labels.min()), int(data.labels.max())
    if least < 0 or most >= outputs.shape[1]:
        raise InputError(
            f"{source} has classes {least} to {most}, the model has outputs for 0 to {outputs.shape[1] - 1}; give it a "
            "head with an output a class"
        )


def named_sources(data: object) -> dict[str, Source]:
    """Sources by name; none where ``data`` is of one."""
    return (
        {str(name): each for name, each in data.items() if isinstance(each, Source)}
        if isinstance(data, Mapping)
        else {}
    )
