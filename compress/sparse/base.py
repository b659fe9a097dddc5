"""Which model a delta belongs to: a hash over the values of everything but what the delta replaces whole."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

__all__ = ["base_hash", "base_tensors", "tensor_hashes"]

_HASH_BYTES = 1 << 24


def base_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name: what a model file holds."""
    kept = module.state_dict(keep_vars=True).keys()
    buffers = {name: each for name, each in module.named_buffers() if name in kept}
    return {**dict(module.named_parameters()), **buffers}


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's shape and values; half precision counts as the float32 numbers it stands for."""
    return {name: _hash(each) for name, each in tensors.items()}


def base_hash(hashes: Mapping[str, str], without: Collection[str] = ()) -> str:
    """One SHA-256 over names and hashes, sorted by name, of all tensors but those ``without``.

    Heads are left out because they differ by task on the same base, in shape too.
    """
    digest = hashlib.sha256()
    for name in sorted(hashes):
        if name not in without:
            digest.update(f"{name}\0{hashes[name]}\0".encode())
    return digest.hexdigest()


def _hash(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    digest = hashlib.sha256(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(data), _HASH_BYTES):
        digest.update(data[start : start + _HASH_BYTES].data)
    return digest.hexdigest()
