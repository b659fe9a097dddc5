"""``compress distill``: from labelled images to a folder with a few synthetic ones, through experts and matching."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from compress.cache import cache_folder, digest
from compress.calib.distilled import Normalisation
from compress.calib.samples import Samples, load_samples
from compress.distill.convnet import convnet
from compress.distill.distiller import PREVIEW_FILE, Distilled, Distiller, DistillSettings
from compress.distill.experts import Experts, ExpertSettings
from compress.distill.folder import DistillReport, refuse_existing, work_folder, write_folder
from compress.distill.judge import Judge
from compress.distill.model_terms import ModelTerms
from compress.distill.neighbours import Neighbours, find_neighbours
from compress.distill.network import FlatNetwork
from compress.distill.representatives import random_images, representatives, require_enough
from compress.distill.sheet import write_sheet
from compress.distill.standardisation import Standardisation
from compress.errors import InputError
from compress.factory import build_module
from compress.intake import ModelLike, read_model
from compress.machine import describe_environment

__all__ = ["DistillOptions", "distill"]

Progress = Callable[[str, int, int], None]

_JUDGED = 1000
_WHITENED = 12_288


@dataclass(frozen=True)
class DistillOptions:
    """All that can be chosen.

    Attributes:
        settings, experts: of the outer loop and of the experts; augmentations and seed are those of ``settings``.
        method: "ast", or "mtt": AST's parts off, in the experts too.
        network: ``package.module:factory``, called for every new network, or the factory itself; None for the ConvNet.
        width, depth: of the ConvNet.
        expert_folder: where experts are kept; None for the user's cache, by network, data and settings.
        zca: whiten.
        model: a model that the set is to suit, with ``factory`` and ``allow`` as everywhere.
        mean, std: of images given as bytes, as everywhere.
        nets, judge_steps: networks that are trained, so many steps each, when the set is judged.
        overwrite: replace what is there, and throw the state of another run away; that of the same run goes on.
        allow_originals: write the real images of the start where no iterate was better, in the place of refusing.
    """

    settings: DistillSettings = field(default_factory=DistillSettings)
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    method: str = "ast"
    network: str | Callable[[], nn.Module] | None = None
    width: int = 32
    depth: int = 3
    expert_folder: Path | None = None
    zca: bool = False
    model: ModelLike | None = None
    factory: str | None = None
    allow: tuple[str, ...] = ()
    mean: list[float] | None = None
    std: list[float] | None = None
    nets: int = 2
    judge_steps: int = 200
    every: int = 25
    overwrite: bool = False
    allow_originals: bool = False


def distill(
    data: object,
    out: Path,
    *,
    classes: int,
    options: DistillOptions = DistillOptions(),
    progress: Progress = lambda what, done, total: None,
) -> DistillReport:
    """Distil labelled images into ``options.settings.each`` a class and write the folder ``out``.

    A stopped run keeps its state in ``.<out>.work`` beside it (with ``preview.png``), and the same call goes on.

    Args:
        data: what ``--calib`` takes, with labels 0 to ``classes`` - 1; images [N, C, H, W].

    Raises:
        InputError: the data, the network or an option cannot be used, an expert does not learn, or no iterate was
            better than the real images of the start (unless ``allow_originals``).
    """
    refuse_existing(out, overwrite=options.overwrite)
    given = options.expert_folder
    if given is not None and given.exists() and not given.is_dir():
        raise InputError(f"--expert-folder {given}: it is a file, and a folder is wanted; give another name")
    settings, recipe = _chosen(options)
    recipe.check()
    settings.check(recipe.epochs)
    samples = load_samples(data, mean=options.mean, std=options.std, labelled=True)
    x, labels = _labelled_images(samples, classes, settings.each)
    work = work_folder(out)
    if options.zca and x[0].numel() > _WHITENED:
        raise InputError(
            f"--zca: images of {x[0].numel():,} values need a matrix of that many squared; {_WHITENED:,} at most"
        )
    network = FlatNetwork(_factory(options, x, classes))
    standardisation = Standardisation.of(x, whiten=options.zca)
    z = standardisation.apply(x)
    network.check(z, classes)
    data_hash = digest([samples.fingerprint, "zca" if options.zca else "standardised"])
    folder = options.expert_folder or cache_folder() / "experts" / digest(
        [network.fingerprint, data_hash, {**asdict(recipe), "count": 0}]
    )
    terms = None
    if options.model is not None:
        module = read_model(options.model, factory=options.factory, allow=options.allow).module
        terms = ModelTerms(module, x, labels, classes, standardisation)

    experts = Experts(folder, network, z, labels, classes, recipe, data_hash)
    accuracies = experts.train(progress)
    if settings.representative:
        logits = network.logits(experts.rows(settings.seed % recipe.count, recipe.epochs, recipe.epochs + 1)[0], z)
        start = representatives(logits, labels, classes, settings.each, settings.seed)
    else:
        start = random_images(labels, classes, settings.each, settings.seed)

    low, high = float(x.min()), float(x.max())
    some = torch.randperm(len(z), generator=Generator().manual_seed(settings.seed))
    some = some[~torch.isin(some, start)][:_JUDGED]
    judge = None
    if len(some):
        judge = Judge(
            network, z[some], labels[some], options.nets, options.judge_steps, settings.momentum,
            settings.augmentations, settings.seed,
        )  # fmt: skip
    clock = _Clock(progress)
    distiller = Distiller(
        experts, z[start], labels[start], settings, judge=judge, terms=terms, state=work / "state.safetensors",
        every=options.every, discard=options.overwrite,
        show=lambda images: write_sheet(
            work / PREVIEW_FILE, standardisation.invert(images), settings.each, low, high
        ),
    )  # fmt: skip
    found = distiller.run(clock.update)
    if found.scores and found.iteration == 0 and not options.allow_originals:
        raise InputError(_originals(found, len(start), work if distiller.kept else None))
    images = standardisation.invert(found.images)
    neighbours = find_neighbours(images, start, x, settings.seed)
    report = DistillReport(
        classes=classes,
        each=settings.each,
        method=options.method,
        provenance=digest([distiller.fingerprint, found.iteration]),
        step_size=found.rate,
        learned_step_size=found.learned,
        iteration=found.iteration,
        scores=found.scores,
        losses=tuple(found.losses),
        matching=tuple(found.matching),
        expert_accuracies=tuple(accuracies),
        seconds_per_100=clock.seconds_per_100,
        neighbours=neighbours,
        settings={"distillation": asdict(settings), "experts": asdict(recipe)},
        notes=(*samples.notes, *_notes(found, terms, len(some))),
        warnings=tuple(_warnings(found, neighbours)),
        environment=describe_environment(),
    )
    given = Normalisation(*(None if each is None else tuple(each) for each in (options.mean, options.std)))
    write_folder(
        out, images, labels[start], settings.momentum, standardisation, given, report, low, high,
        overwrite=options.overwrite,
    )  # fmt: skip
    distiller.forget()
    return report


class _Clock:
    """Passes progress on, and times iterations between two reports of them."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._last, self._seconds, self._count = progress, (0, 0.0), 0.0, 0

    def update(self, what: str, done: int, total: int) -> None:
        now, (before, then) = time.perf_counter(), self._last
        if done == before + 1 and then:
            self._seconds, self._count = self._seconds + now - then, self._count + 1
        judging = not what.startswith("distilling")
        self._last = (done, 0.0 if judging else now)
        self._progress(what, done, total)

    @property
    def seconds_per_100(self) -> float | None:
        return 100 * self._seconds / self._count if self._count else None


