"""Draw the gallery in examples/pictures: python tools/pictures.py

Needs torchvision, transformers and Graphviz. The models have no weights, so nothing is downloaded.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from sffx.cli.viz import main

PICTURES = Path(__file__).parent.parent / "examples" / "pictures"
COLUMNS = 3
ZOO = "torchvision.models:"


@dataclass(frozen=True)
class Picture:
    """One picture of the gallery.

    Attributes:
        file: its name.
        arguments: of `sffx-viz`, which draws it.
    """

    file: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        return shlex.join(["sffx-viz", *self.arguments])

    def draw(self) -> int:
        """Draw the picture, and return the exit code of the command."""
        with warnings.catch_warnings():
            # How a model would draw its weights does not matter here.
            warnings.simplefilter("ignore")
            return main([*self.arguments, "--output", str(PICTURES / self.file)])


def picture(source: str, *, policy: str = "residual", detail: str = "blocks") -> Picture:
    """Return the picture of a model, named after the model, the policy and the detail."""
    name = source.rpartition(":")[2].replace("Config", "").lower()
    words = [name, policy.replace("(", "").replace(")", "")]
    arguments = [source]
    if policy != "residual":
        arguments += ["--policy", policy]
    if detail != "blocks":
        words.append(detail)
        arguments += ["--detail", detail]
    return Picture(f"{'-'.join(words)}.svg", tuple(arguments))


POLICIES = ("residual", "batchnorm", "layer", "stages(4)")
GALLERY = (
    picture(f"{ZOO}resnet18"),
    picture(f"{ZOO}resnet18", policy="batchnorm"),
    picture(f"{ZOO}resnet18", policy="layer"),
    picture(f"{ZOO}resnet18", policy="stages(4)"),
    picture(f"{ZOO}resnet18", detail="modules"),
    picture(f"{ZOO}resnet152"),
    picture(f"{ZOO}densenet121"),
    picture(f"{ZOO}inception_v3"),
    picture(f"{ZOO}mobilenet_v3_large"),
    picture(f"{ZOO}swin_t"),
    picture(f"{ZOO}vit_b_16"),
    picture(f"{ZOO}convnext_tiny"),
    picture(f"{ZOO}vgg11_bn", policy="batchnorm"),
    picture("hf:BertConfig"),
    picture("hf:BertConfig", detail="modules"),
    Picture("resnet18-policies.svg", ("compare", f"{ZOO}resnet18", *POLICIES)),
)


def gallery() -> str:
    """Return the page of the pictures: a table in which each leads to its full size."""
    lines = [
        "# How models are cut",
        "",
        "`python tools/pictures.py` draws these pictures. Each one has a legend, and below it the",
        "command that draws it. [Cut](../guides/cut.md) explains the policies.",
        "",
        "<table>",
    ]
    for start in range(0, len(GALLERY), COLUMNS):
        lines.append("<tr>")
        for each in GALLERY[start : start + COLUMNS]:
            image = f'<img src="{each.file}" width="260">'
            link = f'<a href="{each.file}">{image}</a>'
            lines.append(f'<td valign="top">{link}<br><code>{each.command}</code></td>')
        lines.append("</tr>")
    return "\n".join([*lines, "</table>", ""])


def draw_all() -> int:
    """Draw all pictures and write their page; return 0, or 1 if a picture could not be drawn."""
    PICTURES.mkdir(exist_ok=True)
    codes = [each.draw() for each in GALLERY]
    (PICTURES / "README.md").write_text(gallery(), encoding="utf-8")
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(draw_all())
