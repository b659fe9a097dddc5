"""One low-rank model, many devices: the decomposed module stored once, ordered, and every size it can be cut to.

A family is a folder: ``family.pt`` (the decomposed module), ``family.json`` (its members: ranks, MACs, weights, loss,
and the metric where there was test data), ``norms.safetensors`` (each
member's statistics of BatchNorm), ``model.pt`` (the largest member in ordinary layers), ``family.png`` (the
curve). Any member is cut from ``family.pt`` without training.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field, field_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.errors import InputError
from compress.files.known_folders import FAMILY_FILE
from compress.files.outputs import check_folder, check_free, new_file, new_folder
from compress.lowrank.decompose import decomposed_layers, extract
from compress.lowrank.norms import set_norm_statistics
from compress.lowrank.truncate import Member
from compress.models.checkpoint import load_model
from compress.records.environment import Environment
from compress.records.layers import Record

__all__ = [
    "Family",
    "FamilyInput",
    "FamilyMember",
    "check_file",
    "check_picture",
    "cut",
    "plot",
    "read_family",
    "read_statistics",
    "refuse_existing",
    "save_module",
    "weights_of",
    "write_family",
]

_VERB = "compress lowrank"
_MODULE, _NORMS = "family.pt", "norms.safetensors"
_MACS_AXIS = "MACs, of the dense model's"
_CLASSES = tuple(
    f"compress.lowrank.{name}"
    for name in ("layers.LowRankLinear", "layers.LowRankConv2d", "layers.SpatialConv2d", "attention.OpenAttention")
)


class FamilyInput(Record):
    """One input of the model, without its batch."""

    shape: tuple[int, ...]
    dtype: str = Field(description="torch's name, as in float32")

    @field_validator("dtype")
    @classmethod
    def _known(cls, name: str) -> str:
        # Before torch is asked for whatever attribute a file names.
        if not isinstance(getattr(torch, name, None) if name.isidentifier() else None, torch.dtype):
            raise ValueError("no dtype of torch's")
        return name

    @classmethod
    def of(cls, x: Tensor) -> FamilyInput:
        """The form of ``x`` [N, ...]."""
        return cls(shape=tuple(x.shape[1:]), dtype=str(x.dtype).removeprefix("torch."))

    def example(self, count: int) -> Tensor:
        """[count, ...]: zeros, or ones of whole numbers, which are valid as token ids and as masks."""
        dtype = getattr(torch, self.dtype)
        make = torch.zeros if dtype.is_floating_point else torch.ones
        return make((count, *self.shape), dtype=dtype)


class FamilyMember(Record):
    """One size: components by layer, and what it costs and loses."""

    ranks: dict[str, int]
    macs: int
    weights: int
    loss: float
    metric: float | None = None


class Family(Record):
    """All sizes, the largest first."""

    schema_version: int = 1
    loss_name: str
    metric_name: str | None = None
    dense_macs: int
    dense_weights: int
    dense_metric: float | None = None
    inputs: tuple[FamilyInput, ...]
    members: tuple[FamilyMember, ...]
    layers: dict[str, str]
    dense: dict[str, str]
    notes: tuple[str, ...] = ()
    files: dict[str, str] = Field({}, description="SHA-256 of what lies beside family.json")
    environment: Environment


def weights_of(module: nn.Module, member: Member) -> int:
    """Parameters of ``module`` cut to ``member``, each layer in its cheaper form."""
    layers = decomposed_layers(module)
    inside = {id(each) for layer in layers.values() for each in (layer.up, layer.down)}
    rest = sum(each.numel() for each in module.parameters() if id(each) not in inside)
    return rest + sum(layer.cost(member.ranks.get(name, layer.rank)) for name, layer in layers.items())


def write_family(
    folder: Path, module: nn.Module, family: Family, statistics: Sequence[dict[str, Tensor]], *, overwrite: bool = False
) -> Family:
    """Write ``folder``, whole or not at all; ``module`` is decomposed, and stays so.

    ``statistics`` are every member's own of BatchNorm. Returns the family with its files' digests.

    Raises:
        InputError: as :func:`refuse_existing`, or there is no room.
    """
    with new_folder(folder, overwrite, FAMILY_FILE, _VERB) as partial:
        torch.save(module, partial / _MODULE)
        named = {f"{number}/{name}": value for number, each in enumerate(statistics) for name, value in each.items()}
        save_file(named, partial / _NORMS)
        family = family.model_copy(update={"files": {name: _sha256(partial / name) for name in (_MODULE, _NORMS)}})
        (partial / FAMILY_FILE).write_text(family.model_dump_json(indent=1) + "\n")
        plain = copy.deepcopy(module)
        extract(plain)
        torch.save(plain, partial / "model.pt")
        plot(family, partial / "family.png", [each.macs / family.dense_macs for each in family.members], _MACS_AXIS)
    return family


def read_family(folder: Path, allow: Sequence[str] = ()) -> tuple[nn.Module, Family]:
    """The decomposed module and its members; ``allow``: classes of the user's own that it may hold.

    Raises:
        InputError: the folder is none, or a file in it is missing, damaged or another run's.
    """
    from pydantic import ValidationError

    for name in (_MODULE, FAMILY_FILE, _NORMS):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} has no {name}: `compress lowrank train` and `compress lowrank truncate` make one"
            )
    try:
        family = Family.model_validate_json((folder / FAMILY_FILE).read_text())
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / FAMILY_FILE} is damaged, or of another version of compress") from error
    for name in (_MODULE, _NORMS):
        if _sha256(folder / name) != family.files.get(name):
            raise InputError(
                f"{folder / name} is not the file that {FAMILY_FILE} was written with (its SHA-256 differs): it was "
                "damaged, or is another run's; copy the folder again as a whole, or make it anew"
            )
    module = load_model(folder / _MODULE, allow=(*_CLASSES, *allow)).module
    have = {name: layer.rank for name, layer in decomposed_layers(module).items()}
    whole = family.members[0].ranks if family.members else {}
    # A layer that no sample ran through is in no member.
    if not whole or {name: have.get(name) for name in whole} != whole:
        raise InputError(f"{folder}: {FAMILY_FILE} and {_MODULE} are not of one run: their ranks differ")
    for number, member in enumerate(family.members):
        for name, rank in member.ranks.items():
            if not 0 <= rank <= have.get(name, -1):
                raise InputError(
                    f"{folder / FAMILY_FILE} was changed: member {number} has rank {rank} in layer {name}, which has 0 "
                    f"to {have.get(name, 'none')}"
                )
    return module, family


def read_statistics(folder: Path, family: Family) -> list[dict[str, Tensor]]:
    """Every member's statistics of BatchNorm, in the order of ``family``; empty where the model has none."""
    found: list[dict[str, Tensor]] = [{} for _ in family.members]
    for key, value in load_file(folder / _NORMS).items():
        number, _, name = key.partition("/")
        found[int(number)][name] = value
    return found


