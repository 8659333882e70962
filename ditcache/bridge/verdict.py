"""Does the bridge carry anything, does it help, and is it worth its price: computed from paired
losses, not judged by eye. Does not import torch.

Differences are per clip, so that clips that are hard for everybody cancel out. Negative is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ERRORS = 2.0  # standard errors that a difference must pass


@dataclass(frozen=True)
class Difference:
    """mean and standard error over clips of (first - second)."""

    mean: float
    error: float

    @property
    def better(self) -> bool:
        """First is better, beyond chance."""
        return self.mean < -ERRORS * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Raises ValueError where the clips are not the same number."""
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"paired: needs equal numbers of clips, got {len(first)}, {len(second)}")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / len(differences)
    return Difference(mean, deviation(differences) / math.sqrt(len(differences)))


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of two or more; not a number where one of them is none, at which
    `statistics.stdev` raises.
    """
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


@dataclass(frozen=True)
class Losses:
    """Per clip, of one training run: the bridge, its controls and the target alone. own: indices of
    clips of the target's own domain; composite: of those that need both skills (empty: no such).
    controls: `self`, `shuffled`, `router`, `lora`; what was not run is missing.
    """

    bridge: Sequence[float]
    target: Sequence[float]
    controls: Mapping[str, Sequence[float]]
    own: Sequence[int]
    composite: Sequence[int]


@dataclass(frozen=True)
class Verdict:
    """passed: None where it could not be told. lines: the figures behind it, one per run."""

    name: str
    question: str
    passed: bool | None
    lines: tuple[str, ...]

    @property
    def word(self) -> str:
        return {True: "PASS", False: "FAIL", None: "not told"}[self.passed]


def judge(runs: Sequence[Losses], max_harm: float) -> list[Verdict]:
    """P1: the source's information is used: real beats self and shuffled, on every run. P2: useful
    and harmless: beats the target on the mix, and its loss at home is at most `max_harm` worse. P3:
    worth its price: beats router and LoRA where both skills are needed.
    """
    return [carries(runs), helps(runs, max_harm), pays(runs)]


def carries(runs: Sequence[Losses]) -> Verdict:
    lines, won = [], []
    for number, run in enumerate(runs):
        told = {name: paired(run.bridge, run.controls[name]) for name in ("self", "shuffled")
                if name in run.controls}  # fmt: skip
        lines.append(said(number, told))
        won.append(all(d.better for d in told.values()) if len(told) == 2 else None)
    return Verdict("P1", "information from the source is used", every(won), tuple(lines))


def helps(runs: Sequence[Losses], max_harm: float) -> Verdict:
    lines, won = [], []
    for number, run in enumerate(runs):
        whole = paired(run.bridge, run.target)
        line, fine = f"run {number}: real - target {whole}", whole.better
        if run.own:
            bridged, alone = (
                sum(losses[i] for i in run.own) / len(run.own)
                for losses in (run.bridge, run.target)
            )
            harm = bridged / alone - 1
            line += f", at home {harm:+.1%} (at most {max_harm:+.1%})"
            fine = fine and harm <= max_harm
        if len(run.composite) > 1:
            pairs = ([losses[i] for i in run.composite] for losses in (run.bridge, run.target))
            line += f", composite {paired(*pairs)}"
        lines.append(line)
        won.append(fine)
    return Verdict("P2", "better on the mix, harmless at home", every(won), tuple(lines))


def pays(runs: Sequence[Losses]) -> Verdict:
    lines, won = [], []
    for number, run in enumerate(runs):
        chosen = run.composite
        told = {
            name: paired([run.bridge[i] for i in chosen], [run.controls[name][i] for i in chosen])
            for name in ("router", "lora")
            if name in run.controls and len(chosen) > 1
        }
        lines.append(said(number, told))
        won.append(all(d.better for d in told.values()) if len(told) == 2 else None)
    question = "worth its price where both skills are needed"
    return Verdict("P3", question, every(won), tuple(lines))


def said(number: int, told: Mapping[str, Difference]) -> str:
    """A run's line."""
    found = ", ".join(f"real - {name} {difference}" for name, difference in told.items())
    return f"run {number}: {found or 'nothing to compare with'}"


def every(won: Sequence[bool | None]) -> bool | None:
    """True if all are, None if one could not be told, False otherwise."""
    if any(w is None for w in won) or not won:
        return None
    return all(won)
