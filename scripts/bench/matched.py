"""Tunes every method to the same compute, on prompts that the comparison does not use.

Ratio: what the uncached run computes over what the arm computes, in blocks or in whole steps. For a
target every setting is brought as near to it as it gets, never further below than `LEAST` of it, on
the first `FEW` tuning prompts. The `FINALISTS` with the best mean PSNR there meet on all of them,
and the best `SENT` go to the comparison. A handful of prompts decides between near settings by
luck, so that there the better of them stands for the method, ours and the peers' alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bench.arms import Arm
from bench.measure import Bench, finite
from bench.methods import Method

from ditcache.errors import DitcacheError
from ditcache.metrics.psnr import psnr
from ditcache.pipeline.inputs import Inputs

LEAST = 0.97  # of the target, to two digits: at most 3 % more compute
RANGE = (0.003, 4.0)  # of thresholds
FIRST = (0.06, 0.25)  # those looked at before any search
TURNS = 4  # more of them per target
FEW, FINALISTS, SENT = 2, 4, 2
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


@dataclass
class Seen:
    """An arm's figures on the first so many tuning prompts."""

    psnr: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


class Tuner:
    """Ratios and quality of arms on the tuning prompts, each measured once."""

    def __init__(self, bench: Bench, inputs: list[Inputs], sent: int = SENT):
        self.bench, self.inputs, self.sent = bench, inputs, sent
        none = Arm("control", "none")
        self.references = bench.frames([bench.run(none, one) for one in inputs])
        self.known_ratios: dict[str, Ratios] = {}
        self.seen: dict[str, Seen] = {}
        self.thresholds: dict[str, dict[float, float]] = {}  # ratios by threshold, per setting
        self.log: list[dict[str, Any]] = []
        self.refused: dict[str, str] = {}

    def best(self, method: Method, target: float, unit: str) -> list[Arm]:
        """The method's arms for a target ratio of blocks or steps, best last; none if it cannot get
        there.
        """
        contenders: list[Arm] = []
        for settings in method.open:
            contenders += self.turned(method, settings, target, unit)
        contenders += self.among(method, target, unit)
        rows: list[dict[str, Any]] = []
        for count, most in ((FEW, len(contenders)), (len(self.inputs), FINALISTS)):
            rows.sort(key=lambda row: -row["psnr"])
            arms = [method.arm(row["settings"]) for row in rows[:most]] or contenders
            rows = [row for arm in arms if (row := self.row(arm, target, unit, count))]
            self.log += rows
        rows.sort(key=lambda row: (allowed(row[f"{unit}_ratio"], target), row["psnr"]))
        return [method.arm(row["settings"]) for row in rows[-self.sent :]]

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
        prompts = self.inputs[: 1 if method.alike else FEW]
        videos = [self.bench.run(arm, one) for one in prompts]
        self.known_ratios[arm.key] = self.ratios_of(
            [video.blocks for video in videos], [video.steps for video in videos]
        )
        return self.known_ratios[arm.key]

    def ratios_of(self, blocks: list[float], steps: list[float]) -> Ratios:
        return {
            "blocks": self.bench.all_blocks / float(np.mean(blocks)),
            "steps": self.bench.num_steps / max(1.0, float(np.mean(steps))),
        }

    def look(self, arm: Arm, count: int) -> Seen:
        """Quality on the first `count` prompts, and the ratios that came with it."""
        seen = self.seen.setdefault(arm.key, Seen())
        new = range(len(seen.psnr), min(count, len(self.inputs)))
        videos = [self.bench.run(arm, self.inputs[i]) for i in new]
        for i, video, frames in zip(new, videos, self.bench.frames(videos), strict=True):
            seen.psnr.append(finite(psnr(self.references[i], frames)))
            seen.blocks.append(video.blocks)
            seen.steps.append(video.steps)
        return seen

    def row(self, arm: Arm, target: float, unit: str, count: int) -> dict[str, Any] | None:
        try:
            seen = self.look(arm, count)
        except DitcacheError as error:
            self.refused[arm.name] = str(error)
            return None
        ratios = self.ratios_of(seen.blocks, seen.steps)
        return {
            "who": arm.who,
            "method": arm.method,
            "settings": arm.settings,
            "target": target,
            "unit": unit,
            "captions": len(seen.psnr),
            **{f"{key}_ratio": value for key, value in ratios.items()},
            "psnr": float(np.mean(seen.psnr)),
        }
