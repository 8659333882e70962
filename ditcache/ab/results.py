"""Finished results under the hash of everything they depend on, so that nothing is rendered twice
and nothing stale is used.

A file holds exact latents and how long each part took. It is believed only if what it says of
itself, and the checksum of its latents, are right.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditcache.errors import first_line
from ditcache.files import complete_file

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Result:
    """What one arm made of one case.

    latents [1, C, T, H, W] on the CPU. seconds: text, denoise, decode. blocks, blocks_total: run,
    and of a run that skips nothing. memory: peak bytes of the device, or of the process on a CPU.
    strips: expert -> branch -> one mark per step, `#` computed, `.` skipped. born: process and time
    of the measurement.
    """

    latents: Tensor
    steps: int
    seconds: dict[str, float]
    blocks: int
    blocks_total: int
    state: int
    memory: int
    strips: dict[str, dict[str, str]] = field(default_factory=dict)
    born: str = ""

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "latents"}


class Archive:
    """A folder of results. Several processes may use it at once."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: dict[str, Any]) -> Path:
        return self.folder / f"{digest(key)}.safetensors"

    def get(self, key: dict[str, Any]) -> Result | None:
        """None if it is not there, or is damaged, which is said once per file."""
        from safetensors import SafetensorError, safe_open

        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                latents, about = file.get_tensor("latents"), file.metadata() or {}
            if about.get("key") != canonical(key) or about.get("sha256") != checksum(latents):
                raise ValueError("its checksum is wrong")
            return Result(latents=latents, **json.loads(about["facts"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"baseline: {path} is damaged ({first_line(error)}); rendered again",
                          stacklevel=2)  # fmt: skip
            return None

    def put(self, key: dict[str, Any], result: Result) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        latents = result.latents.contiguous()
        about = {
            "key": canonical(key),
            "sha256": checksum(latents),
            "facts": json.dumps(result.facts()),
        }
        with complete_file(self.path(key)) as partial:
            save_file({"latents": latents}, partial, metadata=about)


def checksum(latents: Tensor) -> str:
    from torch import uint8

    return hashlib.sha256(latents.contiguous().view(uint8).numpy().tobytes()).hexdigest()


def canonical(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, ensure_ascii=False)


def digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(key).encode()).hexdigest()[:32]


def plain(value: Any) -> Any:
    """A component as data: its class and its settings, all the way down; not what it keeps."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"class": type(value).__qualname__, **parts}
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
