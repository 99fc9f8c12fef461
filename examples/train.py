"""Train a torchvision classifier on folders of images, in plain PyTorch.

    python examples/train.py --data DIR --model resnet18 --method sff --out run.pt
    python examples/train.py --data DIR --model resnet18 --method sff --out run.pt --resume

DIR holds train/ and val/ or test/, each with a folder per class. The methods are backpropagation
(bp) and three ways to train block by block: the paper's goodness (sff), channel groups (cwc), and
a hidden layer in each head (mlp).

After every epoch the script validates and writes a checkpoint. An interrupted run goes on with
--resume and ends with the same weights as a run without an interruption. The checkpoint is also
what the commands read:

    sffx-viz torchvision.models:resnet18 --checkpoint run.pt -o trained.svg
    sffx-export run.pt net.onnx --model torchvision.models:resnet18
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import sffx

# A resumed run must have these arguments in common with the run that was interrupted.
SETTINGS = ("method", "model", "policy", "size", "batch", "lr", "seed")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", default="sff", choices=("bp", "sff", "cwc", "mlp"))
    parser.add_argument("--model", default="resnet18", help="any classifier of torchvision.models")
    parser.add_argument("--policy", default="residual", help="where to cut the model into blocks")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--out", type=Path, default=Path("run.pt"), help="the checkpoint to write")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint --out")
    args = parser.parse_args()
    if args.resume and not args.out.exists():
        raise SystemExit(f"there is nothing to resume: {args.out} does not exist")
    if args.out.exists() and not args.resume:
        raise SystemExit(
            f"{args.out} holds a training already. "
            "Hint: --resume goes on with it, and another --out begins a new one"
        )
    return args


# 1. The data: two folders of images, which become two loaders of batches (x, y).


def loaders(args: argparse.Namespace) -> tuple[DataLoader, DataLoader, int]:
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
    train_loader = DataLoader(train, args.batch, shuffle=True, num_workers=args.workers)
    held_out_loader = DataLoader(held_out, args.batch, num_workers=args.workers)
    return train_loader, held_out_loader, len(train.classes)


# 2. The model: as torchvision makes it, then cut into blocks that learn from their own losses.


def network(args: argparse.Namespace, classes: int, device: torch.device) -> nn.Module:
    """Return the model to train: plain for backpropagation, cut for the other methods."""
    model = torchvision.models.get_model(args.model, num_classes=classes).to(device)
    if args.method == "bp":
        return model
    # Only the shape of the example matters: the compiler follows it through the model.
    example = torch.zeros(1, 3, args.size, args.size, device=device)
    net = sffx.transform(model, args.policy, example, goodness=args.method)
    print(net.plan)
    return net


def make_optimizer(net: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    if args.method == "bp":
        return torch.optim.AdamW(net.parameters(), lr=args.lr)
    # One group for each block, so that a checkpoint has the learning rate of each block.
    return torch.optim.AdamW(sffx.parameter_groups(net, lr=args.lr))


# 3. Training: an ordinary loop. The loss alone depends on the method.


def loss_of(net: nn.Module, x: Tensor, y: Tensor, method: str) -> Tensor:
    if method != "bp":
        # The sum of the blocks' own losses. It holds the activations of one block at a time.
        return sffx.local_loss(net, x, y)
    output = net(x)
    logits = getattr(output, "logits", output)  # GoogLeNet and Inception return more than logits
    return F.cross_entropy(logits, y)


def train_epoch(
    net: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, method: str
) -> float:
    """Train on all batches once, and return the mean loss."""
    device = next(net.parameters()).device
    net.train()
    total = 0.0
    for x, y in loader:
        loss = loss_of(net, x.to(device), y.to(device), method)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


# 4. Validation: the share of right answers. A cut model has more than one answer.


def validate(net: nn.Module, loader: DataLoader, method: str) -> dict[str, float]:
    """Return the accuracy on held-out images, by the name of what answers."""
    if method == "bp":
        return {"model": accuracy_of(net, loader)}
    # Each block answers, and so do the ensemble of the blocks and the classifier.
    evaluation = sffx.evaluate(net, loader)
    print(evaluation)
    return evaluation.accuracy


@torch.no_grad()
def accuracy_of(model: nn.Module, loader: DataLoader) -> float:
    """Return the accuracy of a plain model."""
    device = next(model.parameters()).device
    model.eval()
    right = 0
    for x, y in loader:
        right += int((model(x.to(device)).argmax(dim=1).cpu() == y).sum())
    return right / len(loader.dataset)


# 5. Interruptions: all that the next epoch depends on is in the checkpoint, or follows from the
#    number of the epoch.


def resume(net: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> int:
    """Fill the model and the optimizer from the checkpoint, and return the epochs done."""
    checkpoint = sffx.load_checkpoint(args.out)
    saved = checkpoint.more["settings"]
    different = [f"--{name} {saved[name]}" for name in SETTINGS if saved[name] != vars(args)[name]]
    if different:
        raise SystemExit(f"{args.out} was trained with {' '.join(different)}. Hint: resume with it")
    done = checkpoint.more["epoch"]
    if done >= args.epochs:
        raise SystemExit(f"{args.out} has {done} epochs already. Hint: --epochs {done + 10}")
    net.load_state_dict(checkpoint.state)
    optimizer.load_state_dict(checkpoint.optimizer)
    return done


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed the order of the samples and the dropout of an epoch.

    Each epoch has a seed of its own. So the random numbers of an epoch do not depend on whether
    the epochs before it ran in the same process.
    """
    torch.manual_seed(1000 * seed + epoch)


def main() -> None:
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader, held_out_loader, classes = loaders(args)
    torch.manual_seed(args.seed)  # for the weights that the training starts with
    net = network(args, classes, device)
    optimizer = make_optimizer(net, args)
    done = resume(net, optimizer, args) if args.resume else 0
    settings = {name: vars(args)[name] for name in SETTINGS}
    for epoch in range(done + 1, args.epochs + 1):
        seed_epoch(args.seed, epoch)
        loss = train_epoch(net, train_loader, optimizer, args.method)
        accuracy = validate(net, held_out_loader, args.method)
        sffx.save_checkpoint(args.out, net, optimizer, accuracy, epoch=epoch, settings=settings)
        answer = "model" if args.method == "bp" else "ensemble"
        print(
            f"epoch {epoch} of {args.epochs}: training loss {loss:.4f}, "
            f"{accuracy[answer]:.2%} of the held-out images right, wrote {args.out}",
            flush=True,
        )


if __name__ == "__main__":
    main()
