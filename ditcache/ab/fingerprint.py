"""What a result depends on beside its settings: the weights, the code of the loop, the versions."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

import ditcache
from ditcache.ab.results import plain
from ditcache.files import sha256_of
from ditcache.models.base import Bundle
from ditcache.models.zoo import BASE, SHARED, ZOO
from ditcache.pipeline.denoise import make_scheduler
from ditcache.report.run_folder import versions

WHOLE, PART = 64 * 2**20, 2**20  # files up to WHOLE bytes are read whole, of others so much


def of_bundle(bundle: Bundle, shift: float | None) -> dict[str, Any]:
    """JSON-serialisable."""
    model, pipe = bundle.model, bundle.pipe
    scheduler = make_scheduler(pipe.scheduler, shift)
    device = torch.device(bundle.device)
    # On a CPU the number of threads and the instruction set decide how sums are split.
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(
        (device.type, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
    )  # fmt: skip
    return {
        "pipeline": type(pipe).__name__,
        "weights": of_weights(str(pipe.config.get("_name_or_path", model.path))),
        "reasoning": getattr(model, "reasoning_steps", None),
        "boundary": bundle.boundary,
        "dtypes": [model.dtype, model.vae_dtype],
        "offload": model.offload,
        "device": where,
        "scheduler": [type(scheduler).__name__, plain(dict(scheduler.config))],
        "code": of_code(),
        "versions": {name: v for name, v in versions().items() if name != "platform"},
    }


@cache
def of_weights(path: str) -> str:
    """Of a folder's files, read whole if they are small; of a hub id, its name."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    folders = [folder]
    if (folder / SHARED).is_file():  # parts that other embedded members lend
        origins = {BASE, *json.loads((folder / SHARED).read_text()).values()}
        folders += [ZOO / origin for origin in sorted(origins)]
    for root in folders:
        for file in sorted(p for p in root.rglob("*") if p.suffix in (".safetensors", ".json")):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(root)} {size}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(size if size <= WHOLE else PART))
            if size > WHOLE:
                digest.update(str(file.stat().st_mtime_ns).encode())
    return digest.hexdigest()


@cache
def of_code() -> str:
    """Of the modules that decide what an uncached run comes to."""
    root, digest = Path(ditcache.__file__).parent, hashlib.sha256()
    for folder in ("models", "pipeline"):
        for file in sorted((root / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@cache
def of_picture(path: Path | None) -> str | None:
    return None if path is None else sha256_of(path)
