"""Train a torchvision classifier on folders of images, with Lightning.

    python examples/train_lightning.py --data DIR --method sff --out runs/sff
    python examples/train_lightning.py --data DIR --method sff --out runs/sff --resume

DIR holds train/ and val/ or test/, each with a folder per class. The methods are backpropagation
(bp) and three ways to train block by block (sff, cwc, mlp).

The output folder gets the checkpoints (the best by validation accuracy, and the last), the logs
(CSV, and TensorBoard where it is installed), and a picture of them. An interrupted run goes on
with --resume. This colours each block by its accuracy:

    sffx-viz torchvision.models:resnet18 --checkpoint runs/sff/last.ckpt
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import sffx
from sffx.files import write
from sffx.lightning import BPModule, SFFModule
from sffx.plots.results import plot_training
from sffx.resuming import BestCheckpoint, EpochSeeds, WholeFiles

# A resumed run must have these arguments in common with the run that was interrupted.
SETTINGS = ("method", "model", "policy", "size", "batch", "lr", "precision", "seed")

# A block's learning rate falls when its own validation loss has not improved for three epochs.
PLATEAU = {"factor": 0.3, "patience": 3}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", default="sff", choices=("bp", "sff", "cwc", "mlp"))
    parser.add_argument("--model", default="resnet18", help="any classifier of torchvision.models")
    parser.add_argument("--policy", default="residual", help="where to cut the model into blocks")
    parser.add_argument("--epochs", type=int, default=30, help="at least 1")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=64, help="for each device")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--patience",
        type=int,
        default=10,
        help="stop after so many epochs without a better validation accuracy",
    )
    parser.add_argument(
        "--precision", default="32-true", help="as Lightning names it; bf16-mixed for less memory"
    )
    parser.add_argument(
        "--devices", type=int, default=1, help="GPUs where there are any, else processes"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the output folder"
    )
    return parser.parse_args()


def last_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint to go on from, None for a new run."""
    last = args.out / "last.ckpt"
    if args.resume and not last.exists():
        raise SystemExit(f"there is nothing to resume: {last} does not exist")
    if last.exists() and not args.resume:
        raise SystemExit(
            f"{args.out} holds a training already. "
            "Hint: --resume goes on with it, and another --out begins a new one"
        )
    require_same_settings(args)
    return last if args.resume else None


def require_same_settings(args: argparse.Namespace) -> None:
    """Note the settings of a new run; end if a resumed one has others.

    Lightning would take the learning rate and the weights from the checkpoint, whatever --lr and
    --seed say.
    """
    settings = {name: vars(args)[name] for name in SETTINGS}
    record = args.out / "settings.json"
    if not args.resume:
        args.out.mkdir(parents=True, exist_ok=True)
        write(record, json.dumps(settings).encode())
    elif record.exists():
        saved = json.loads(record.read_text())
        different = [
            f"--{name} {saved[name]}" for name in SETTINGS if saved[name] != settings[name]
        ]
        if different:
            raise SystemExit(
                f"{args.out} was trained with {' '.join(different)}. Hint: resume with it"
            )


def loaders(args: argparse.Namespace, seeds: EpochSeeds) -> tuple[DataLoader, DataLoader, int]:
    """Return the batches to train on, the batches to validate on, and the number of classes."""
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
    # ImageFolder numbers the classes of each folder by itself, so the folders must agree.
    if train.classes != held_out.classes:
        different = set(train.classes) ^ set(held_out.classes)
        raise SystemExit(f"{train.root} and {held_out.root} differ in the folders {different}")
    options = {
        "batch_size": args.batch,
        "num_workers": args.workers,
        "persistent_workers": args.workers > 0,
    }
    train_loader = DataLoader(train, sampler=seeds.shuffled(train), **options)
    held_out_loader = DataLoader(held_out, **options)
    return train_loader, held_out_loader, len(train.classes)


def module(args: argparse.Namespace, classes: int) -> LightningModule:
    """Return what the Trainer trains: the model as it is, or cut into blocks."""
    model = torchvision.models.get_model(args.model, num_classes=classes)
    if args.method == "bp":
        return BPModule(model, lr=args.lr, plateau=PLATEAU)
    # Only the shape of the example matters: the compiler follows it through the model.
    example = torch.zeros(1, 3, args.size, args.size)
    net = sffx.transform(model, args.policy, example, goodness=args.method)
    return SFFModule(net, lr=args.lr, plateau=PLATEAU)


def loggers(folder: Path) -> list[Logger]:
    chosen: list[Logger] = [CSVLogger(folder, name="csv")]
    if importlib.util.find_spec("tensorboard") is not None:
        chosen.append(TensorBoardLogger(folder, name="tensorboard"))
    return chosen


def logs(folder: Path) -> list[Path]:
    """Return what the CSV logger wrote, one file for each start of the run."""
    files = folder.glob("csv/version_*/metrics.csv")
    return sorted(files, key=lambda file: int(file.parent.name.removeprefix("version_")))


def main() -> None:
    args = arguments()
    last = last_checkpoint(args)
    seed_everything(args.seed)
    seeds = EpochSeeds(args.seed)
    train_loader, held_out_loader, classes = loaders(args, seeds)
    best = BestCheckpoint(args.out, "best-{epoch}-{val_acc:.4f}", monitor="val_acc", mode="max")
    # The last epoch has a callback of its own: `save_last` would follow the best epochs only.
    # Without the counter, a resumed run does not write to last-v1.ckpt.
    newest = ModelCheckpoint(args.out, "last", enable_version_counter=False)
    patience = EarlyStopping("val_acc", mode="max", patience=args.patience)
    trainer = Trainer(
        max_epochs=args.epochs,
        devices=args.devices,
        precision=args.precision,
        callbacks=[seeds, best, newest, patience],
        plugins=[WholeFiles()],
        logger=loggers(args.out),
        log_every_n_steps=10,
    )
    trainer.fit(module(args, classes), train_loader, held_out_loader, ckpt_path=last)
    if trainer.is_global_zero:
        print(f"best: {best.best_model_path}, validation accuracy {best.best_model_score:.2%}")
        print(f"how it went: {plot_training(logs(args.out), args.out / 'training.png')}")


if __name__ == "__main__":
    main()
