"""What may be set about MetaAug, and what its publication sets."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "MetaAug"]


@dataclass(frozen=True)
class MetaAug:
    """How transformed copies of the calibration samples are learned (Pham et al. 2024, arXiv 2407.14726).

    Published for images; of models that take token ids the embeddings are transformed in their place.

    Attributes:
        steps: of the meta phase, a block; the transformation is carried over from block to block.
        batch: images a step.
        validation: untouched images a step that the updated block is judged on.
        rate: of Adam on the transformation. The published 5e-6 is for 500 steps a block; what Adam can move a weight by
            is rate times steps, and 40 steps of a small network, whose weights are larger, must reach the margin too.
        margin: least mean squared change of a pixel (epsilon), as a share of the images' variance: published for images
            of variance 1.
        validation_weight: of the validation loss (lambda 1).
        margin_weight: of the margin loss (lambda 2).
        similarity_weight: of the similarity loss (lambda 3), as a share of what it is for features that have nothing to
            do with each other. Published are 3e4 on a mean over all pairs, at which such features lost 1.8; how much
            they lose depends on the model by orders of magnitude, and the margin has to stand its ground beside it.
        temperature: of the validation loss.
        clip: largest norm of the transformation's gradient.
        inner: the differentiable step on the block: ``sgd``, or a fresh ``adam`` as published, whose derivative is
            1e-7 for large gradients and 10 for small ones.
        restart: begin every step from the block's start, as the published code does, instead of where the last one led.
        independent_mixup: mix images and copies by numbers of their own, as the published code does: their similarities
            are then those of different mixtures.
        batch_statistics: let the transformation normalise by its batch's statistics throughout, as the published code
            does: what becomes of an image then depends on those beside it.
        published_network: the published U-Net of 31 million parameters instead of one that fits the images.
        warm_up: most steps of its training as an autoencoder, which ends earlier where that is good. The published
            weights were not released with their recipe.
    """

    steps: int = 40
    batch: int = 32
    validation: int = 64
    rate: float = 2e-3
    margin: float = 0.1
    validation_weight: float = 5.0
    margin_weight: float = 0.5
    similarity_weight: float = 1.8
    temperature: float = 4.0
    clip: float = 0.1
    inner: str = "sgd"
    restart: bool = False
    independent_mixup: bool = False
    batch_statistics: bool = False
    published_network: bool = False
    warm_up: int = 400

    def forwards(self, blocks: int) -> float:
        """About what ``blocks`` phases cost, in passes of one batch through the float model (ResNet-20: 18 a step)."""
        return 18.0 * self.steps * blocks


PUBLISHED = MetaAug(
    steps=500,
    rate=5e-6,
    inner="adam",
    restart=True,
    independent_mixup=True,
    batch_statistics=True,
    published_network=True,
    warm_up=5000,
)
"""Everything as in the published code."""
