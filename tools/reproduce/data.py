"""Images as uint8 tensors: decoded once, split by seed, batched, flipped and shifted."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import MNIST, ImageFolder
from torchvision.transforms.functional import pil_to_tensor, resize

from sffx.files import writing

SAMPLES_FOR_STATISTICS = 2000
DIGITS_FOR_TRAINING = 1000
MNIST_SIZE = 28


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W) as uint8, and class indices (N,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.x[index], self.y[index])


@dataclass(frozen=True)
class Split:
    """The images of one seed, to train, to validate and to test with.

    Attributes:
        mean: of each channel, (C,), over 2,000 of the training images; 0 where images are only
            brought between 0 and 1.
        std: likewise; 255 there.
    """

    train: Images
    validation: Images
    test: Images
    mean: Tensor
    std: Tensor

    def scaled(self, x: Tensor) -> Tensor:
        """Return uint8 images as float32, normalised by channel.

        They are channels-last, the layout in which a CPU is fastest.
        """
        normalised = (x.float() - self.mean[:, None, None]) / self.std[:, None, None]
        return normalised.contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=4)
def load(folder: Path, cache: Path, size: int) -> Images:
    """Return all images of an `ImageFolder` at size x size.

    Args:
        folder: with a folder for each class.
        cache: keeps the decoded images.
        size: height and width.

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
        resized = [
            resize(pil_to_tensor(image), [size, size], antialias=True) for image, _ in source
        ]
        save((torch.stack(resized), torch.tensor(source.targets)), kept)
    return Images(*torch.load(kept))


def save(content: Any, path: Path) -> None:
    """Write a file for `torch.load`. An older file stays until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as draft, draft.open("wb") as file:
        torch.save(content, file)


def load_digits(size: int) -> tuple[Images, Images]:
    """Return scikit-learn's digits, 1,000 to train with and 797 to test with.

    They are enlarged to size x size, grey in three channels.
    """
    from sklearn import datasets

    source = datasets.load_digits()
    grey = (torch.tensor(source.images) * 15).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    digits = Images(resize(grey, [size, size], antialias=True), torch.tensor(source.target))
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return digits[order[:DIGITS_FOR_TRAINING]], digits[order[DIGITS_FOR_TRAINING:]]


def load_mnist(folder: Path, size: int) -> tuple[Images, Images]:
    """Return MNIST, 60,000 images to train with and 10,000 to test with, grey in one channel.

    Args:
        folder: holds `MNIST/`, as torchvision lays it out.
        size: height and width, from 28 on; a larger image has a black border.

    Raises:
        FileNotFoundError: they are not there.
    """
    if not (folder / "MNIST").is_dir():
        raise FileNotFoundError(f"there is no {folder / 'MNIST'}. Hint: unzip mnist.zip there")
    parts = []
    for is_train in (True, False):
        source = MNIST(folder, train=is_train)
        border = size - source.data.shape[-1]
        before, after = border // 2, border - border // 2
        padded = F.pad(source.data, (before, after, before, after))
        parts.append(Images(padded[:, None], source.targets))
    return parts[0], parts[1]


def load_pairs(folder: Path, size: int) -> tuple[Images, Images]:
    """Return pairs of MNIST's digits side by side, 30,000 to train with and 5,000 to test with.

    A pair is one of 100 classes, ten times the left digit and the right one. Each digit is in one
    pair. It is made half as wide as high, and grey in three channels.

    Args:
        folder: holds `MNIST/`, as torchvision lays it out.
        size: height and width of a pair, an even number.

    Raises:
        FileNotFoundError: they are not there.
    """
    train, test = load_mnist(folder, MNIST_SIZE)
    return paired(train, size), paired(test, size)


def paired(digits: Images, size: int) -> Images:
    """Return each two neighbours of some digits as one image, (N // 2, 3, size, size)."""
    count = len(digits) // 2 * 2
    narrow = resize(digits.x[:count], [size, size // 2], antialias=True)
    x = torch.cat([narrow[0::2], narrow[1::2]], dim=3).expand(-1, 3, -1, -1)
    y = 10 * digits.y[0:count:2] + digits.y[1:count:2]
    return Images(x, y)


def split(
    train: Images,
    test: Images,
    samples: int | None,
    seed: int,
    held_out: float = 0.2,
    scale: str = "normalised",
) -> Split:
    """Split training images into training and validation, 80/20 as in section 3 by default.

    Args:
        train: of which images are taken at random.
        test: kept as they are.
        samples: how many images are taken; None takes all.
        seed: of the choice.
        held_out: share of the images that validate.
        scale: "normalised" by channel, or "unit", between 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator)[:samples]
    count = len(order) - round(len(order) * held_out)
    kept = train[order[:count]]
    rest = train[order[count:]]
    if scale == "unit":
        channels = train.x.shape[1]
        return Split(kept, rest, test, torch.zeros(channels), torch.full((channels,), 255.0))
    few = kept.x[:SAMPLES_FOR_STATISTICS].float()
    return Split(kept, rest, test, few.mean((0, 2, 3)), few.std((0, 2, 3)))


def shuffled(
    images: Images,
    batch: int,
    generator: torch.Generator,
    *,
    flip: bool = True,
    shift: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch of augmented batches. A last batch of one image is left out.

    Each image is flipped by chance, and each batch is shifted by up to an eighth.
    """
    augments = flip or shift
    for index in torch.randperm(len(images), generator=generator).split(batch):
        if len(index) > 1:
            x = images.x[index]
            if augments:
                x = _augmented(x, generator, flip=flip, shift=shift)
            yield x, images.y[index]


def in_order(images: Images, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(images.x.split(batch), images.y.split(batch), strict=True)


def _augmented(x: Tensor, generator: torch.Generator, *, flip: bool, shift: bool) -> Tensor:
    probability = 0.5 if flip else 0
    flips = torch.rand(len(x), 1, 1, 1, generator=generator) < probability
    size = x.shape[-1]
    reach = size // 8 if shift else 0
    dy, dx = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    padded = F.pad(torch.where(flips, x.flip(3), x), (reach,) * 4, mode="reflect")
    return padded[:, :, dy : dy + size, dx : dx + size]
