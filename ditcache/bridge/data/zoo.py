"""The embedded models' procedural world: motion, edits, and both in one clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ditcache.bridge.data.base import SPLITS, Data, check_counts

if TYPE_CHECKING:
    from ditcache.bridge.samples import Samples
    from ditcache.models.base import Bundle


@dataclass(kw_only=True)
class ZooData(Data):
    """Clips of `ditcache.clips`, drawn from a seed: so many per domain (`motion`, `edit`,
    `composite`) to train on, to choose settings on, and to judge on.

    cache: folder in which latents are kept for the next run (None: they are made anew).
    """

    learning_rate: float = 2e-3
    wan_domain: str | None = "motion"
    chrono_domain: str | None = "edit"
    train: int = 128
    validation: int = 12
    test: int = 48
    seed: int = 0
    cache: str | None = "outputs/bridge-clips"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, *SPLITS)
        if self.seed < 0:
            raise ValueError(f"seed: must be >= 0, got {self.seed}")
        from ditcache.clips.edits import DOMAINS

        for name in ("wan_domain", "chrono_domain"):
            if getattr(self, name) not in (None, *DOMAINS):
                found = getattr(self, name)
                raise ValueError(f"{name}: must be one of {', '.join(DOMAINS)}, got {found}")

    def prepare(
        self, bundles: Mapping[str, Bundle], *, height: int, width: int, num_frames: int
    ) -> Samples:
        from ditcache.bridge.encode import zoo_samples
        from ditcache.bridge.samples import cached

        counts = {split: getattr(self, split) for split in SPLITS}
        folder = None if self.cache is None else Path(self.cache).expanduser()
        parts = {**counts, "seed": self.seed}
        return cached(folder, bundles, parts, lambda: zoo_samples(bundles, counts, self.seed))
