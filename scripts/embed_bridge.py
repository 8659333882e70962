"""Puts a bridge that bridge-train has made into the package, with its controls, in half precision.

    python scripts/embed_bridge.py outputs/bridge-train/<run> --name chrono_to_wan

Half of the bytes for 1e-3 of relative rounding; everything computes in single precision.
"""

import argparse
import json
from pathlib import Path

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
    halved(bridge, embedded, {})
    print(f"{embedded}: {embedded.stat().st_size:,} bytes")
    controls = controls_path(bridge, side)
    if controls.is_file():
        copy = controls_path(embedded, side)
        copy.parent.mkdir(exist_ok=True)
        halved(controls, copy, {"bridge": sha256_of(embedded)})
        print(f"{copy}: {copy.stat().st_size:,} bytes")


def halved(path: Path, copy: Path, changes: dict[str, str]) -> None:
    """The file with half-precision tensors; changes: to what it says of itself."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["ditcache"])
        tensors = {name: file.get_tensor(name).half() for name in sorted(file.keys())}
    with complete_file(copy) as partial:
        save_file(tensors, partial, {"ditcache": json.dumps(about | changes)})


if __name__ == "__main__":
    main()
