"""Images as uint8 tensors: decoded once, split by seed, batched, flipped and shifted."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor, resize


@dataclass(frozen=True)
class Images:
    """Images (N, 3, H, W) as uint8, and class indices (N,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.x[index], self.y[index])


@dataclass(frozen=True)
class Split:
    """What one seed trains on, is validated and tested on; `mean` and `std` (3,) are those of 2,000 of its training images."""

    train: Images
    validation: Images
    test: Images
    mean: Tensor
    std: Tensor

    def scaled(self, x: Tensor) -> Tensor:
        """Return uint8 images as float32, normalised by channel, in the layout in which a CPU is fastest."""
        return ((x.float() - self.mean[:, None, None]) / self.std[:, None, None]).contiguous(
            memory_format=torch.channels_last
        )


@functools.lru_cache(maxsize=4)
def load(folder: Path, cache: Path, size: int) -> Images:
    """Return all images of an `ImageFolder` at size x size; what was decoded is kept in `cache`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    kept = cache / f"{folder.parent.name}-{folder.name}-{size}-{place}.pt"
    if not kept.exists():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"there is no {folder}. Hint: unzip the data there, a folder for each class"
            )
        source = ImageFolder(folder)
        x = torch.stack(
            [resize(pil_to_tensor(image), [size, size], antialias=True) for image, _ in source]
        )
        save((x, torch.tensor(source.targets)), kept)
    return Images(*torch.load(kept))


def save(content: Any, path: Path) -> None:
    """Write what `torch.load` reads; a file that was there stays until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(
        f".{os.getpid()}.tmp"
    )  # of its own, since another process may decode the same images
    torch.save(content, draft)
    draft.replace(path)


def load_digits(size: int) -> tuple[Images, Images]:
    """Return scikit-learn's digits, 1,000 to train with and 797 to test with, enlarged to size x size, grey in three channels."""
    from sklearn import datasets

    source = datasets.load_digits()
    grey = (torch.tensor(source.images) * 15).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    x, y = resize(grey, [size, size], antialias=True), torch.tensor(source.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return Images(x[order[:1000]], y[order[:1000]]), Images(x[order[1000:]], y[order[1000:]])


def split(train: Images, test: Images, samples: int | None, seed: int) -> Split:
    """Take `samples` training images at random, None for all, and part them 80/20 into training and validation (section 3)."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:samples]
    parted = len(order) * 4 // 5
    kept = train[order[:parted]]
    few = kept.x[:2000].float()
    return Split(kept, train[order[parted:]], test, few.mean((0, 2, 3)), few.std((0, 2, 3)))


def shuffled(
    images: Images, batch: int, generator: torch.Generator, *, flip: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch of batches, each image flipped by chance, the batch shifted by up to an eighth; a last batch of one is left out."""
    for index in torch.randperm(len(images), generator=generator).split(batch):
        if len(index) > 1:
            yield _augmented(images.x[index], generator, flip=flip), images.y[index]


def in_order(images: Images, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(images.x.split(batch), images.y.split(batch), strict=True)


def _augmented(x: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    turned = torch.rand(len(x), 1, 1, 1, generator=generator) < (0.5 if flip else 0)
    size, reach = x.shape[-1], x.shape[-1] // 8
    dy, dx = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    padded = F.pad(torch.where(turned, x.flip(3), x), (reach,) * 4, mode="reflect")
    return padded[:, :, dy : dy + size, dx : dx + size]
