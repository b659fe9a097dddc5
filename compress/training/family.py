"""One low-rank model, many devices: the decomposed module stored once, ordered, and every size it can be cut to.

A family is a folder: ``family.pt`` (the decomposed module), ``family.json`` (its members: ranks, MACs, weights, loss,
and the metric where there was test data), ``norms.safetensors`` (each
member's statistics of BatchNorm), ``model.pt`` (the largest member in ordinary layers), ``family.png`` (the
curve). Any member is cut from ``family.pt`` without training.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.checkpoint import load_model
from compress.errors import InfeasibleBudget, InputError
from compress.lowrank.decompose import decomposed_layers, extract
from compress.lowrank.norms import set_norm_statistics
from compress.lowrank.truncate import Member
from compress.machine import Environment
from compress.records import Record

__all__ = ["Family", "FamilyMember", "choose_member", "cut", "read_family", "save_module", "write_family"]

_CLASSES = tuple(
    f"compress.lowrank.{name}"
    for name in ("layers.LowRankLinear", "layers.LowRankConv2d", "layers.SpatialConv2d", "attention.OpenAttention")
)


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
    input_shape: tuple[int, ...]
    members: tuple[FamilyMember, ...]
    layers: dict[str, str]
    dense: dict[str, str]
    notes: tuple[str, ...] = ()
    environment: Environment


def weights_of(module: nn.Module, member: Member) -> int:
    """Parameters of ``module`` cut to ``member``, each layer in its cheaper form."""
    layers = decomposed_layers(module)
    inside = {id(each) for layer in layers.values() for each in (layer.up, layer.down)}
    rest = sum(each.numel() for each in module.parameters() if id(each) not in inside)
    return rest + sum(layer.cost(member.ranks.get(name, layer.rank)) for name, layer in layers.items())


def write_family(
    folder: Path, module: nn.Module, family: Family, statistics: Sequence[dict[str, Tensor]], *, overwrite: bool = False
) -> None:
    """Write ``folder``, whole or not at all; ``module`` is decomposed, and stays so.

    ``statistics`` are every member's own of BatchNorm.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save(module, partial / "family.pt")
    (partial / "family.json").write_text(family.model_dump_json(indent=1) + "\n")
    named = {f"{number}/{name}": value for number, each in enumerate(statistics) for name, value in each.items()}
    save_file(named, partial / "norms.safetensors")
    plain = copy.deepcopy(module)
    extract(plain)
    torch.save(plain, partial / "model.pt")
    draw(family, partial / "family.png")
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def read_family(folder: Path) -> tuple[nn.Module, Family]:
    """The decomposed module and its members.

    Raises:
        InputError: the folder is none, or is damaged.
    """
    from pydantic import ValidationError

    for name in ("family.pt", "family.json", "norms.safetensors"):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} has no {name}: `compress lowrank train` and `compress lowrank truncate` make one"
            )
    try:
        family = Family.model_validate_json((folder / "family.json").read_text())
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{folder}/family.json is damaged, or of another version of compress") from error
    module = load_model(folder / "family.pt", allow=_CLASSES).module
    have = {name: layer.rank for name, layer in decomposed_layers(module).items()}
    if have != family.members[0].ranks:
        raise InputError(f"{folder}: family.json and family.pt are not of one run: their ranks differ")
    return module, family


def choose_member(family: Family, *, macs: float | None = None, size: float | None = None) -> FamilyMember:
    """The most accurate member within limits, in MACs and in weights.

    Raises:
        InfeasibleBudget: none is; with the smallest.
    """
    fitting = [
        each
        for each in family.members
        if (macs is None or each.macs <= macs) and (size is None or each.weights <= size)
    ]
    if not fitting:
        least = min(family.members, key=lambda each: each.macs)
        raise InfeasibleBudget(
            f"no size is that small; the smallest has {least.macs:,} MACs ({least.macs / family.dense_macs:.2f}x), "
            f"{least.weights:,} weights ({least.weights / family.dense_weights:.2f}x)"
        )
    return min(fitting, key=lambda each: each.loss)


def cut(folder: Path, module: nn.Module, family: Family, member: FamilyMember) -> dict[str, str]:
    """Make ``module`` that member, in ordinary layers and with its own statistics; what became of each layer."""
    prefix = f"{family.members.index(member)}/"
    stored = load_file(folder / "norms.safetensors")
    own = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    set_norm_statistics(module, own)
    return extract(module, lambda name, layer: member.ranks.get(name, layer.rank))


def save_module(module: nn.Module, path: Path, *, overwrite: bool) -> None:
    """Write ``module`` as a model file, whole or not at all.

    Raises:
        InputError: the file is there already.
    """
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another --out, or replace it with --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    torch.save(module, temporary)
    os.replace(temporary, path)


def draw(family: Family, path: Path) -> None:
    """Metric (or loss) against the share of the dense model's MACs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    members = family.members
    measured = all(each.metric is not None for each in members)
    values: Sequence[float] = [float(each.metric or 0.0) if measured else each.loss for each in members]
    axes.plot([each.macs / family.dense_macs for each in members], values, marker="o", markersize=3)
    if measured and family.dense_metric is not None:
        axes.axhline(family.dense_metric, linestyle=":", color="grey", label="dense")
        axes.legend()
    axes.set(xlabel="MACs, of the dense model's", ylabel=family.metric_name if measured else family.loss_name)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