def _chosen(options: DistillOptions) -> tuple[DistillSettings, ExpertSettings]:
    """The settings of the method, and experts with the same augmentations and seed.

    Raises:
        InputError: the method is unknown, or is MTT and one of AST's parts was set to a value of its own.
    """
    if options.method not in ("ast", "mtt"):
        raise InputError(f"--method {options.method}: known are ast, mtt")
    settings, experts = options.settings, options.experts
    if options.method == "mtt":
        for option, value, default, off in (
            ("--intermediate", settings.beta, DistillSettings.beta, "none"),
            ("--perturbation", settings.perturbation, DistillSettings.perturbation, 0),
            ("--penalty", experts.penalty, ExpertSettings.penalty, 0),
        ):
            if value not in (default, off):
                raise InputError(f"{option} {value}: a part of AST, which --method mtt goes without; leave one out")
        if settings.balance:
            raise InputError("--balance: a part of AST, which --method mtt goes without; leave one out")
        settings, experts = settings.mtt(), experts.mtt()
    given = asdict(experts) | {"augmentations": settings.augmentations, "seed": settings.seed}
    return settings, ExpertSettings(**given)


def _labelled_images(samples: Samples, classes: int, each: int) -> tuple[Tensor, Tensor]:
    x, labels = samples.inputs[0], samples.labels
    assert labels is not None
    if len(samples.inputs) != 1 or x.dim() != 4 or not x.is_floating_point():
        raise InputError(f"{samples.source}: distillation takes images [N, C, H, W], got {x.dtype} {list(x.shape)}")
    if classes < 2:
        raise InputError(f"--classes {classes}: at least 2")
    require_enough(labels, classes, each, samples.source)
    if bool((x == x[:1]).all()):
        raise InputError(
            f"{samples.source}: all {len(x)} images are the same, and nothing can be learned from them; check the file"
        )
    return x, labels


def _factory(options: DistillOptions, x: Tensor, classes: int) -> Callable[[], nn.Module]:
    network = options.network
    if isinstance(network, str):
        return lambda: build_module(network, "--network")
    if network is not None:
        return network
    channels, height, width = x.shape[1:]
    return lambda: convnet(channels, classes, (height, width), width=options.width, depth=options.depth)


def _originals(found: Distilled, count: int, work: Path | None) -> str:
    ended = f" (stopped early: {found.stopped})" if found.stopped else ""
    anew = f" (each with --overwrite, as {work} keeps this run's state)" if work else ""
    return (
        f"nothing is written: no iterate was better than the {count} real images of the start{ended}; try more "
        f"--iterations or another --lr-images{anew}, or write real images with --allow-originals"
    )


def _warnings(found: Distilled, near: Neighbours) -> list[str]:
    """What makes the file as sensitive as the data, where that can be seen."""
    count = len(near.distances)
    if found.iteration == 0:
        return [f"the {count} images written are real ones: no iterate was better; treat this file like the originals"]
    if near.nearest_is_start or near.nearer_than_typical:
        return [
            f"{near.nearest_is_start} of the {count} images written are nearest to the real ones they began as, and "
            f"{near.nearer_than_typical} are as near to a real one as real ones are to each other: they can be matched "
            "to their originals; treat this file like the originals"
        ]
    return []


def _notes(found: Distilled, terms: ModelTerms | None, judged: int) -> list[str]:
    notes = [f"sets were judged on {judged} of the images the experts were trained on, none of them among the start's"]
    if not found.scores:
        notes = ["no set was judged: the last one was kept"]
    elif found.iteration == 0:
        notes.append("no iterate was better than the real images of the start, which are what was written")
    if found.stopped:
        notes.append(f"stopped early: {found.stopped}")
    if terms is not None and not terms.norms:
        notes.append("the model has no BatchNorm with statistics: its logits alone were matched")
    return notes
