"""Two small language models from the shared data, written anew over plain modules: a Llama and a GPT of characters."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo import DATA

__all__ = ["LANGUAGE_MODELS", "LanguageCase"]


@dataclass(frozen=True)
class LanguageCase:
    """A model of tokens [N, T] to scores [N, T, V]; windows [N, T + 1] to calibrate on and to score on."""

    name: str
    module: nn.Module
    calibration: Tensor
    test: Tensor

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of its embeddings."""
        return tuple(name for name, part in self.module.named_modules() if isinstance(part, nn.Embedding))


class _Norm(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class _LlamaBlock(nn.Module):
    def __init__(self, weights: dict[str, Tensor], heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.attention_norm, self.feed_norm = _Norm(weights["rms_att"]), _Norm(weights["rms_ffn"])
        for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"):
            self.add_module(name, _linear(weights[name]))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (layer(y).unflatten(-1, (n, -1)).transpose(1, 2) for layer, n in (
            (self.wq, self.heads), (self.wk, self.groups), (self.wv, self.groups)
        ))  # fmt: skip
        q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        k, v = (each.repeat_interleave(self.heads // self.groups, dim=1) for each in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        y = self.feed_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


class _Llama(nn.Module):
    def __init__(self, file: Path) -> None:
        super().__init__()
        content = file.read_bytes()
        dim, hidden, layers, heads, groups, vocabulary, length = struct.unpack("7i", content[:28])
        numbers = torch.from_numpy(np.frombuffer(content, np.float32, offset=28).copy())
        kv = dim * groups // heads
        shapes = {
            "tok": (vocabulary, dim), "rms_att": (layers, dim), "wq": (layers, dim, dim), "wk": (layers, kv, dim),
            "wv": (layers, kv, dim), "wo": (layers, dim, dim), "rms_ffn": (layers, dim), "w1": (layers, hidden, dim),
            "w2": (layers, dim, hidden), "w3": (layers, hidden, dim), "rms": (dim,),
        }  # fmt: skip
        found = {}
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            found[name], numbers = numbers[:count].reshape(shape).clone(), numbers[count:]
        self.embedding = nn.Embedding.from_pretrained(found.pop("tok"), freeze=False)
        self.norm = _Norm(found.pop("rms"))
        self.blocks = nn.ModuleList(
            _LlamaBlock({name: each[i] for name, each in found.items()}, heads, groups) for i in range(layers)
        )
        self.head = _linear(self.embedding.weight.detach().clone())
        angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, dim // heads, 2) / (dim // heads))
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cosine, sine = self.cosine[: tokens.shape[1]], self.sine[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cosine, sine)
        return self.head(self.norm(x))


class _GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.projection = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=x.shape[-1] ** -0.5)
        x = x + self.projection(y.transpose(1, 2).flatten(2))
        return x + self.feed(self.ln2(x))


class _GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int = 96, heads: int = 4, layers: int = 3, block: int = 96) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(block, width)
        self.blocks = nn.ModuleList(_GPTBlock(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _windows(tokens: Tensor, length: int, count: int | None = None) -> Tensor:
    """Consecutive windows of ``length + 1`` tokens, each starting where the last one's targets end."""
    starts = torch.arange(0, len(tokens) - length, length)[:count]
    return torch.stack([tokens[start : start + length + 1] for start in starts])


def _stories() -> LanguageCase:
    folder = DATA / "stories260K"
    tokens = torch.from_numpy(np.load(folder / "tinystories_sample_tok512.npy").astype(np.int64))
    windows = _windows(tokens, 512)
    return LanguageCase("stories260K", _Llama(folder / "stories260K.bin").eval(), windows[:64], windows[64:])


def _char_gpt() -> LanguageCase:
    folder = DATA / "char_gpt"
    stored = torch.load(folder / "gpt_357k_shakespeare.pt", weights_only=True)
    text = (folder / "tinyshakespeare.txt").read_text()
    tokens = torch.tensor([stored["stoi"][each] for each in text])
    module = _GPT(len(stored["stoi"]))
    module.load_state_dict(_renamed(stored["model_state"]))
    hold_out = int(0.9 * len(tokens))
    return LanguageCase(
        "char-gpt", module.eval(), _windows(tokens[:hold_out], 96, 512), _windows(tokens[hold_out:], 96)
    )


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's names as this module's; the heads' separate matrices become one."""
    names = {
        "token_embedding": "token", "position_embedding": "position", "ln_f": "norm", "lm_head": "head",
        "sa.proj": "projection", "ffwd.net": "feed",
    }  # fmt: skip
    found = {}
    for name, tensor in state.items():
        if ".heads." in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = tensor
    for block in range(3):
        for part in ("query", "key", "value"):
            heads = [state[f"blocks.{block}.sa.heads.{head}.{part}.weight"] for head in range(4)]
            found[f"blocks.{block}.{part}.weight"] = torch.cat(heads)
    return found


LANGUAGE_MODELS: dict[str, Callable[[], LanguageCase]] = {"stories260K": _stories, "char-gpt": _char_gpt}
