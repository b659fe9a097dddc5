"""Toy networks that several test files use. One that a single file needs stands in that file."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS = 40


class Residual(nn.Module):
    """Images to classes: a stem with BatchNorm, a block with a projection, a head behind a pool."""

    def __init__(self, channels: int = 3, width: int = 8, outputs: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.body = nn.ModuleDict({name: nn.Conv2d(width, width, 3, padding=1) for name in "ab"})
        self.short = nn.Conv2d(width, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.body["b"](torch.relu(self.body["a"](x)))
        x = torch.relu(y + self.short(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Shared(nn.Module):
    """Three linears, the one in the middle called twice."""

    def __init__(self, inputs: int = 6, width: int = 8, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.twice(torch.relu(self.twice(x)))))


class TwoInputs(nn.Module):
    """Two vectors a sample, a linear on each, and one on their sum."""

    def __init__(self, x: int = 6, y: int = 4, width: int = 8, outputs: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(x, width), nn.Linear(y, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x) + self.b(y)))


class FeaturesAndWords(nn.Module):
    """Features [N, 8] and token ids [N, L] to scores [N, L, 4]; how they are given is a subclass's ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.last = nn.Embedding(20, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def scores(self, features: Tensor, ids: Tensor) -> Tensor:
        """See the class."""
        return self.last(torch.relu(self.first(features)[:, None] + self.words(ids)))


class Masked(nn.Module):
    """Sequences: a mask of truth values, made early and used late, and a value that is the same for every sample."""

    def __init__(self, length: int = 5, width: int = 6, outputs: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, outputs)
        self.place = nn.Parameter(torch.randn(1, length, width))

    def forward(self, x: Tensor) -> Tensor:
        mask, place = x > 0, self.place * 2
        return self.c(torch.where(mask, self.b(torch.relu(self.a(x)) + place), x)).mean(1)


class SequenceFirst(nn.Module):
    """Sequences [N, L, width], turned to [L, N, width] on the way."""

    def __init__(self, width: int = 6, outputs: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)).permute(1, 0, 2))).mean(0))


class FixedBatch(nn.Module):
    """Two linears, and a shape between them that only one sample at a time has."""

    def __init__(self, width: int = 6, outputs: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).reshape(1, -1))


class Encoder(nn.Module):
    """Words and their positions, attention over real tokens, and a result for each token or for each sample."""

    def __init__(self, width: int = 8, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.words, self.places = nn.Embedding(30, width), nn.Embedding(16, width)
        self.qkv, self.out, self.inner = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.tanh(self.places(torch.arange(input_ids.shape[1])))
        x = self.words(input_ids) + places
        query, key, value = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = attention_mask[:, None, None, :].bool()
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2))
        x = torch.relu(self.inner(x + places))
        return self.last(x[:, 0] if self.pooled else x)


class Language(nn.Module):
    """Token ids [N, L] to scores of the next word [N, L, words]; the head's weight is the table."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words, self.middle = nn.Embedding(words, width), nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.head(x + torch.relu(self.middle(x)))


def normed_mlp(inputs: int = 8, width: int = 32, outputs: int = 3) -> nn.Sequential:
    """Vectors to classes, a BatchNorm behind the first of three linears; always the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs),
    )  # fmt: skip


@torch.no_grad()
def let_fall(*layers: nn.Module) -> None:
    """Give weights singular values that fall off, so that there is something to cut."""
    for layer in layers:
        weight: Any = layer.weight
        left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        falling = values * 0.7 ** torch.arange(len(values))
        weight.copy_(((left * falling) @ right * 3).reshape(weight.shape))


def classifier(width: int = 16, seed: int = 0, dropout: float = 0.1) -> nn.Module:
    """A BERT of one block over ``WORDS`` words with two classes; needs transformers."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2 * width,
        max_position_embeddings=16, num_labels=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """What :func:`classifier` can learn: sentences of 8 words of either half of all words, which is the class."""

    def __init__(self, count: int) -> None:
        words = torch.randint(0, WORDS // 2, (count, 8), generator=torch.Generator().manual_seed(1))
        self.words = words + WORDS // 2 * (torch.arange(count) % 2)[:, None]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        words = self.words[index]
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words[0] // (WORDS // 2)}
