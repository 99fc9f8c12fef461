"""Data of the experiments: road scenes, text of the standard library, a table of patients."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sffx.errors import InputError

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = CHARACTERS.index("?")
TEXT_SHARES = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Part:
    """Inputs and targets of some samples."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches in order."""
        yield from zip(self.x.split(size), self.y.split(size), strict=True)

    def shuffled(self, size: int, seed: int, *, flip: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches in an order of a seed; with `flip` half of the images are mirrored."""
        generator = torch.Generator().manual_seed(seed)
        for index in torch.randperm(len(self), generator=generator).split(size):
            x, y = self.x[index], self.y[index]
            if flip:
                mirrored = torch.rand(len(x), generator=generator) < 0.5
                x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
                y = torch.where(mirrored[:, None, None], y.flip(-1), y)
            yield x, y


@dataclass(frozen=True)
class Data:
    """The samples to train, to validate and to test with."""

    train: Part
    validation: Part
    test: Part


def camvid(folder: Path, seed: int) -> Data:
    """Return the road scenes in `folder`/camvid: 367, 101 and 233 images of 240 x 180.

    The split is the usual one, whatever the seed. Label 11 is of no class.

    Raises:
        InputError: they are not there.
    """
    parts = [_scenes(folder / "camvid" / name) for name in ("train", "val", "test")]
    mean = parts[0].x.mean((0, 2, 3), keepdim=True)
    std = parts[0].x.std((0, 2, 3), keepdim=True)
    scaled = [Part((part.x - mean) / std, part.y) for part in parts]
    return Data(*scaled)


def _scenes(folder: Path) -> Part:
    from torchvision.io import decode_image

    images = sorted((folder / "images").glob("*"))
    if not images:
        raise InputError(f"there are no images in {folder}. Hint: unzip camvid.zip there")
    labels = [folder / "labels" / f"{image.stem}.png" for image in images]
    x = torch.stack([decode_image(image) for image in images]).float() / 255
    y = torch.stack([decode_image(label)[0] for label in labels]).long()
    return Part(x, y)


def halved(data: Callable[[Path, int], Data]) -> Callable[[Path, int], Data]:
    """Return what reads the same images at half their height and width.

    A pixel is the mean of four of an image, and the label of one of them.
    """

    def read(folder: Path, seed: int) -> Data:
        whole = data(folder, seed)
        parts = []
        for part in (whole.train, whole.validation, whole.test):
            parts.append(Part(avg_pool2d(part.x, 2), part.y[:, ::2, ::2]))
        return Data(*parts)

    return read


def docstrings(folder: Path, seed: int, length: int = 128) -> Data:
    """Return pieces of the standard library's docstrings, (N, length), as indices of characters.

    The text is that of the Python that runs this. Modules are split among the parts, so that no
    text is in two of them.
    """
    texts = list(_docstrings_by_module())
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(texts), generator=generator).tolist()
    bounds = [int(len(texts) * share) for share in (TEXT_SHARES[0], sum(TEXT_SHARES[:2]))]
    parts = []
    for chosen in (order[: bounds[0]], order[bounds[0] : bounds[1]], order[bounds[1] :]):
        text = "\n".join(texts[i] for i in chosen)
        ids = torch.tensor([_index(character) for character in text])
        whole = ids[: len(ids) // length * length].view(-1, length)
        parts.append(Part(whole, whole))
    return Data(*parts)


def _index(character: str) -> int:
    place = CHARACTERS.find(character)
    return UNKNOWN if place < 0 else place


def _docstrings_by_module() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    # Modules such as ntpath and posixpath share docstrings, of which one is kept.
    seen = {""}
    for file in sorted(library.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        found = []
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node) or ""
                if docstring not in seen:
                    seen.add(docstring)
                    found.append(docstring)
        text = "\n".join(found)
        if text:
            yield text


def diabetes(folder: Path, seed: int) -> Data:
    """Return scikit-learn's patients: 10 numbers each, and how the disease went on.

    The split of the 442 patients is another one for each seed: 60, 20 and 20 %.
    """
    from sklearn.datasets import load_diabetes

    table, outcome = load_diabetes(return_X_y=True)
    x = torch.tensor(table, dtype=torch.float32)
    y = torch.tensor(outcome, dtype=torch.float32)[:, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, validation, test = order.split([265, 88, 89])
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean(0)) / y[train].std(0)
    return Data(*(Part(x[index], y[index]) for index in (train, validation, test)))
