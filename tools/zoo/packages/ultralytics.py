"""Classification models of ultralytics, of the smallest scale."""

from __future__ import annotations

from torch import nn

from tools.zoo.entries import CLASSES, REQUESTS, Model, random_inputs

REQUIRES = (
    *("ultralytics", "ultralytics-thop", "opencv-python-headless", "matplotlib", "pyyaml"),
    *REQUESTS,
    *("psutil", "polars", "polars-runtime-32", "scipy", "cycler", "kiwisolver"),
    *("contourpy", "fonttools", "pyparsing", "python-dateutil", "six"),
)


def _listed(name: str) -> Model:
    def build() -> nn.Module:
        from ultralytics.nn.tasks import ClassificationModel

        model: nn.Module = ClassificationModel(f"{name}.yaml", nc=CLASSES, verbose=False)
        return model

    return Model(build, random_inputs(x=(3, 64, 64)))


MODELS = {
    "yolov8n-cls": _listed("yolov8n-cls"),
    "yolo11n-cls": _listed("yolo11n-cls"),
    "yolo12n-cls": _listed("yolo12n-cls"),
    "yolo26n-cls": _listed("yolo26n-cls"),
    "yolov8-cls-resnet50": _listed("yolov8-cls-resnet50"),
    "yolov8-cls-resnet101": _listed("yolov8-cls-resnet101"),
}
