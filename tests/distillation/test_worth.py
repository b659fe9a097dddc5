"""What a distilled set is worth: more than real images drawn at random, and more than those that it began as (D3)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from compress.distillation.convnet import convnet
from compress.distillation.distiller import Distiller, DistillSettings
from compress.distillation.experts import Experts, ExpertSettings
from compress.distillation.judge import Judge
from compress.distillation.network import FlatNetwork
from compress.distillation.representatives import random_images, representatives

SEEDS, RATES = 5, (0.01, 0.03)
EXPERTS = ExpertSettings(count=3, epochs=10, batch=100)
SETTINGS = DistillSettings(iterations=50, steps=10, last=6, gradients="unrolled", looks=0)


@pytest.mark.matrix
def test_distilled_digits_beat_real_ones(tmp_path: Path) -> None:
    """One image a class, five seeds: both leads are above two standard errors (measured: 11 and 6 of them)."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    x = (x - x.mean()) / x.std()
    labels = torch.tensor(digits.target)
    network = FlatNetwork(partial(convnet, 1, 10, (8, 8), width=16, depth=2))
    experts = Experts(tmp_path, network, x[:1000], labels[:1000], 10, EXPERTS, "digits")
    experts.train(lambda what, done, total: None)
    rows = []
    for seed in range(SEEDS):
        judge = Judge(network, x[1000:], labels[1000:], nets=3, steps=80, seed=1000 + seed)
        last = experts.rows(seed % EXPERTS.count, EXPERTS.epochs, EXPERTS.epochs + 1)[0]
        start = representatives(network.logits(last, x[:1000]), labels[:1000], 10, 1, seed)
        drawn = random_images(labels[:1000], 10, 1, seed)
        done = Distiller(experts, x[start], labels[start], replace(SETTINGS, seed=seed)).run()
        real, began = (max(judge.accuracy(x[each], labels[each], rate) for rate in RATES) for each in (drawn, start))
        rows.append((judge.accuracy(done.images, labels[start], done.rate), real, began))
    table = np.array(rows)
    for name, other in (("random", table[:, 1]), ("representative", table[:, 2])):
        lead = table[:, 0] - other
        error = lead.std(ddof=1) / len(lead) ** 0.5
        assert lead.mean() > 2 * error, f"over {name} real images {lead.mean():.3f} ± {error:.3f}:\n{table}"
