"""Classifiers of recordings of the brain in braindecode."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tools.zoo.entries import CLASSES, REQUESTS, SAMPLES, Entry, Inputs

REQUIRES = (
    "braindecode",
    "mne",
    "mne-bids",
    "skorch",
    "pandas",
    "h5py",
    "tabulate",
    "lazy-loader",
    "decorator",
    "docstring-inheritance",
    "linear-attention-transformer",
    "axial-positional-embedding",
    "local-attention",
    "linformer",
    "product-key-memory",
    "colt5-attention",
    "rotary-embedding-torch",
    "hyper-connections",
    "einops",
    "torchinfo",
    "torchaudio",
    "pooch",
    *REQUESTS,
    "wfdb",
)

_LISTED = """
ATCNet AttentionBaseNet AttnSleep BDTCN BENDR BIOT BrainModule CBraMod CTNet CodeBrain ContraWR
DGCNN Deep4Net DeepSleepNet EEGConformer EEGDINO EEGITNet EEGInceptionERP EEGInceptionMI EEGMiner
EEGNeX EEGNet EEGPT EEGSimpleConv EEGSym EEGTCNet FBCNet FBLightConvNet FBMSNet IFNet
InterpolatedBENDR InterpolatedBIOT InterpolatedLaBraM LUNA MEDFormer MSVTNet PBT REVE
SCCNet SPARCNet SSTDPN STEEGFormer ShallowFBCSPNet SignalJEPA_Contextual SignalJEPA_PostLocal
SignalJEPA_PreLocal SincShallowNet SleepStagerBlanco2020 SleepStagerChambon2018 SyncNet TCFormer
TIDNet TSception USleep
"""

_ONE_CHANNEL = ("AttnSleep", "DeepSleepNet")
_TWO_CHANNELS = ("SleepStagerBlanco2020", "SleepStagerChambon2018", "USleep")
_SENSORS = "Fp1 Fp2 F3 F4 C3 C4 P3 P4 O1 O2 F7 F8 T7 T8 P7 P8 Fz Cz Pz Oz FC1 FC2"
_SMALL_BENDR = {
    "encoder_h": 64,
    "contextualizer_hidden": 128,
    "transformer_layers": 3,
    "transformer_heads": 4,
}
_SMALL: dict[str, dict[str, Any]] = {
    "BENDR": _SMALL_BENDR,
    "InterpolatedBENDR": _SMALL_BENDR,
    "REVE": {"embed_dim": 64, "depth": 3, "heads": 4, "head_dim": 16},
    "InterpolatedLaBraM": {"num_layers": 3},
    "EEGPT": {"embed_dim": 64, "depth": 3, "num_heads": 4},
    "STEEGFormer": {"embed_dim": 64, "depth": 3, "num_heads": 4},
}


def entries() -> list[Entry]:
    return [Entry("braindecode", name) for name in _LISTED.split()]


def build(entry: Entry) -> nn.Module:
    """Build a model for the first kind of recording that it accepts."""
    import braindecode.models

    with tempfile.TemporaryDirectory() as folder:
        _write_positions(folder)
        return _build(getattr(braindecode.models, entry.name), entry.name)


def _write_positions(folder: str) -> None:
    """Write a file of places of sensors, which REVE fetches where there is none."""
    places = {name: [i / 10, 1.0, -1.0] for i, name in enumerate(_SENSORS.split())}
    (Path(folder) / "reve_positions.json").write_text(json.dumps(places))
    os.environ["REVE_POSITIONS_PATH"] = folder


def _build(kind: Any, name: str) -> nn.Module:
    accepted = inspect.signature(kind.__init__).parameters
    failure: Exception | None = None
    for recording in _recordings(name):
        options = {name: value for name, value in recording.items() if name in accepted}
        options.update(_SMALL.get(name, {}))
        try:
            model: nn.Module = kind(n_outputs=CLASSES, **options)
            model.eval()(torch.randn(SAMPLES, recording["n_chans"], recording["n_times"]))
        except Exception as cause:
            failure = failure or cause
        else:
            vars(model)["zoo_shape"] = (recording["n_chans"], recording["n_times"])
            return model.train()
    raise ValueError(f"it accepts no recording: {failure}")


def fitting_input(entry: Entry, model: nn.Module) -> Inputs:
    return {"x": torch.randn(SAMPLES, *vars(model).pop("zoo_shape"))}


def _recordings(name: str) -> list[dict[str, Any]]:
    """Return the kinds of recordings to try, without and with the places of the sensors."""
    if name in _ONE_CHANNEL:
        return [_recording(1, 3000, 100.0)]
    if name in _TWO_CHANNELS:
        return [_recording(2, 3000, 100.0)]
    kinds = [_recording(22, 1000, 250.0), _recording(20, 2000, 200.0), _recording(16, 3000, 100.0)]
    placed = [{**kind, "chs_info": _sensors(kind["n_chans"])} for kind in kinds]
    return [*kinds, *placed]


def _recording(channels: int, times: int, rate: float) -> dict[str, Any]:
    return {
        "n_chans": channels,
        "n_times": times,
        "sfreq": rate,
        "input_window_seconds": times / rate,
    }


def _sensors(number: int) -> Any:
    import mne

    info = mne.create_info(_SENSORS.split()[:number], 200.0, "eeg")
    info.set_montage("standard_1020")
    return info["chs"]
