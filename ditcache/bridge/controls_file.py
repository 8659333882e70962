"""Controls of a trained bridge as one safetensors file beside it, so that whole runs can be
compared with them: the router and the LoRA that were trained with it, the settings that were picked
for mixes without training, and what was found of the bridge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ditcache.bridge.controls import OutputAverage, TimestepSwitch, WeightAverage
from ditcache.bridge.saved import ZOO
from ditcache.bridge.students import LowRankUpdate, Router, Student
from ditcache.bridge.verdict import Verdict
from ditcache.errors import DitcacheError, first_line
from ditcache.files import complete_file, sha256_of

FORMAT = "ditcache bridge controls 1"
TRAINED = {"router": "output router", "lora": "LoRA of equal size"}
MIXED = ("output averaging", "timestep switching", "weight average")


def controls_path(bridge: Path, side: str) -> Path:
    """Where the controls of a bridge's projector into `side` are, if they were kept."""
    if bridge.parent == ZOO:
        return ZOO / "controls" / bridge.name
    return bridge.with_name(f"controls-{side}.safetensors")


def save_controls(
    path: Path,
    bridge: Path,
    students: Mapping[str, Student],
    verdicts: Sequence[Verdict] = (),
) -> None:
    """bridge: the file that they belong to. students: by their names in the tables; those of no use
    in whole runs are left out. verdicts: of the bridge.
    """
    settings, tensors = {}, {}
    for name in (*MIXED, *TRAINED):
        if name in students:
            settings[name] = settings_of(students[name])
            for key, tensor in students[name].state_dict().items():
                tensors[f"{name}.{key}"] = tensor.detach().cpu().contiguous()
    about = {
        "format": FORMAT,
        "bridge": sha256_of(bridge),
        "settings": settings,
        "verdict": [f"{v.name} {v.word}: {v.question} ({'; '.join(v.lines)})" for v in verdicts],
    }
    tensors = tensors or {"nothing": torch.zeros(1)}
    with complete_file(path) as partial:
        save_file(tensors, partial, {"ditcache": json.dumps(about)})


def load_controls(
    path: Path, bridge: Path, target: nn.Module, source: nn.Module
) -> tuple[dict[str, Student], list[str]]:
    """Name in the tables -> student, and the bridge's verdict in sentences; nothing where the file
    is not there or belongs to another bridge. Raises DitcacheError for a damaged one.
    """
    found: dict[str, Student] = {}
    if not path.is_file():
        return found, []
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("ditcache", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is not '{FORMAT}'")
        if about["bridge"] != sha256_of(bridge):
            return found, []
        for name, settings in about["settings"].items():
            student = made(name, settings, target, source)
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items()
                   if k.startswith(f"{name}.")}  # fmt: skip
            student.load_state_dict(own)
            found[TRAINED.get(name, name)] = student
        return found, [str(sentence) for sentence in about["verdict"]]
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DitcacheError(f"bridge: {path} holds no controls ({first_line(error)})") from None


def settings_of(student: Student) -> dict[str, Any]:
    """What `made` needs to make it again, beside its weights."""
    if isinstance(student, OutputAverage | WeightAverage):
        return {"share": student.share}
    if isinstance(student, TimestepSwitch):
        return {"sigma": student.sigma, "source_above": student.source_above}
    if isinstance(student, Router):
        return {"channels": student.into.in_channels // 3, "hidden": student.into.out_channels}
    assert isinstance(student, LowRankUpdate)
    return {"rank": student.rank}


def made(name: str, settings: dict[str, Any], target: nn.Module, source: nn.Module) -> Student:
    """Without its weights."""
    if name == "weight average":
        return WeightAverage(source, **settings)
    if name == "lora":
        return LowRankUpdate(target, **settings)
    kinds = {
        "output averaging": OutputAverage,
        "timestep switching": TimestepSwitch,
        "router": Router,
    }
    return kinds[name](**settings)
