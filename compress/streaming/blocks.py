"""A large model as a skeleton and one block at a time.

The skeleton is the model with a single block, made of ``transformers``' own classes; that block takes the weights of
each of the model's blocks in turn. What stands before the blocks runs once; what it hands to the first one is kept.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.models.growth import bounded
from compress.models.huggingface import TextReader, read_config, text_reader
from compress.models.weightfiles import extent
from compress.streaming.shards import Shards

__all__ = ["BlockModel", "open_blocks"]


class _StopError(Exception):
    """The first block was reached."""


@dataclass
class BlockModel:
    """A model whose blocks are alike.

    Attributes:
        shards: all tensors.
        skeleton: the model with one block, whose own weights are not the model's until :meth:`load`.
        path: of the list of blocks in the skeleton, such as ``model.layers``.
        prefix: what the names of the stored tensors have before the skeleton's, or the other way about where it begins
            with a minus.
        count: blocks in all.
        settings: ``config.json``.
        text: how text becomes token ids.
    """

    shards: Shards
    skeleton: nn.Module
    path: str
    prefix: str
    count: int
    settings: dict[str, Any]
    text: TextReader

    @property
    def block(self) -> nn.Module:
        """The one block there is."""
        return self.skeleton.get_submodule(f"{self.path}.0")

    def linears(self) -> dict[str, nn.Linear]:
        """Of the block, by name within it."""
        return {name: part for name, part in self.block.named_modules() if isinstance(part, nn.Linear)}

    def block_name(self, number: int) -> str:
        """What the names of the tensors of block ``number`` begin with, as stored."""
        return f"{self._stored(self.path)}.{number}."

    def tensors(self, number: int) -> list[str]:
        """Names of the stored tensors of block ``number``."""
        start = self.block_name(number)
        return [name for name in self.shards.names() if name.startswith(start)]

    def others(self) -> list[str]:
        """Names of the stored tensors that belong to no block."""
        start = self._stored(self.path) + "."
        return [name for name in self.shards.names() if not name.startswith(start)]

    def load(self, number: int) -> torch.dtype:
        """Give the block the weights of block ``number``, as float32; returns the type they are stored in.

        Raises:
            InputError: the block's tensors are not those of the architecture.
        """
        start = self.block_name(number)
        state = {name.removeprefix(start): value for name, value in self.shards.read(self.tensors(number)).items()}
        dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
        wanted = self.block.state_dict()
        missing = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
        if missing:
            raise InputError(
                f"{self.shards.folder}: block {number} lacks {', '.join(missing[:4])}, or has another shape"
            )
        self.block.load_state_dict({name: state[name].float() for name in wanted})
        return dtype

    def load_others(self) -> None:
        """Give the skeleton the weights outside of the blocks, as float32."""
        stored = {self._own(name): name for name in self.others()}
        found = self.shards.read(stored.values())
        state = {own: found[name].float() for own, name in stored.items()}
        loaded = self.skeleton.load_state_dict(state, strict=False)
        tied = {id(value) for name, value in self.skeleton.state_dict(keep_vars=True).items() if name in state}
        lacking = [
            name
            for name in loaded.missing_keys
            if not name.startswith(f"{self.path}.") and id(self.skeleton.state_dict(keep_vars=True)[name]) not in tied
        ]
        if lacking:
            raise InputError(f"{self.shards.folder} lacks {', '.join(lacking[:4])}; it is another model's")

    def first_inputs(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """For every batch what the first block is called with: its first argument, and all others by name."""
        block, seen = self.block, []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _StopError

        handle = block.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in batches:
                with torch.no_grad(), contextlib.suppress(_StopError):
                    self.skeleton(**batch)
                args, kwargs = seen.pop()
                if len(args) > 1:
                    raise InputError(
                        f"{type(block).__name__} is called with {len(args)} values by position, one is known"
                    )
                yield args[0], kwargs
        finally:
            handle.remove()

    def run(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What the block makes of ``hidden``."""
        with torch.no_grad():
            result = self.block(hidden, **kwargs)
        return result if isinstance(result, Tensor) else result[0]

    def _stored(self, own: str) -> str:
        return own.removeprefix(self.prefix[1:]) if self.prefix.startswith("-") else self.prefix + own

    def _own(self, stored: str) -> str:
        return self.prefix[1:] + stored if self.prefix.startswith("-") else stored.removeprefix(self.prefix)


def open_blocks(folder: Path) -> BlockModel:
    """The model in ``folder``, its weights not yet read.

    Raises:
        InputError: it is no Hugging Face folder of a text model, or its blocks are not alike.
    """
    settings, architecture, config = read_config(folder)
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise InputError(f"{folder}: config.json has no num_hidden_layers, so its blocks are not known")
    kinds = set(getattr(config, "layer_types", None) or ["one"])
    if len(kinds) > 1:
        raise InputError(
            f"{folder}: its blocks are of {len(kinds)} kinds ({', '.join(sorted(kinds))}), one is supported"
        )
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    small.use_cache = False
    with bounded(folder / "config.json", extent(folder)), torch.device("meta"):
        architecture(small)
    skeleton = architecture(small).float().eval()
    lists = [name for name, part in skeleton.named_modules() if isinstance(part, nn.ModuleList) and len(part) == 1]
    path = next(
        (name for name in lists if any(isinstance(m, nn.Linear) for m in skeleton.get_submodule(name).modules())), None
    )
    text = text_reader(folder, skeleton)
    if path is None or text is None:
        raise InputError(f"{folder}: {type(skeleton).__name__} has no list of blocks, or takes no token ids")
    shards = Shards(folder)
    prefix = _prefix(shards, path, getattr(skeleton, "base_model_prefix", ""))
    if prefix is None:
        raise InputError(f"{folder}: no stored tensor is called {path}.0...; the weights are another model's")
    return BlockModel(shards, skeleton, path, prefix, count, settings, text)


def _prefix(shards: Shards, path: str, base: str) -> str | None:
    """How stored names differ from the skeleton's: files of a base model lack, or have, the base model's name."""
    starts: list[tuple[str, Callable[[str], str]]] = [
        ("", lambda name: name),
        (f"{base}.", lambda name: f"{base}.{name}"),
        (f"-{base}.", lambda name: name.removeprefix(f"{base}.")),
    ]
    for prefix, stored in starts:
        if any(name.startswith(f"{stored(path)}.0.") for name in shards.names()):
            return prefix
    return None
