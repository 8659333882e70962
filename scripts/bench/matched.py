"""Tunes every method to the same compute, on prompts that the comparison does not use.

Ratio: what the uncached run computes over what the arm computes, in blocks or in whole steps. For a
target every setting is brought as near to it as it gets, never further below than `LEAST` of it;
of a method's settings the one with the best mean PSNR on the tuning prompts represents it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from bench.arms import Arm
from bench.measure import Bench, Video, finite
from bench.methods import Method

from ditcache.errors import DitcacheError
from ditcache.metrics.psnr import psnr
from ditcache.pipeline.inputs import Inputs

LEAST = 0.97  # of the target, to two digits: at most 3 % more compute
RANGE = (0.003, 4.0)  # of thresholds
FIRST = (0.06, 0.25)  # those looked at before any search
TURNS = 4  # more of them per target
CLOSE = 0.015  # near enough to stop

Ratios = dict[str, float]  # "blocks" and "steps"


def allowed(ratio: float, target: float) -> bool:
    return round(ratio / target, 2) >= LEAST


def nearest(ratios: list[float], target: float) -> list[int]:
    """Indices of those nearest to the target among the allowed ones: all that are equally near."""
    off = {i: abs(ratio / target - 1) for i, ratio in enumerate(ratios) if allowed(ratio, target)}
    best = min(off.values(), default=0.0)
    return [i for i, distance in off.items() if distance <= best + 1e-6]


def turn(ratio_at: Callable[[float], float], known: dict[float, float], target: float) -> None:
    """Look for the threshold with the target's ratio, between those already `known`; adds to them.
    A threshold's ratio rises with it, in steps.
    """
    for value in FIRST:
        if value not in known:
            known[value] = ratio_at(value)
    for _ in range(TURNS):
        low = max((v for v, ratio in known.items() if ratio <= target), default=RANGE[0])
        high = min((v for v, ratio in known.items() if ratio > target), default=RANGE[1])
        near = min(abs(ratio / target - 1) for ratio in known.values())
        if near < CLOSE or not low * 1.04 < high:
            return
        value = between(low, high, known, target)
        known[value] = ratio_at(value)


def between(low: float, high: float, known: dict[float, float], target: float) -> float:
    """Where a line through the bracket's ends says, on a logarithmic scale; not too near an end."""
    share = 0.5
    if low in known and high in known:
        share = (target - known[low]) / (known[high] - known[low])
    return float(f"{low * (high / low) ** min(max(share, 0.2), 0.8):.4g}")


class Tuner:
    """Ratios and quality of arms on the tuning prompts, each measured once."""

    def __init__(self, bench: Bench, inputs: list[Inputs]):
        self.bench, self.inputs = bench, inputs
        none = Arm("control", "none")
        self.references = [bench.frames(bench.run(none, one)) for one in inputs]
        self.known_ratios: dict[str, Ratios] = {}
        self.known_quality: dict[str, float] = {}
        self.thresholds: dict[str, dict[float, float]] = {}  # ratios by threshold, per setting
        self.log: list[dict[str, Any]] = []
        self.refused: dict[str, str] = {}

    def best(self, method: Method, target: float, unit: str) -> Arm | None:
        """The method's arm for a target ratio of blocks or steps; None if it cannot get there."""
        contenders: list[Arm] = []
        for settings in method.open:
            contenders += self.turned(method, settings, target, unit)
        contenders += self.among(method, target, unit)
        rows = [row for arm in contenders if (row := self.row(method, arm, target, unit))]
        self.log += rows
        if not rows:
            return None
        return method.arm(max(rows, key=lambda row: row["psnr"])["settings"])

    def turned(self, method: Method, settings: dict, target: float, unit: str) -> list[Arm]:
        """One open setting with its knob turned to the target."""

        def arm_at(value: float) -> Arm:
            return method.arm({**settings, method.knob: value})

        known = self.thresholds.setdefault(f"{method.arm(settings).key} {unit}", {})
        for value in self.thresholds.get(f"{method.arm(settings).key} blocks", {}):
            known[value] = self.ratios(method, arm_at(value))[unit]
        try:
            turn(lambda value: self.ratios(method, arm_at(value))[unit], known, target)
        except DitcacheError as error:
            self.refused[method.arm(settings).name] = str(error)
            return []
        values = list(known)
        return [arm_at(values[i]) for i in nearest(list(known.values()), target)[:1]]

    def among(self, method: Method, target: float, unit: str) -> list[Arm]:
        """The ready settings nearest to the target."""
        arms, ratios = [method.arm(settings) for settings in method.ready], []
        for arm in arms:
            try:
                ratios.append(self.ratios(method, arm)[unit])
            except DitcacheError as error:
                self.refused[arm.name] = str(error)
                ratios.append(0.0)
        return [arms[i] for i in nearest(ratios, target)]

    def ratios(self, method: Method, arm: Arm) -> Ratios:
        """Known in advance or measured."""
        if arm.key in self.known_ratios:
            return self.known_ratios[arm.key]
        steps, num_blocks = self.bench.num_steps, self.bench.counter.num_blocks
        if method.computed is not None and arm.settings in method.ready:
            count = method.computed(arm.settings)
            blocks = count * num_blocks + (steps - count) * method.probe
            return {"blocks": steps * num_blocks / blocks, "steps": steps / count}
        prompts = self.inputs[:1] if method.alike else self.inputs
        self.known_ratios[arm.key] = self.ratios_of([self.bench.run(arm, one) for one in prompts])
        return self.known_ratios[arm.key]

    def ratios_of(self, videos: list[Video]) -> Ratios:
        blocks = float(np.mean([video.blocks for video in videos]))
        steps = float(np.mean([video.steps for video in videos]))
        return {
            "blocks": self.bench.all_blocks / blocks,
            "steps": self.bench.num_steps / max(1.0, steps),
        }

    def quality(self, arm: Arm) -> float:
        """Mean PSNR; what it takes the ratios from is measured along with it."""
        if arm.key not in self.known_quality:
            videos = [self.bench.run(arm, one) for one in self.inputs]
            scores = [
                finite(psnr(reference, self.bench.frames(video)))
                for reference, video in zip(self.references, videos, strict=True)
            ]
            self.known_quality[arm.key] = float(np.mean(scores))
            self.known_ratios[arm.key] = self.ratios_of(videos)
        return self.known_quality[arm.key]

    def row(self, method: Method, arm: Arm, target: float, unit: str) -> dict[str, Any] | None:
        try:
            quality = self.quality(arm)
        except DitcacheError as error:
            self.refused[arm.name] = str(error)
            return None
        return {
            "who": arm.who,
            "method": method.name,
            "settings": arm.settings,
            "target": target,
            "unit": unit,
            **{f"{key}_ratio": value for key, value in self.known_ratios[arm.key].items()},
            "psnr": quality,
        }
