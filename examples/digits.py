"""Train a small convolutional network on scikit-learn's digits and write what ``compress quantize`` needs.

    python examples/digits.py demo

writes ``demo/model.pt`` (the whole module), ``demo/calib.npz`` (images to calibrate on) and ``demo/test.npz`` (images
and labels to score on). Images are float32 [N, 1, 8, 8] in [0, 1]. Takes seconds; needs no download and no GPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

TEST_IMAGES = 500
EPOCHS = 12
BATCH = 64


def small_net() -> nn.Sequential:
    """Three convolutions and a linear layer: images [N, 1, 8, 8] to logits [N, 10].

    Only torch.nn's own classes, so that the saved module loads without trusting any code from the file.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Fit ``model`` in place; leaves it in eval mode."""
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))
        # The last, smaller batch is left out: BatchNorm's statistics over a handful of images are noise.
        for batch in order[: len(images) // BATCH * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small network on digits and save what compress needs.")
    parser.add_argument("folder", type=Path, help="where to write; made if missing")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, None] / 16).astype(np.float32)  # [N, 1, 8, 8], 16 grey levels to [0, 1]
    labels = digits.target[order].astype(np.int64)
    train_images, test_images = images[TEST_IMAGES:], images[:TEST_IMAGES]
    train_labels, test_labels = labels[TEST_IMAGES:], labels[:TEST_IMAGES]

    torch.manual_seed(0)
    model = small_net()
    start = time.perf_counter()
    train(model, torch.from_numpy(train_images), torch.from_numpy(train_labels))
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        predicted = model(torch.from_numpy(test_images)).argmax(1).numpy()
    accuracy = (predicted == test_labels).mean()

    torch.save(model, folder / "model.pt")
    np.savez(folder / "calib.npz", images=train_images)
    np.savez(folder / "test.npz", images=test_images, labels=test_labels)

    parameters = sum(p.numel() for p in model.parameters())
    print(f"Trained a network of {parameters:,} parameters on {len(train_images):,} digits in {seconds:.1f} s.")
    print(f"It reads {accuracy:.1%} of {len(test_images)} digits it has not seen.")
    print(f"Wrote model.pt, calib.npz and test.npz to {folder}.")


if __name__ == "__main__":
    main()
