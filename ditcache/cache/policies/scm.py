"""Step computation masks: fixed patterns of computed and skipped steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest

from ditcache.cache.policies.base import Policy, Schedule
from ditcache.errors import ConfigError, one_of

# Alternating lengths of computed and skipped runs: for 28 steps, as cache-dit publishes them.
PRESETS: dict[str, tuple[list[int], list[int]]] = {
    "slow": ([8, 3, 3, 2, 1, 1], [1, 2, 2, 2, 3]),
    "medium": ([6, 2, 2, 2, 2, 1], [1, 3, 3, 3, 3]),
    "fast": ([6, 1, 1, 1, 1, 1], [1, 3, 4, 5, 4]),
    "ultra": ([4, 1, 1, 1, 1], [2, 5, 6, 7]),
}
FEW_STEPS: dict[int, dict[str, tuple[list[int], list[int]]]] = {  # 10 to 15 steps trim those of 15
    15: {
        "slow": ([4, 2, 2, 2, 1], [1, 1, 1, 1]),
        "medium": ([4, 2, 1, 1, 1], [1, 1, 2, 2]),
        "fast": ([3, 1, 1, 1, 1], [1, 2, 2, 3]),
        "ultra": ([2, 1, 1, 1, 1], [1, 2, 3, 3]),
    },
    9: {
        "slow": ([5, 2, 1], [1]),
        "medium": ([5, 1, 1], [1, 1]),
        "fast": ([4, 1, 1], [1, 2]),
        "ultra": ([3, 1, 1], [2, 2]),
    },
    8: {
        "slow": ([5, 1, 1], [1]),
        "medium": ([4, 1, 1], [1, 1]),
        "fast": ([3, 1, 1], [1, 2]),
        "ultra": ([2, 1, 1], [2, 2]),
    },
    6: dict.fromkeys(PRESETS, ([3, 1], [2])),
    4: dict.fromkeys(PRESETS, ([2, 1], [1])),
}


@dataclass
class SCM(Policy):
    """A fixed pattern: a preset, or your own run lengths. Static.

    Presets are named after cache-dit's. By default only their share of computed steps and their
    longest run of skips are kept, and the pattern is laid out for the number of steps at hand:
    first and last step computed, denser at the start, and never fewer computed steps for a longer
    run or a slower preset. `compatible` gives cache-dit's own strings, degenerate ones included.
    Each expert gets a pattern of its own.

    preset: slow, medium, fast or ultra. compute, skip: lengths of computed and skipped runs in turn
    (`[6, 2, 1]` and `[1, 3]`); the last repeats until the run's end. compatible: as described.
    """

    preset: str | None = "medium"
    compute: list[int] | None = None
    skip: list[int] | None = None
    compatible: bool = False

    def __post_init__(self) -> None:
        if (self.compute is None) != (self.skip is None):
            raise ValueError("compute: compute and skip belong together; give both or neither")
        if (self.preset is None) == (self.compute is None):
            raise ValueError("preset: give either a preset or compute and skip; set the other null")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset: no '{self.preset}'. {one_of(self.preset, PRESETS)}")
        for name in ("compute", "skip"):
            if min(getattr(self, name) or [1]) < 1:
                raise ValueError(f"{name}: every length must be >= 1, got {getattr(self, name)}")
        if self.compute == [] or self.skip == []:
            raise ValueError("compute: needs at least one length")
        if self.compatible and self.preset is None:
            raise ValueError("compatible: is for presets; set compatible=false")

    def mask(self, schedule: Schedule) -> list[bool]:
        steps = len(schedule.span)
        if self.compute is not None and self.skip is not None:
            own = repeated(self.compute, self.skip, steps)
        elif self.compatible:
            assert self.preset is not None
            return [digit == "1" for digit in cache_dit_mask(self.preset, schedule.num_steps)]
        else:
            assert self.preset is not None
            own = spread(self.preset, steps)
        rest = schedule.num_steps - schedule.first - steps
        return [True] * schedule.first + own + [True] * rest


def spread(preset: str, steps: int) -> list[bool]:
    """The preset's share of `steps`, denser at the start, never skipping more steps in a row than
    the preset does at 28.
    """
    compute, skip = PRESETS[preset]
    longest = max(skip)
    count = max(2, math.ceil(sum(compute) * steps / (sum(compute) + sum(skip))))
    count = min(steps, max(count, 1 + math.ceil((steps - 1) / (longest + 1))))
    at, places = 0, [0]
    for left in range(count - 1, 0, -1):
        far = steps - 1 - at  # still to go, in `left` gaps
        # Even gaps would be far / left; early ones are shorter, as far as the later ones allow it.
        early = 0.5 + 0.5 * (count - left) / count
        gap = max(1, round(early * far / left), far - (left - 1) * (longest + 1))
        at += min(gap, longest + 1, far - (left - 1))
        places.append(at)
    return [step in places for step in range(steps)]


def repeated(compute: list[int], skip: list[int], steps: int) -> list[bool]:
    """Own run lengths cut to `steps`; the last of each repeats."""
    mask: list[bool] = []
    turn = 0
    while len(mask) < steps:
        mask += [True] * compute[min(turn, len(compute) - 1)]
        mask += [False] * skip[min(turn, len(skip) - 1)]
        turn += 1
    return mask[:steps]


def cache_dit_mask(preset: str, steps: int) -> str:
    """cache-dit 1.5.3's mask for a preset, `1` computes; the last step is forced to compute.

    Raises ConfigError for step counts it has no pattern for.
    """
    if steps >= 16:
        compute, skip = stretched(*PRESETS[preset], steps)
    elif steps >= 10:
        compute, skip = FEW_STEPS[15][preset]
    elif steps in FEW_STEPS:
        compute, skip = FEW_STEPS[steps][preset]
    else:
        raise ConfigError(
            f"cache.policy.preset: cache-dit has none for {steps} steps; set compatible=false"
        )
    compute, skip = trimmed(compute, skip, steps)
    digits = "".join(
        "1" * ones + "0" * zeros for ones, zeros in zip_longest(compute, skip, fillvalue=0)
    )
    return digits[: steps - 1] + "1"


def stretched(compute: list[int], skip: list[int], steps: int) -> tuple[list[int], list[int]]:
    """For more than 28 steps: lengthen run after run, in proportion, until the sum is reached."""
    compute, skip, base = list(compute), list(skip), (list(compute), list(skip))
    scale = steps / 28 * 0.5
    while sum(compute) + sum(skip) < steps:
        for turn in range(len(skip)):
            for bins, original in ((compute, base[0]), (skip, base[1])):
                bins[turn] += max(1, int(original[turn] * scale))
                if sum(compute) + sum(skip) >= steps:
                    return compute, skip
        compute[-1] += 1
    return compute, skip


def trimmed(compute: list[int], skip: list[int], steps: int) -> tuple[list[int], list[int]]:
    """Take away from the ends, skipped and computed in turn, until the sum is right."""
    compute, skip = list(compute), list(skip)
    bins = skip
    while sum(compute) + sum(skip) > steps:
        if bins:
            bins[-1] -= 1
            if bins[-1] == 0:
                bins.pop()
        bins = compute if bins is skip else skip
    return compute, skip
