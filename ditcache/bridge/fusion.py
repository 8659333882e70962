"""The rule by which a source enters a target's attention: which way, where, and how often.

Settings only; does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditcache.errors import one_of

SIDES = ("wan", "chrono")
DIRECTIONS = {
    "wan_to_chrono": {"chrono": "wan"},
    "chrono_to_wan": {"wan": "chrono"},
    "bidirectional": {"wan": "chrono", "chrono": "wan"},
}
BRANCHES = ("both", "cond", "cond_for_both")
DRIVERS = ("stream", "store")
FRAMES = ("all", "ends")


def is_range(window: list[float]) -> bool:
    return len(window) == 2 and 0 <= window[0] < window[1] <= 1


@dataclass(kw_only=True)
class Fusion:
    """How keys and values of a source reach a target.

    fusion_direction: `wan_to_chrono`, `chrono_to_wan`, or `bidirectional`, which has projectors for
    both ways, of which a run uses the one into its own model. branches: `both`, each from the
    source's same branch; `cond` alone; `cond_for_both` fuses the source's cond branch into both,
    which largely cancels in guidance. layers: fuse only the target's first so many layers (None:
    all). window: the bridge acts where low <= sigma <= high (None: always).

    The price. refresh_every: ask the source at every so manieth step, use what it said in between.
    refresh_drop: ask where sigma has dropped by so much since, instead; better at equal cost,
    because schedules are uneven. source_frames: `ends` shows the source only the first and last
    latent frame and fuses only their tokens.

    driver: `stream` runs the source's blocks just ahead of the target's and stops after the deepest
    that is needed; `store` runs its whole forward and keeps keys and values in the run's store. The
    result is the same bit for bit. renorm_k: bring fused keys back to the size of the target's.
    leave_last_frame: fuse nothing into the last latent frame, which is the edited picture in
    ChronoEdit and ordinary video in Wan. allow_out_of_range: let ChronoEdit see other than 2 or 8
    latent frames, which it never has.
    """

    fusion_direction: str
    branches: str = "both"
    layers: int | None = None
    window: list[float] | None = None
    refresh_every: int | None = 1
    refresh_drop: float | None = None
    source_frames: str = "all"
    driver: str = "stream"
    renorm_k: bool = False
    leave_last_frame: bool = False
    allow_out_of_range: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("fusion_direction", DIRECTIONS),
            ("branches", BRANCHES),
            ("source_frames", FRAMES),
            ("driver", DRIVERS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: no '{value}'. {one_of(value, allowed)}")
        for name in ("layers", "refresh_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be >= 1, got {value}")
        if self.refresh_drop is not None and not 0 < self.refresh_drop < 1:
            raise ValueError(f"refresh_drop: must be between 0 and 1, got {self.refresh_drop}")
        if (self.refresh_every is None) == (self.refresh_drop is None):
            raise ValueError("refresh_drop: set either it or refresh_every, the other one to null")
        if self.window is not None and not is_range(self.window):
            raise ValueError(f"window: must be [low, high] within 0..1, got {self.window}")
        if self.source_frames == "ends" and self.leave_last_frame:
            raise ValueError("leave_last_frame: source_frames=ends would leave only the first")

    @property
    def sources(self) -> dict[str, str]:
        """Target side -> source side, `wan` or `chrono`."""
        return DIRECTIONS[self.fusion_direction]

    def acts_at(self, sigma: float) -> bool:
        return self.window is None or self.window[0] <= sigma <= self.window[1]

    def is_due(self, step: int, sigma: float, last: tuple[int, float] | None) -> bool:
        """Whether to ask the source at this step. last: step and sigma of the last time."""
        if last is None or step < last[0]:
            return True
        if self.refresh_drop is not None:
            return last[1] - sigma >= self.refresh_drop - 1e-9
        assert self.refresh_every is not None
        return step - last[0] >= self.refresh_every

    def refreshes(self, sigmas: list[float]) -> list[int]:
        """Steps at which an uncached run asks its source."""
        found: list[int] = []
        for step, sigma in enumerate(sigmas):
            last = (found[-1], sigmas[found[-1]]) if found else None
            if self.acts_at(sigma) and self.is_due(step, sigma, last):
                found.append(step)
        return found

    @property
    def schedule(self) -> str:
        """In words, for tables."""
        words = (
            f"every {self.refresh_every}"
            if self.refresh_drop is None
            else f"drop {self.refresh_drop:g}"
        )
        words += {"both": "", "cond": ", cond only", "cond_for_both": ", cond for both"}[
            self.branches
        ]
        words += "" if self.layers is None else f", first {self.layers} layers"
        words += "" if self.window is None else f", sigma {self.window[0]:g}-{self.window[1]:g}"
        return words + (", first and last frame" if self.source_frames == "ends" else "")
