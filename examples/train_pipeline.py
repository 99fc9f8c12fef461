"""Train a torchvision classifier with its blocks on several processes at the same time.

    torchrun --nproc-per-node 4 examples/train_pipeline.py --data DIR --model resnet18 --out run.pt

DIR holds train/ and val/ or test/, each with a folder per class. Each process owns a range of
blocks. The number of processes changes how long the training takes, and nothing else: weights,
losses and accuracies are the same, to the bit.

After every epoch each process writes its own part of a checkpoint, to the folder run.pt.parts. The
same command goes on after an interruption, also with another number of processes. At the end the
first process writes the weights of the whole cut model to run.pt, as the entry "net".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchvision
from torch import fx
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import sffx

# A resumed run must have these arguments in common with the run that was interrupted.
SETTINGS = ("model", "policy", "goodness", "size", "batch", "lr", "seed", "dtype")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="resnet18", help="any classifier of torchvision.models")
    parser.add_argument("--policy", default="residual", help="where to cut the model into blocks")
    parser.add_argument("--goodness", default="sff", help="of the blocks: sff, mlp, cosine or cwc")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--threads", type=int, default=1, help="of each process, on CPUs")
    parser.add_argument("--out", type=Path, default=Path("run.pt"), help="the weights to write")
    return parser.parse_args()


# 1. The data. Only the first stage reads it; targets travel with the activations.


class InDtype(Dataset):
    """The images of a folder in another dtype."""

    def __init__(self, images: ImageFolder, dtype: torch.dtype) -> None:
        self.images = images
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index]
        return image.to(self.dtype), label


def image_folders(args: argparse.Namespace) -> tuple[ImageFolder, ImageFolder]:
    """Return the images to train on, and the images to validate on."""
    prepare = transforms.Compose(
        [
            transforms.Resize((args.size, args.size)),
            transforms.ToTensor(),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    held_out_folder = args.data / "val"
    if not held_out_folder.is_dir():
        held_out_folder = args.data / "test"
    train = ImageFolder(args.data / "train", prepare)
    held_out = ImageFolder(held_out_folder, prepare)
    if train.classes != held_out.classes:
        different = set(train.classes) ^ set(held_out.classes)
        raise SystemExit(f"{train.root} and {held_out.root} differ in the folders {different}")
    return train, held_out


# 2. The model: the same on every process. Each keeps its own blocks only.


def cut_model(args: argparse.Namespace, classes: int) -> fx.GraphModule:
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    model = torchvision.models.get_model(args.model, num_classes=classes).to(dtype)
    example = torch.zeros(1, 3, args.size, args.size, dtype=dtype)
    return sffx.transform(model, args.policy, example, goodness=args.goodness)


# 3. Checkpoints: a folder for each epoch, whole or not there.


def newest(parts: Path) -> int:
    """Return the number of the last epoch with a checkpoint, 0 if there is none."""
    epochs = [int(folder.name) for folder in parts.glob("*") if folder.name.isdigit()]
    return max(epochs, default=0)


def save(parts: Path, epoch: int, pipe: sffx.Pipeline, optimizer: torch.optim.Optimizer) -> None:
    """Write the parts of all processes, and then remove the checkpoint of the epoch before."""
    state = {"net": pipe.state_dict(), "optimizer": pipe.optimizer_state_dict(optimizer)}
    draft = parts / f"{epoch}.draft"
    dcp.save(state, checkpoint_id=draft)
    if dist.get_rank() == 0:
        draft.rename(parts / str(epoch))
        shutil.rmtree(parts / str(epoch - 1), ignore_errors=True)
    dist.barrier()


def load(parts: Path, epoch: int, pipe: sffx.Pipeline, optimizer: torch.optim.Optimizer) -> None:
    state = {"net": pipe.state_dict(), "optimizer": pipe.optimizer_state_dict(optimizer)}
    dcp.load(state, checkpoint_id=parts / str(epoch))
    pipe.load_state_dict(state["net"])
    pipe.load_optimizer_state_dict(optimizer, state["optimizer"])


def prepare_parts(parts: Path, args: argparse.Namespace) -> None:
    """Make the folder of checkpoints; end if it holds those of a run with other settings."""
    settings = {name: vars(args)[name] for name in SETTINGS}
    record = parts / "settings.json"
    if not record.exists():
        parts.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(settings))
    saved = json.loads(record.read_text())
    different = [f"--{name} {saved[name]}" for name in SETTINGS if saved[name] != settings[name]]
    if different:
        raise SystemExit(f"{parts} was trained with {' '.join(different)}. Hint: resume with it")
    for draft in parts.glob("*.draft"):
        shutil.rmtree(draft)


# 4. Training: an ordinary loop. Losses and accuracies are the same on all processes.


def train(args: argparse.Namespace) -> None:
    is_first_process = dist.get_rank() == 0
    parts = args.out.with_name(f"{args.out.name}.parts")
    if is_first_process:
        prepare_parts(parts, args)
    dist.barrier()
    images, held_out = image_folders(args)
    pipe = sffx.Pipeline(cut_model(args, len(images.classes)), device=device())
    optimizer = torch.optim.AdamW(pipe.parameter_groups(lr=args.lr))
    done = newest(parts)
    if done:
        load(parts, done, pipe, optimizer)
    dtype = getattr(torch, args.dtype)
    train_loader = held_out_loader = None
    if pipe.first:
        options = {"batch_size": args.batch, "num_workers": args.workers}
        train_loader = DataLoader(InDtype(images, dtype), shuffle=True, **options)
        held_out_loader = DataLoader(InDtype(held_out, dtype), **options)
    for epoch in range(done + 1, args.epochs + 1):
        # The order of the samples and the dropout of an epoch depend on its number alone.
        torch.manual_seed(1000 * args.seed + epoch)
        losses = pipe.train(train_loader, optimizer)
        evaluation = pipe.evaluate(held_out_loader)
        save(parts, epoch, pipe, optimizer)
        if is_first_process:
            print(evaluation)
            print(
                f"epoch {epoch} of {args.epochs}: training loss {sum(losses.values()):.4f}, "
                f"{evaluation.accuracy['ensemble']:.2%} of the held-out images right",
                flush=True,
            )
    net = pipe.gather(dst=0)
    if net is not None:
        sffx.save_checkpoint(args.out, net, epoch=max(done, args.epochs))
        print(f"wrote {args.out}")


def device() -> torch.device | None:
    """Return the GPU of this process, None where there is none."""
    if not torch.cuda.is_available():
        return None
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def join() -> None:
    """Join the processes that torchrun has started.

    torchrun keeps its store when it starts them again. So each start has keys of its own: others
    hold the addresses of processes that have ended.
    """
    store, rank, processes = next(rendezvous("env://"))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(f"start {start}", store),
        rank=rank,
        world_size=processes,
    )


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    join()
    try:
        train(args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
