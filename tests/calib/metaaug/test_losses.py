"""The losses' identities, and what they do not see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from compress.calib.metaaug.losses import margin_loss, similarity_loss, validation_loss


def test_the_same_outputs_lose_nothing_and_others_do() -> None:
    logits = torch.randn(16, 10)
    assert float(validation_loss([logits], [logits.clone()])) == pytest.approx(0.0, abs=1e-7)
    assert float(validation_loss([logits], [logits + 3.0])) == pytest.approx(0.0, abs=1e-6)  # softmax does not see it
    other = torch.randn(16, 10)
    p, q = F.softmax(logits / 4, 1), F.softmax(other / 4, 1)
    torch.testing.assert_close(validation_loss([logits], [other]), (p * (p / q).log()).sum(1).mean())


def test_outputs_that_are_no_logits_are_compared_by_distance() -> None:
    maps, number = torch.randn(4, 2, 3, 3), torch.randn(4, 1)
    assert float(validation_loss([maps], [maps])) == 0
    assert float(validation_loss([number], [2 * number])) == pytest.approx(1.0)
    several = validation_loss([maps, number, torch.arange(4)], [2 * maps, number, torch.arange(4)])
    assert float(several) == pytest.approx(1.0)


def test_margin() -> None:
    x = torch.randn(8, 3, 5, 5)
    assert float(margin_loss(x, x, 0.1)) == pytest.approx(0.1)
    assert float(margin_loss(x, x + 0.1, 0.1)) == pytest.approx(0.09)
    assert float(margin_loss(x, x + 0.5, 0.1)) == 0


def test_similarities() -> None:
    features = torch.randn(12, 7, dtype=torch.float64)
    assert float(similarity_loss(features, features)) == pytest.approx(0.0, abs=1e-15)
    turned, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    scaled = features @ turned * torch.rand(12, 1, dtype=torch.float64)
    assert float(similarity_loss(features, scaled)) == pytest.approx(0.0, abs=1e-12)
    other = torch.randn(12, 7, dtype=torch.float64)
    near = torch.stack([(1 + F.cosine_similarity(other[i], other)) / 2 for i in range(12)])
    plain = torch.stack([(1 + F.cosine_similarity(features[i], features)) / 2 for i in range(12)])
    total = torch.zeros(())
    for j in range(12):  # the formula, a row at a time, its own sample left out
        keep = torch.arange(12) != j
        p, q = (each[j, keep] / each[j, keep].sum() for each in (plain, near))
        total = total + (p * (p / q).log()).sum() / 12
    assert float(similarity_loss(features, other)) == pytest.approx(float(total), rel=1e-9)
    assert float(total) > 0


def test_features_that_vanish_have_finite_gradients() -> None:
    features = torch.zeros(5, 4, requires_grad=True)
    similarity_loss(torch.randn(5, 4), features).backward()
    assert bool(torch.isfinite(features.grad).all())  # type: ignore[arg-type]
