"""A model and its data, read and checked against each other: where every verb that compresses begins."""

from __future__ import annotations

from dataclasses import dataclass

from compress.data.samples import Samples, load_samples
from compress.data.synthetic import FIT_NEEDED, is_synthetic, synthesize
from compress.intake.doubts import sample_doubts
from compress.intake.metric import check_metric
from compress.intake.model import Intake, ModelLike, read_model, take_in
from compress.models.huggingface import TextReader
from compress.options import Options, Source
from compress.progress import Progress, silent
from compress.sparse.deltas import add_deltas

__all__ = ["Work", "open_work", "read_samples"]

_ALONE = (
    "no calibration samples: weights alone are quantized, and layers compute in floats; --calib synthetic makes "
    "samples from the model's BatchNorm statistics, for integers"
)


@dataclass(frozen=True)
class Work:
    """A model, calibration and labelled samples (None: none given); a hint to the user; doubts about the samples."""

    intake: Intake
    samples: Samples | None
    labelled: Samples | None
    hint: str | None = None
    doubts: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is doubtful, what was assumed of all three, and the hint, as sentences."""
        evaluation = self.labelled.notes if self.labelled else ()
        return (
            *self.doubts,
            *self.intake.notes,
            *(self.samples.notes if self.samples else ()),
            *(f"evaluation data: {note}" for note in evaluation),
            *([self.hint] if self.hint else []),
        )


def open_work(
    model: ModelLike,
    calib: object | None,
    eval_data: object | None,
    options: Options,
    source: Source,
    progress: Progress = silent,
) -> Work:
    """Read everything that a run needs; calibration inputs are made if ``calib`` is ``synthetic``.

    Raises:
        InputError: one of them cannot be read, or they do not go together.
    """
    loaded = read_model(model, factory=source.model_factory, allow=source.allow, classes=source.classes)
    loaded = add_deltas(loaded, source.deltas)
    made = is_synthetic(calib)
    samples = labelled = None
    if calib is not None and not made:
        samples = read_samples(calib, source, loaded.parameters, loaded.text, limit=options.samples, seed=options.seed)
    if eval_data is not None:
        labelled = read_samples(eval_data, source, loaded.parameters, loaded.text, labelled=True)
    intake = take_in(loaded, input_shape=source.input_shape, samples=samples or labelled)
    if labelled is not None:
        check_metric(intake, labelled)
    if made:
        samples = synthesize(
            intake.original,
            intake.traced.example,
            intake.fingerprint,
            most=options.samples,
            batch=None if intake.traced.dynamic_batch else len(intake.traced.example[0]),
            seed=options.seed,
            needed=FIT_NEEDED,
            progress=progress,
        )
    doubts = sample_doubts(samples, intake) if samples is not None and not made else ()
    if labelled is not None:
        doubts += sample_doubts(labelled, intake, "evaluation data: ")
    alone = samples is None and (options.act_bits, options.dynamic, options.group_size) == (None, None, None)
    return Work(intake, samples, labelled, _ALONE if alone and intake.traced.statistics else None, doubts)


def read_samples(
    data: object,
    source: Source,
    parameters: tuple[str, ...],
    text: TextReader | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    labelled: bool = False,
) -> Samples:
    """Samples as ``source`` says, for a model whose ``forward`` has ``parameters``, and that takes ``text``.

    Raises:
        InputError: see :func:`compress.data.samples.load_samples`.
    """
    return load_samples(
        data,
        limit=limit,
        seed=seed,
        labelled=labelled,
        mean=source.mean,
        std=source.std,
        size=source.size,
        parameters=parameters,
        text=text,
        length=source.length,
    )
