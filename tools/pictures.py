"""Draw the gallery in examples/pictures: python tools/pictures.py

Needs torchvision, transformers and Graphviz. The models have no weights, so that nothing is downloaded.
"""

from __future__ import annotations

import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path

import sffx
from sffx.blocks import BlockPlan
from sffx.cli.models import find_model
from sffx.cli.sources import token_example
from sffx.draw.compare import draw_comparison
from sffx.draw.render import draw

PICTURES = Path(__file__).parent.parent / "examples" / "pictures"
COLUMNS = 3


@dataclass(frozen=True)
class Picture:
    """One picture of the gallery.

    Attributes:
        source: of the model, as `sffx-viz` takes it.
        policy: by which it is cut.
        detail: what is shown of each block.
    """

    source: str
    policy: str = "residual"
    detail: str = "blocks"

    @property
    def file(self) -> str:
        name = self.source.rpartition(":")[2].replace("Config", "").lower()
        return f"{name}-{self.policy.replace('(', '').replace(')', '')}{'' if self.detail == 'blocks' else f'-{self.detail}'}.svg"

    @property
    def command(self) -> str:
        detail = "" if self.detail == "blocks" else f" --detail {self.detail}"
        policy = "" if self.policy == "residual" else f" --policy '{self.policy}'"
        return f"sffx-viz {self.source}{policy}{detail}"


ZOO = "torchvision.models:"
GALLERY = (
    *(
        Picture(f"{ZOO}resnet18", policy)
        for policy in ("residual", "batchnorm", "layer", "stages(4)")
    ),
    Picture(f"{ZOO}resnet18", detail="modules"),
    *(
        Picture(f"{ZOO}{name}")
        for name in (
            "resnet152",
            "densenet121",
            "inception_v3",
            "mobilenet_v3_large",
            "swin_t",
            "vit_b_16",
        )
    ),
    Picture(f"{ZOO}convnext_tiny"),
    Picture(f"{ZOO}vgg11_bn", "batchnorm"),
    Picture("hf:BertConfig"),
    Picture("hf:BertConfig", detail="modules"),
)
POLICIES = ("residual", "batchnorm", "layer", "stages(4)")


def plan(picture: Picture) -> BlockPlan:
    """The plan of the picture's model by its policy."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of how a model would draw its weights, which it does not here
        model = find_model(picture.source)
    example = token_example(model) if picture.source.startswith("hf:") else None
    return sffx.plan(model, picture.policy, example)


def gallery() -> str:
    """The page that shows the pictures: a table with a small form of each, which leads to the picture itself."""
    named = [(picture.file, picture.command) for picture in GALLERY]
    policies = " ".join(shlex.quote(policy) for policy in POLICIES)
    named.append(("resnet18-policies.svg", f"sffx-viz compare {ZOO}resnet18 {policies}"))
    rows = [named[start : start + COLUMNS] for start in range(0, len(named), COLUMNS)]
    lines = [
        "# How models are cut",
        "",
        "Drawn by `python tools/pictures.py`; each picture bears the command that draws it.",
        "",
        "<table>",
    ]
    for row in rows:
        cells = (
            f'<td valign="top"><a href="{file}"><img src="{file}" width="260"></a><br><code>{command}</code></td>'
            for file, command in row
        )
        lines += ["<tr>", *cells, "</tr>"]
    return "\n".join([*lines, "</table>", ""])


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for picture in GALLERY:
        print(draw(plan(picture), PICTURES / picture.file, detail=picture.detail), flush=True)
    plans = [plan(Picture(f"{ZOO}resnet18", policy)) for policy in POLICIES]
    print(draw_comparison(plans, PICTURES / "resnet18-policies.svg"))
    (PICTURES / "README.md").write_text(gallery(), encoding="utf-8")
