"""The `kv` config group: what a rollout's attention sees of the past, and how that is kept. Does
not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditcache.errors import one_of
from ditcache.models.causal import POSITIONS

CODECS = ("none", "int8", "int4")


@dataclass
class KVSettings:
    """window: latent frames attended to: sink, older ones and the newest chunk (None: everything).
    sink: the video's first latent frames, which are never evicted. positions: `absolute`, by frame
    of the video, as the models were trained, up to the end of their position table; `relative`, by
    place in the window, without limit. codec: `int8` or `int4` keeps chunks that are finished
    quantised, the newest one as it is. offload: finished chunks live in the store, not on the
    device.
    """

    window: int | None = 21
    sink: int = 0
    positions: str = "absolute"
    codec: str = "none"
    offload: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: must be >= 1 latent frame, or null, got {self.window}")
        if self.sink < 0:
            raise ValueError(f"sink: must be >= 0, got {self.sink}")
        if self.sink and self.window is None:
            raise ValueError("sink: has no effect without a window; set window or sink=0")
        for name, allowed in (("positions", POSITIONS), ("codec", CODECS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: no '{value}'. {one_of(value, allowed)}")
        if self.offload and self.codec != "none":
            raise ValueError(
                "codec: offloaded chunks are encoded by the store; set codec=none and, for "
                "example, store.cpu_codec=int8"
            )

    def check_chunk(self, longest: int) -> None:
        """Raises ValueError where a chunk of `longest` latent frames does not fit."""
        if self.window is not None and self.sink + longest > self.window:
            raise ValueError(
                f"window: must hold the sink and a chunk ({self.sink} + {longest} latent frames), "
                f"got {self.window}"
            )

    def note(self, chunk: int) -> str | None:
        """What to say of a window that is legal and hardly meant."""
        if self.window is None or self.window % chunk == 0:
            return None
        return (
            f"kv.window={self.window} is no multiple of the chunk of {chunk}: of the oldest chunk "
            "only a part is seen"
        )
