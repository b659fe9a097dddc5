"""Representative initialization (AST, arXiv 2310.10541, section 3.3): real images from a class's clusters.

The published code always makes ten clusters and takes ``int(ipc / 10)`` images of each, which is none below ten. Here
there are as many clusters as images are wanted, and one image a cluster.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Generator, Tensor

from compress.errors import InputError

__all__ = ["random_images", "representatives", "require_enough"]


def require_enough(labels: Tensor, classes: int, each: int, source: str) -> None:
    """Refuse labels [N] that are no classes 0 to ``classes`` - 1, or a class with fewer than ``each`` images.

    Raises:
        InputError: naming the labels or the classes.
    """
    if labels.is_floating_point():
        raise InputError(f"{source}: labels are numbers with a point; distillation needs classes, whole numbers from 0")
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        remedy = "check --classes and the labels"
        if (least, most) == (1, classes):
            remedy = "they seem to count from 1: subtract 1 from them in the file"
        raise InputError(
            f"{source}: labels go from {least} to {most}; with --classes {classes} they are 0 to {classes - 1}; "
            f"{remedy}"
        )
    counts = torch.bincount(labels, minlength=classes).tolist()
    few = [f"class {number} has {count}" for number, count in enumerate(counts) if count < each]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        least, told = min(counts), ", ".join(few[:5]) + more
        remedy = f"give --ipc {least} or less" if least else "every class needs images: check --classes and the labels"
        raise InputError(f"{source}: --ipc {each} images a class are asked for, and {told}; {remedy}")


def representatives(logits: Tensor, labels: Tensor, classes: int, each: int, seed: int = 0) -> Tensor:
    """Indices [classes * each], class by class: the image nearest to the centre of each of ``each`` clusters of logits.

    No image is taken twice: where two centres have the same nearest image, the later one takes its next nearest.

    Args:
        logits: of an expert, for all images, [N, classes].
        labels: classes [N], each with ``each`` images or more.
    """
    chosen: list[int] = []
    for number in range(classes):
        members = torch.nonzero(labels == number).flatten().numpy()
        points = logits[torch.from_numpy(members)].double().numpy()
        # Images that the expert cannot tell apart make fewer clusters than asked for; the rest is filled up below.
        clusters = min(each, len(np.unique(points, axis=0)))
        centres = KMeans(clusters, n_init=3, random_state=seed).fit(points).cluster_centers_
        distances = ((points[None] - centres[:, None]) ** 2).sum(2)  # [clusters, members]
        taken: list[int] = []
        for row in np.resize(distances, (each, len(members))):
            taken.append(next(int(place) for place in np.argsort(row, kind="stable") if int(place) not in taken))
        chosen += members[taken].tolist()
    return torch.tensor(chosen)


def random_images(labels: Tensor, classes: int, each: int, seed: int = 0) -> Tensor:
    """Indices [classes * each], class by class, drawn without replacement: MTT's initialization, and the baseline."""
    generator = Generator().manual_seed(seed)
    chosen = []
    for number in range(classes):
        members = torch.nonzero(labels == number).flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:each]])
    return torch.cat(chosen)
