"""Puts a bridge that bridge-train has made into the package, in half precision, with its verdict
and its controls but for the LoRA, which is as large as the bridge.

    python scripts/embed_bridge.py outputs/bridge-train/<run> --name chrono_to_wan

Half of the bytes for 1e-3 of relative rounding; everything computes in single precision.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ditcache.bridge.controls_file import controls_path
from ditcache.bridge.saved import ZOO, locate, read_header
from ditcache.files import complete_file, sha256_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--name", required=True, help="zoo:<name>")
    arguments = parser.parse_args()
    bridge = locate(arguments.run)
    (side,) = read_header(bridge).ways
    embedded = ZOO / f"{arguments.name}.safetensors"
    about, tensors = read(bridge)
    write(embedded, about, tensors)
    controls = controls_path(bridge, side)
    if controls.is_file():
        about, tensors = read(controls)
        about["bridge"] = sha256_of(embedded)
        about["settings"].pop("lora", None)
        kept = {name: x for name, x in tensors.items() if not name.startswith("lora.")}
        copy = controls_path(embedded, side)
        copy.parent.mkdir(exist_ok=True)
        write(copy, about, kept or {"nothing": torch.zeros(1)})


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).half() for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["ditcache"]), tensors


def write(path: Path, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    with complete_file(path) as partial:
        save_file(tensors, partial, {"ditcache": json.dumps(about)})
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
