"""Real models and data to measure on, from the folder ``shared/data`` beside the checkout (see its README)."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["CIFAR_MEAN", "CIFAR_STD", "DATA", "ZOO", "Case", "cifar_images", "mobilenet_v1", "resnet20", "resnet56"]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """A trained model, samples to calibrate on, and a labelled test set that shares none with them."""

    name: str
    module: nn.Module
    calibration: Tensor
    test: Tensor
    labels: Tensor

    @cached_property
    def float_accuracy(self) -> float:
        """The float model's share of right answers on the test set."""
        with torch.no_grad():
            classes = torch.cat([self.module(batch).argmax(1) for batch in self.test.split(100)])
        return float((classes == self.labels).float().mean())


class _Block(nn.Module):
    """Basic residual block with the shortcut of option A: every second position, zero channels around."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.padding = outputs // 4 if stride != 1 or inputs != outputs else 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class _CifarResNet(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [_Block(outputs, outputs, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_Block(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(torch.flatten(F.avg_pool2d(x, x.shape[3]), 1))


class _SamePad(nn.Module):
    """TensorFlow's padding for stride 2 on even sizes: right and bottom only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1, 0, 1))


class _ConvNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.pad = _SamePad() if stride == 2 else nn.Identity()
        padding = 0 if stride == 2 else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.bn(self.conv(self.pad(x))))


class _Separable(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.dw = _ConvNorm(inputs, inputs, 3, stride, groups=inputs)
        self.pw = _ConvNorm(inputs, outputs, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.dw(x))


class _MobileNetV1(nn.Module):
    def __init__(self, width: float, classes: int) -> None:
        super().__init__()
        layout = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
        channels = [int(32 * width), *(int(outputs * width) for outputs, _ in layout)]
        self.stem = _ConvNorm(3, channels[0], 3, 2)
        self.blocks = nn.Sequential(
            *(_Separable(channels[i], channels[i + 1], stride) for i, (_, stride) in enumerate(layout))
        )
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet20() -> nn.Module:
    """ResNet-20 for CIFAR-10, random weights: a factory for ``--model``."""
    return _CifarResNet(3)


def resnet56() -> nn.Module:
    """ResNet-56 for CIFAR-10, random weights."""
    return _CifarResNet(9)


def mobilenet_v1() -> nn.Module:
    """MobileNetV1 0.25 for 1001 ImageNet classes or as many as the file has, random weights."""
    head = load_file(DATA / "imagenet" / "mobilenet_v1_0.25_224.safetensors")["head.weight"]
    return _MobileNetV1(0.25, head.shape[0])


def _cifar(name: str, factory: Callable[[], nn.Module], file: str) -> Case:
    state = torch.load(DATA / "cifar10" / file, weights_only=True, map_location="cpu")["state_dict"]
    module = factory()
    module.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    train, _ = cifar_images("cifar10_train_batch1.npz")
    test, labels = cifar_images("cifar10_test_a.npz")
    return _case(name, module, train, test, labels)


def cifar_images(file: str) -> tuple[Tensor, Tensor]:
    """Normalised images [N, 3, 32, 32] and labels [N] of a file in the folder ``cifar10``."""
    stored = np.load(DATA / "cifar10" / file)
    images = torch.from_numpy(stored["images"]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    return ((images - mean) / std).contiguous(), torch.from_numpy(stored["labels"].astype(np.int64))


def _imagenet() -> Case:
    module = mobilenet_v1()
    module.load_state_dict(load_file(DATA / "imagenet" / "mobilenet_v1_0.25_224.safetensors"))
    images, labels = [], []
    with tarfile.open(DATA / "imagenet" / "imagenet_sample_256px_even.tar") as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            content = archive.extractfile(member)
            if content is None or not member.name.endswith((".jpg", ".JPEG", ".jpeg")):
                continue
            picture = Image.open(BytesIO(content.read())).convert("RGB")
            left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
            pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), dtype=np.float32)
            images.append(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1))
            labels.append(int(Path(member.name).name.split("_")[0]))
    stacked, classes = torch.stack(images), torch.tensor(labels)
    # One half calibrates, the other scores; alternating, so that both span the classes.
    return _case("mobilenet_v1_0.25", module, stacked[::2].contiguous(), stacked[1::2].contiguous(), classes[1::2])


def _case(name: str, module: nn.Module, calibration: Tensor, test: Tensor, labels: Tensor) -> Case:
    return Case(name, module.eval(), calibration, test, labels)


ZOO: dict[str, Callable[[], Case]] = {
    "resnet20": lambda: _cifar("resnet20", resnet20, "resnet20-12fca82f.th"),
    "resnet56": lambda: _cifar("resnet56", resnet56, "resnet56-4bfd9763.th"),
    "mobilenet_v1": _imagenet,
}
