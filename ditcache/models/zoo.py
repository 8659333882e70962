"""The embedded members: each is a diffusers folder without what it shares with another one.

`shared.json` in a member's folder says where a missing part comes from; `delta.safetensors` stands
for the weights of a transformer that differs little from wan-tiny's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file

from ditcache.models import delta
from ditcache.models.base import ZOO

BASE = "wan-tiny"
SHARED, DELTA, WEIGHTS = "shared.json", "delta.safetensors", "diffusion_pytorch_model.safetensors"


def parts_of(folder: Path, dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    """Parts of the pipeline in `folder` that are not simply there, loaded. dtypes: per part, or
    `default`.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    shared = folder / SHARED
    origins = json.loads(shared.read_text(encoding="utf-8")) if shared.is_file() else {}
    parts: dict[str, Any] = {}
    for name, origin in origins.items():
        library, cls = index[name]
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], cls)
        dtype = dtypes.get(name, dtypes["default"])
        keywords = {"dtype": dtype} if hasattr(kind, "forward") else {}
        parts[name] = kind.from_pretrained(ZOO / origin / name, **keywords)
    for path in folder.glob(f"*/{DELTA}"):
        name = path.parent.name
        kind = getattr(diffusers, index[name][1])
        model = kind.from_config(kind.load_config(path.parent))
        base = load_file(ZOO / BASE / "transformer" / WEIGHTS)
        model.load_state_dict(delta.decode(load_file(path), base))
        parts[name] = model.to(dtypes.get(name, dtypes["default"])).eval()
    return parts
