"""Train a torchvision classifier on folders of images: python examples/train.py --data DIR --model resnet18 --method sff"""

import argparse
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision import transforms as T

import sffx

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="holds train/ and val/ or test/, each with a folder per class")
    parser.add_argument("--model", default="resnet18", help="any classifier of torchvision.models")
    parser.add_argument("--method", default="sff", choices=("bp", "sff", "cwc"))
    parser.add_argument("--policy", default="residual", help="where to cut: residual, batchnorm or layer")
    for name, default in (("--epochs", 10), ("--size", 128), ("--batch", 64), ("--lr", 1e-3)):
        parser.add_argument(name, type=type(default), default=default, help=f"default {default}")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare = T.Compose([T.Resize((args.size, args.size)), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    held_out = "val" if (args.data / "val").is_dir() else "test"
    images = [torchvision.datasets.ImageFolder(args.data / part, prepare) for part in ("train", held_out)]
    train, test = (DataLoader(part, args.batch, shuffle=i == 0, num_workers=2) for i, part in enumerate(images))
    net = torchvision.models.get_model(args.model, num_classes=len(images[0].classes)).to(device)
    if args.method != "bp":
        net = sffx.transform(net, args.policy, torch.zeros(1, 3, args.size, args.size), goodness=args.method)
    groups = net.parameters() if args.method == "bp" else sffx.parameter_groups(net, args.lr)
    optimizer = torch.optim.AdamW(groups, args.lr)
    for epoch in range(args.epochs):
        net.train()
        for x, y in ((x.to(device), y.to(device)) for x, y in train):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), y) if args.method == "bp" else sffx.local_loss(net, x, y)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = sum(int((net.eval()(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in test)  # a cut net's is the ensemble's
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {held_out} accuracy {right / len(images[1]):.2%}", flush=True)
    print(sffx.evaluate(net, test) if args.method != "bp" else "", end="\n" * (args.method != "bp"))
