"""Where clips to train and judge a bridge come from. Settings only; does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditcache.bridge.samples import Samples
    from ditcache.models.base import Bundle

SPLITS = ("train", "validation", "test")


@dataclass(kw_only=True)
class Data:
    """Base of all sources of clips.

    learning_rate: that suits them. wan_domain, chrono_domain: the domain in which each model is at
    home, where a bridge must do no harm (None: none is named).
    """

    learning_rate: float = 1e-4
    wan_domain: str | None = None
    chrono_domain: str | None = None

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: must be > 0, got {self.learning_rate}")

    def own_domain(self, side: str) -> str | None:
        return self.wan_domain if side == "wan" else self.chrono_domain

    def check(self) -> None:
        """Whether the clips are there. Raises ValueError."""

    def prepare(
        self, bundles: Mapping[str, Bundle], *, height: int, width: int, num_frames: int
    ) -> Samples:
        """Latents and conditions of every clip. bundles: by side, `wan` and `chrono`."""
        raise NotImplementedError


def check_counts(data: object, *names: str) -> None:
    for name in names:
        if getattr(data, name) < 1:
            raise ValueError(f"{name}: must be >= 1, got {getattr(data, name)}")
