"""What the gate compares a file on: samples where there are any, else what comes nearest to them.

Noise drives a network to where it never is on its data: ranges are left unused, saturation and attention look other
than they are. So it is the last resort, after a page of text of our own for models with a tokenizer, and inputs that
fit BatchNorm's statistics (compress/data/synthetic.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from compress.data.samples import Samples
from compress.data.synthetic import synthesize
from compress.errors import InputError
from compress.graph.traced import TracedModel, is_tokens
from compress.intake.model import Intake, check_fits, noise
from compress.models.huggingface import TextReader

__all__ = ["GATE_SAMPLES", "NOISE", "NOISE_SAMPLES", "GateInputs", "gate_inputs", "gives_classes", "page_of_text"]

GATE_SAMPLES = 256
NOISE = "noise"
"""What inputs are called that nothing better could be found for."""
NOISE_SAMPLES = 32
# Inputs that fit BatchNorm are few, made in few long steps, and only where those take no more than some seconds on one
# thread: of ResNet-20, 8 steps of 0.2 take less than one and lead from a distance of 0.76 to 0.18; 20 of 0.05 to 0.21.
_MADE, _LEAST, _STEPS, _RATE, _MOST_MACS = 8, 4, 8, 0.2, 1e10
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")
_PAGE = Path(__file__).with_name("gate_text.txt")


@dataclass(frozen=True, eq=False)
class GateInputs:
    """Inputs [N, ...], what they are, and what they cannot show, as sentences."""

    inputs: tuple[Tensor, ...]
    source: str
    notes: tuple[str, ...] = ()


def gate_inputs(
    traced: TracedModel, seed: int, *given: Samples | None, intake: Intake | None = None, ask: str
) -> GateInputs:
    """The first of ``given`` that is there; else what is made for ``intake``, the model before it was compressed.

    Args:
        traced: the graph that runs on them.
        ask: how the user can give samples, for the note on noise.

    Raises:
        InputError: samples do not fit the graph.
    """
    for samples in given:
        if samples is not None:
            check_fits(samples, traced)
            return GateInputs(tuple(x[:GATE_SAMPLES] for x in samples.inputs), samples.source)
    reason = "the model before compression is not at hand"
    if intake is not None:
        try:
            return _from_text(traced, intake.text) if intake.text is not None else _made(traced, intake, seed)
        except InputError as error:
            reason = str(error)
    kind = "token ids at random" if any(map(is_tokens, traced.example)) else NOISE
    note = f"judged on {kind}, which may not show what real samples would ({reason}); {ask}"
    return GateInputs(noise(traced, NOISE_SAMPLES, seed), kind, (note,))


def gives_classes(intake: Intake, *given: Samples | None) -> bool:
    """Whether the model's answer is the class of its largest score: labels are whole numbers, or its folder says so.

    Other outputs of that shape, as bins of pitch are or several labels at once, are read in other ways.
    """
    labels = [samples.labels for samples in given if samples is not None and samples.labels is not None]
    whole = [each.dim() == 1 and not each.is_floating_point() for each in labels]
    return any(whole) or _is_single_label(intake.original)


def _is_single_label(module: nn.Module) -> bool:
    """Whether a folder's settings say so. They may leave it to the labels; several a sample are never left open."""
    config = getattr(module, "config", None)
    kind = getattr(config, "problem_type", None)
    if kind is None and type(module).__name__.endswith(_CLASSIFIERS):
        return bool(getattr(config, "num_labels", 0) > 1)
    return bool(kind == "single_label_classification")


def page_of_text() -> list[str]:
    """The paragraphs of our page of text."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", _PAGE.read_text(encoding="utf-8").strip())]


def _from_text(traced: TracedModel, reader: TextReader) -> GateInputs:
    texts = page_of_text()
    length = None
    if not traced.dynamic_length:  # every sample has to be as long: each begins elsewhere and runs on over the end
        length = next(x.shape[1] for x in traced.example if is_tokens(x))
        texts = [" ".join(texts[start:] + texts) for start in range(len(texts))]
    encoded = tuple(reader.encode(texts, length).values())
    samples = Samples(tuple(x[:NOISE_SAMPLES] for x in encoded), None, "our page of text")
    check_fits(samples, traced)
    return GateInputs(samples.inputs, samples.source)


def _made(traced: TracedModel, intake: Intake, seed: int) -> GateInputs:
    macs = sum(layer.macs for layer in intake.layers)
    batch = None if traced.dynamic_batch else len(traced.example[0])
    count = min(_MADE, int(_MOST_MACS / max(3 * _STEPS * macs, 1)))  # a step goes forward and back
    if count < max(_LEAST, batch or 0):
        raise InputError(f"making inputs that fit BatchNorm would take too long at {macs / 1e9:,.1f} GMACs a sample")
    try:
        samples = synthesize(
            intake.original, traced.example, intake.fingerprint, most=count, batch=batch, seed=seed, steps=_STEPS,
            rate=_RATE,
        )  # fmt: skip
    except InputError as error:
        raise InputError("there is no tokenizer, and no BatchNorm that inputs could be made to fit") from error
    return GateInputs(samples.inputs, "inputs made from BatchNorm statistics")
