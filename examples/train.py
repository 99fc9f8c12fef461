"""Train a torchvision classifier on folders of images: python examples/train.py --data DIR --model resnet18 --method sff"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torchvision import transforms as T

import sffx

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="holds train/ and val/ or test/, each with a folder per class",
    )
    parser.add_argument("--method", default="sff", choices=("bp", "sff", "cwc", "mlp"))
    parser.add_argument(
        "--out", type=Path, default=Path("run.pt"), help="the checkpoint to write, default run.pt"
    )
    for name, default in (
        ("model", "resnet18"),
        ("policy", "residual"),
        ("epochs", 10),
        ("size", 128),
        ("batch", 64),
        ("lr", 1e-3),
    ):
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"default {default}"
        )
    args = parser.parse_args()
    device, local = "cuda" if torch.cuda.is_available() else "cpu", args.method != "bp"
    prepare = T.Compose(
        [
            T.Resize((args.size, args.size)),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    parts = ("train", "val" if (args.data / "val").is_dir() else "test")
    train, test = (torchvision.datasets.ImageFolder(args.data / part, prepare) for part in parts)
    if train.classes != test.classes:  # folders are numbered in each part by itself
        raise SystemExit(
            f"{parts[0]}/ and {parts[1]}/ differ in the folders {set(train.classes) ^ set(test.classes)}"
        )
    train_loader, test_loader = (
        torch.utils.data.DataLoader(s, args.batch, shuffle=s is train, num_workers=2)
        for s in (train, test)
    )
    net = torchvision.models.get_model(args.model, num_classes=len(train.classes)).to(device)
    if local:
        net = sffx.transform(
            net,
            args.policy,
            torch.zeros(1, 3, args.size, args.size, device=device),
            goodness=args.method,
        )
    optimizer = torch.optim.AdamW(
        sffx.parameter_groups(net, args.lr) if local else net.parameters(), args.lr
    )
    for epoch in range(args.epochs):
        net.train()
        for x, y in ((x.to(device), y.to(device)) for x, y in train_loader):
            optimizer.zero_grad()
            (
                sffx.local_loss(net, x, y)
                if local
                else F.cross_entropy(getattr(out := net(x), "logits", out), y)
            ).backward()
            optimizer.step()
        with torch.no_grad():
            right = sum(
                int((net.eval()(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in test_loader
            )
        print(
            f"epoch {epoch + 1} of {args.epochs}: {right / len(test):.2%} of {parts[1]} right",
            flush=True,
        )
    if local:
        print(found := sffx.evaluate(net, test_loader))
    sffx.save_checkpoint(args.out, net, optimizer, found.accuracy if local else None)
    print(f"wrote {args.out}")
