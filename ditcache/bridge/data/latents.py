"""Latents that an earlier run has made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ditcache.bridge.data.base import Data

if TYPE_CHECKING:
    from ditcache.bridge.samples import Samples
    from ditcache.models.base import Bundle


@dataclass(kw_only=True)
class LatentsData(Data):
    """The `clips.safetensors` that bridge-train leaves in its run folder: latents, conditions, text
    and image embeddings of every clip.
    """

    path: str

    def check(self) -> None:
        if not Path(self.path).expanduser().is_file():
            raise ValueError(f"data.path: no file '{self.path}'")

    def prepare(
        self, bundles: Mapping[str, Bundle], *, height: int, width: int, num_frames: int
    ) -> Samples:
        from ditcache.bridge.samples import load_samples

        return load_samples(Path(self.path).expanduser(), bundles)
