"""Train a small BERT to classify texts, block by block, with the Trainer of transformers.

    python examples/train_text.py --data DIR --out runs/text

DIR holds train.tsv and test.tsv. Each line is a label, a tab and a text. The words become tokens
as they are, so nothing is downloaded. The output folder gets the plain trained model, which
`transformers.BertForSequenceClassification.from_pretrained` reads.

It needs the packages transformers and accelerate.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

import sffx

PADDING = 0
UNKNOWN = 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=64, help="of the model, a multiple of 4")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=32, help="most words of a text")
    parser.add_argument("--words", type=int, default=10_000, help="size of the vocabulary")
    return parser.parse_args()


def read(path: Path) -> list[tuple[str, list[str]]]:
    """Return the label and the words of each line."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        found = []
        for number, row in enumerate(rows, start=1):
            if not row:  # an empty line
                continue
            if len(row) != 2:
                raise SystemExit(
                    f"line {number} of {path} has {len(row) - 1} tabs. "
                    "Hint: a line is a label, a tab and a text"
                )
            label, text = row
            found.append((label, text.lower().split()))
        return found


class Texts(Dataset[dict[str, Tensor]]):
    """Texts as tokens, each padded to one length."""

    def __init__(
        self,
        rows: list[tuple[str, list[str]]],
        tokens: dict[str, int],
        labels: list[str],
        length: int,
    ) -> None:
        self.rows = rows
        self.tokens = tokens
        self.labels = labels
        self.length = length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        label, words = self.rows[index]
        known = [self.tokens.get(word, UNKNOWN) for word in words[: self.length]]
        input_ids = torch.full((self.length,), PADDING)
        input_ids[: len(known)] = torch.tensor(known)
        mask = torch.arange(self.length) < len(known)
        return {
            "input_ids": input_ids,
            "attention_mask": mask.long(),
            "labels": torch.tensor(self.labels.index(label)),
        }


def vocabulary(rows: list[tuple[str, list[str]]], size: int) -> dict[str, int]:
    """Return a token for each of the most frequent words."""
    counts: Counter[str] = Counter()
    for _, words in rows:
        counts.update(words)
    frequent = [word for word, _ in counts.most_common(size)]
    return {word: token for token, word in enumerate(frequent, start=UNKNOWN + 1)}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    right = prediction.predictions.argmax(axis=1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


def pairs(loader: DataLoader[dict[str, Tensor]]) -> Any:
    """Yield the batches of a loader as `sffx.evaluate` takes them."""
    for batch in loader:
        labels = batch.pop("labels")
        yield batch, labels


def main() -> None:
    args = arguments()
    set_seed(0)
    rows = read(args.data / "train.tsv")
    labels = sorted({label for label, _ in rows})
    tokens = vocabulary(rows, args.words)
    train = Texts(rows, tokens, labels, args.length)
    test_rows = read(args.data / "test.tsv")
    unknown = {label for label, _ in test_rows} - set(labels)
    if unknown:
        raise SystemExit(f"test.tsv has labels that train.tsv lacks: {unknown}")
    test = Texts(test_rows, tokens, labels, args.length)

    config = BertConfig(
        vocab_size=len(tokens) + UNKNOWN + 1,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        max_position_embeddings=args.length,
        num_labels=len(labels),
        pad_token_id=PADDING,
    )
    example = {
        "input_ids": torch.ones(1, args.length, dtype=torch.long),
        "attention_mask": torch.ones(1, args.length, dtype=torch.long),
    }
    net = sffx.transform(BertForSequenceClassification(config), example_input=example)
    print(net.plan)

    trainer = Trainer(
        model=sffx.KeywordLoss(net),
        args=TrainingArguments(
            output_dir=str(args.out / "trainer"),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=args.batch,
            learning_rate=args.lr,
            remove_unused_columns=False,  # KeywordLoss takes the inputs by any name
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
    )
    trainer.train()
    print(sffx.evaluate(net, pairs(DataLoader(test, batch_size=args.batch))))
    sffx.extract(net).save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
