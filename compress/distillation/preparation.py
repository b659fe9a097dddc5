"""What a distillation stands on: data, network, settings and a model, read and checked before an expert is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from compress.data.samples import Samples, load_samples
from compress.distillation.convnet import convnet
from compress.distillation.distiller import DistillSettings
from compress.distillation.experts import Experts, ExpertSettings
from compress.distillation.folder import refuse_existing, work_folder
from compress.distillation.model_terms import ModelTerms
from compress.distillation.network import FlatNetwork
from compress.distillation.representatives import require_enough
from compress.distillation.standardisation import Standardisation
from compress.errors import InputError
from compress.files.cache import cache_folder, digest
from compress.intake.model import ModelLike, read_model
from compress.models.user_code import build_module

__all__ = ["DistillOptions", "Preparation", "prepare"]

_JUDGED = 1000
_WHITENED = 12_288
_MOST_HELD_OUT = 0.5


@dataclass(frozen=True)
class DistillOptions:
    """All that can be chosen.

    Attributes:
        settings, experts: of the outer loop and of the experts; augmentations and seed are those of ``settings``.
        method: "ast", or "mtt": AST's parts off, in the experts too.
        network: ``package.module:factory``, called for every new network, or the factory itself; None for the ConvNet.
        width, depth: of the ConvNet.
        expert_folder: where experts are kept; None for the user's cache, by network, data and settings.
        test: labelled images that sets are judged on, in the place of some of the data.
        hold_out: share of each class's images that experts and sets are not made of, and sets are judged on; 0 for
            images the experts were trained on. A class keeps what the set begins with; nothing is held out where
            ``test`` is given or nothing is judged.
        zca: whiten.
        model: a model that the set is to suit, with ``factory`` and ``allow`` as everywhere.
        allow_poor_model: also one that gives the images other classes than their labels.
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
    test: object | None = None
    hold_out: float = 0.2
    zca: bool = False
    model: ModelLike | None = None
    factory: str | None = None
    allow: tuple[str, ...] = ()
    allow_poor_model: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None
    nets: int = 2
    judge_steps: int = 200
    every: int = 25
    overwrite: bool = False
    allow_originals: bool = False


@dataclass(frozen=True, eq=False)
class Preparation:
    """Everything but the experts' training.

    Attributes:
        x: all real images as the model takes them [N, C, H, W].
        kept: those that experts are trained on and sets are made of, by index.
        z, labels: of them, standardised or whitened, and their classes.
        unseen, unseen_labels: z of images to judge sets on that no expert sees; empty: there are none.
        unseen_are: they, in words.
        work: where the state of the run is kept.
    """

    settings: DistillSettings
    classes: int
    x: Tensor
    kept: Tensor
    z: Tensor
    labels: Tensor
    unseen: Tensor
    unseen_labels: Tensor
    unseen_are: str
    standardisation: Standardisation
    network: FlatNetwork
    experts: Experts
    terms: ModelTerms | None
    work: Path
    notes: tuple[str, ...]

    @property
    def span(self) -> tuple[float, float]:
        """The smallest and the largest value of all real images."""
        return float(self.x.min()), float(self.x.max())