def cut(folder: Path, module: nn.Module, family: Family, member: FamilyMember) -> dict[str, str]:
    """Make ``module`` that member, in ordinary layers and with its own statistics; what became of each layer."""
    set_norm_statistics(module, read_statistics(folder, family)[family.members.index(member)])
    return extract(module, lambda name, layer: member.ranks.get(name, layer.rank))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Say before any work that ``folder`` is taken.

    Raises:
        InputError: it is there already, and is not to be replaced, or is no family, which nothing replaces.
    """
    check_folder(folder, overwrite, FAMILY_FILE, _VERB)


def check_file(path: Path, *, overwrite: bool) -> None:
    """Say before any work that ``path``, where :func:`save_module` is to write, is taken.

    Raises:
        InputError: it is there already, and is not to be replaced.
    """
    check_free(path, overwrite)


def save_module(module: nn.Module, path: Path, *, overwrite: bool) -> None:
    """Write ``module`` as a model file, whole or not at all.

    Raises:
        InputError: the file is there already.
    """
    check_file(path, overwrite=overwrite)
    with new_file(path) as temporary:
        torch.save(module, temporary)


def plot(family: Family, path: Path, costs: Sequence[float], axis: str, *, dense: float | None = None) -> None:
    """Draw every member's metric, or its loss where there is none, against ``costs``.

    Args:
        costs: one a member.
        axis: what they are.
        dense: the dense model's own cost, where that is not 1.

    Raises:
        InputError: as :func:`check_picture`, or the disk is full or not writable.
    """
    from matplotlib.figure import Figure

    check_picture(path)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    members = family.members
    measured = all(each.metric is not None for each in members)
    values: Sequence[float] = [float(each.metric or 0.0) if measured else each.loss for each in members]
    # Times differ by chance, so that a line through all members would go to and fro: it joins the best for their cost.
    sign = -1.0 if measured and family.metric_name == "accuracy" else 1.0
    front: list[tuple[float, float]] = []
    for cost, value in sorted(zip(costs, values, strict=True), key=lambda pair: (pair[0], sign * pair[1])):
        if not front or sign * value < sign * front[-1][1]:
            front.append((cost, value))
    axes.plot(costs, values, "o", markersize=3)
    axes.plot(*zip(*front, strict=True), color="tab:blue", linewidth=1)
    if measured and family.dense_metric is not None:
        axes.axhline(family.dense_metric, linestyle=":", color="grey", label="dense")
    if dense is not None:
        axes.axvline(dense, color="tab:red", linewidth=1, label="dense model's time")
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    axes.set(xlabel=axis, ylabel=family.metric_name if measured else family.loss_name)
    axes.grid(alpha=0.3)
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:].lower())


def check_picture(path: Path) -> None:
    """Whether ``path`` names a picture that can be drawn.

    Raises:
        InputError: its ending is none of a picture's, or it is a folder.
    """
    from matplotlib.figure import Figure

    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise InputError(f"--out {path} is no picture's name; it may end in {', '.join(f'.{each}' for each in known)}")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; name a file, as {path / 'latency.png'}")