def prepare(data: object, out: Path, classes: int, options: DistillOptions) -> Preparation:
    """Read and check everything.

    Raises:
        InputError: the data, the network, the model or an option cannot be used, or ``out`` exists.
    """
    refuse_existing(out, overwrite=options.overwrite)
    given = options.expert_folder
    if given is not None and given.exists() and not given.is_dir():
        raise InputError(f"--expert-folder {given}: it is a file, and a folder is wanted; give another name")
    settings, recipe = _chosen(options)
    recipe.check()
    settings.check(recipe.epochs)
    if not 0 <= options.hold_out <= _MOST_HELD_OUT:
        raise InputError(f"--hold-out {options.hold_out:g}: a share of the images, 0 to {_MOST_HELD_OUT:g}")
    if options.test is not None and not settings.looks:
        raise InputError("--test with --looks 0: no set is judged then; leave one out")
    samples = load_samples(data, mean=options.mean, std=options.std, labelled=True)
    x, labels = _labelled_images(samples, classes)
    require_enough(labels, classes, settings.each, samples.source)
    work = work_folder(out)
    if options.zca and x[0].numel() > _WHITENED:
        raise InputError(
            f"--zca: images of {x[0].numel():,} values need a matrix of that many squared; {_WHITENED:,} at most"
        )
    held_out = torch.tensor([], dtype=torch.int64)
    if settings.looks and options.test is None:
        held_out = _held_out(labels, classes, settings.each, options.hold_out, settings.seed)
    kept = torch.ones(len(x), dtype=torch.bool).index_fill(0, held_out, False).nonzero().flatten()
    network = FlatNetwork(_factory(options, x, classes))
    # What nobody is to have seen is not in the mean either.
    real = x[kept] if len(held_out) else x
    standardisation = Standardisation.of(real, whiten=options.zca)
    z = standardisation.apply(real)
    network.check(z, classes)
    unseen, unseen_labels, are = x[held_out], labels[held_out], f"{len(held_out):,} images held out from the experts"
    if options.test is not None:
        unseen, unseen_labels, are = _test_images(options, x, classes)
    seen = Samples((real,), labels[kept], samples.source).fingerprint
    data_hash = digest([seen, "zca" if options.zca else "standardised"])
    folder = given or cache_folder() / "experts" / digest(
        [network.fingerprint, data_hash, {**asdict(recipe), "count": 0}]
    )
    terms = None
    if options.model is not None:
        module = read_model(options.model, factory=options.factory, allow=options.allow).module
        terms = ModelTerms(module, real, labels[kept], classes, standardisation)
        if not options.allow_poor_model:
            terms.require_fitting()
    experts = Experts(folder, network, z, labels[kept], classes, recipe, data_hash)
    return Preparation(
        settings, classes, x, kept, z, labels[kept], standardisation.apply(unseen), unseen_labels, are,
        standardisation, network, experts, terms, work, samples.notes,
    )  # fmt: skip


def _held_out(labels: Tensor, classes: int, each: int, share: float, seed: int) -> Tensor:
    """Indices of ``share`` of each class of ``labels`` [N], at random, at most :data:`_JUDGED` in all."""
    generator, share = Generator().manual_seed(seed), min(share, _JUDGED / len(labels))
    chosen = []
    for number in range(classes):
        members = torch.nonzero(labels == number).flatten()
        count = min(round(share * len(members)), len(members) - each)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen)


def _test_images(options: DistillOptions, like: Tensor, classes: int) -> tuple[Tensor, Tensor, str]:
    """Images and labels of ``--test``, at most :data:`_JUDGED`, and what they are; shaped ``like`` [N, C, H, W]."""
    samples = load_samples(options.test, mean=options.mean, std=options.std, labelled=True)
    samples = samples.take(min(_JUDGED, len(samples)), options.settings.seed)
    x, labels = _labelled_images(samples, classes)
    if x.shape[1:] != like.shape[1:]:
        raise InputError(
            f"--test: images of {samples.source} have shape {list(x.shape[1:])}, those to distil {list(like.shape[1:])}"
        )
    require_enough(labels, classes, 0, samples.source)
    return x, labels, f"{len(x):,} images of {samples.source}"


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


def _labelled_images(samples: Samples, classes: int) -> tuple[Tensor, Tensor]:
    x, labels = samples.inputs[0], samples.labels
    assert labels is not None
    if len(samples.inputs) != 1 or x.dim() != 4 or not x.is_floating_point():
        raise InputError(f"{samples.source}: distillation takes images [N, C, H, W], got {x.dtype} {list(x.shape)}")
    if classes < 2:
        raise InputError(f"--classes {classes}: at least 2")
    if len(x) > 1 and bool((x == x[:1]).all()):
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
