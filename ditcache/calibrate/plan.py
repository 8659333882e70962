"""Which steps to compute, given how many: a shortest path over measured errors.

A skipped step t behind computed steps i > h gets R_i + damping * (t - i) / (i - h) * (R_i - R_h).
What that does to the guided output is linear in the damping, so the best one and its error follow
from the measured inner products. An error's effect on the final latents is its size times the
step's `gain`, which was measured by skipping that step alone. Errors within one run of skips point
the same way, so their sizes add up; those of different runs add up as squares.

The path is exact for a weighted sum of the prompts' errors. What counts is the mean of their
logarithms (decibels), so the weights are set to one over each prompt's error and the path is
searched again, until it stays (a majorise-minimise scheme). The graph is LeMiCa's idea
(arXiv:2511.00090).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Gram: TypeAlias = list[list[list[float]]]  # [T][W][W]
Anchors: TypeAlias = tuple[
    int, ...
]  # computed steps behind a skipped one, newest first, at most two
ROUNDS = 8


@dataclass
class Plan:
    """mask [T]: which steps compute. damping: one per skipped step. decibel: mean over prompts of
    the predicted error of the final latents, relative to their size. A refined plan has `weights`
    instead of dampings, of the last computed residuals, newest first, one list per skipped step;
    `rendered`: that error before and after, as rendered.
    """

    mask: list[bool]
    damping: list[float]
    decibel: float
    weights: list[list[float]] | None = None
    rendered: tuple[float, float] | None = None

    @property
    def marks(self) -> str:
        return "".join("#" if computed else "." for computed in self.mask)


def make_plan(
    grams: np.ndarray,
    gains: Sequence[float],
    sizes: np.ndarray,
    starts: Sequence[int],
    compute: int,
) -> Plan:
    """The best mask with exactly `compute` steps, starts and the last among them.

    grams [P, T, W, W] per prompt, gains [T], sizes [P]: mean square of the final latents. starts:
    first step of each expert. Raises ValueError if there is no such mask.
    """
    each = [gram.tolist() for gram in grams]
    weights = 1 / (np.einsum("ptii->p", grams) + 1e-30)
    best: Plan | None = None
    for _ in range(ROUNDS):
        mask = shortest_path(np.tensordot(weights, grams, 1).tolist(), gains, starts, compute)
        damping: list[float] = []
        for _ in range(ROUNDS):  # the same scheme for the dampings of this mask
            damping = dampings(np.tensordot(weights, grams, 1).tolist(), mask, starts)
            errors = np.array([error_of(gram, gains, mask, damping, starts) for gram in each])
            weights = 1 / (errors + 1e-30)
        decibel = float(np.mean(10 * np.log10((errors + 1e-30) / sizes)))
        if best is not None and decibel > best.decibel - 1e-6:
            break
        best = Plan(mask, damping, decibel)
    assert best is not None
    return best


def shortest_path(
    gram: Gram, gains: Sequence[float], starts: Sequence[int], compute: int
) -> list[bool]:
    """The mask with exactly `compute` steps and the smallest sum of squared run errors.

    A state is the last two computed steps; `layers[n]` holds the cheapest way to each of them with
    n + 1 computed.
    """
    steps, window = len(gram), len(gram[0])

    @functools.cache
    def cost(anchors: Anchors, end: int) -> float:
        errors = (best_error(gram, anchors, step)[0] for step in range(anchors[0] + 1, end))
        sizes = (math.sqrt(gains[anchors[0] + 1 + i] * error) for i, error in enumerate(errors))
        return sum(sizes) ** 2

    def next_steps(anchors: Anchors) -> range:
        boundary = min((start for start in starts if start > anchors[0]), default=steps - 1)
        return range(anchors[0] + 1, min(boundary, anchors[0] + window) + 1)

    layers: list[dict[Anchors, tuple[float, Anchors]]] = [{(0,): (0.0, ())}]
    for _ in range(compute - 1):
        layer: dict[Anchors, tuple[float, Anchors]] = {}
        for anchors, (so_far, _) in layers[-1].items():
            for step in next_steps(anchors):
                after = (step,) if step in starts else (step, anchors[0])
                total = so_far + cost(anchors, step)
                if after not in layer or total < layer[after][0]:
                    layer[after] = (total, anchors)
        layers.append(layer)
    ends = {a: total for a, (total, _) in layers[-1].items() if a[0] == steps - 1}
    if not ends:
        raise ValueError(
            f"no way to compute {compute} of {steps} steps within a window of {window}"
        )
    anchors = min(ends, key=lambda a: ends[a])
    mask = [False] * steps
    for layer in reversed(layers):
        mask[anchors[0]] = True
        anchors = layer[anchors][1]
    return mask


def walk(
    mask: Sequence[bool],
    starts: Sequence[int],
    visit: Callable[[int, Anchors], None],
    *,
    reach: int = 2,
) -> None:
    """Call `visit(step, anchors)` for every skipped step, with at most `reach` anchors."""
    anchors: Anchors = ()
    for step, computed in enumerate(mask):
        if computed:
            anchors = (step,) if step in starts else (step, *anchors[: reach - 1])
        else:
            visit(step, anchors)


def dampings(gram: Gram, mask: Sequence[bool], starts: Sequence[int]) -> list[float]:
    found: list[float] = []
    walk(mask, starts, lambda step, anchors: found.append(best_error(gram, anchors, step)[1]))
    return found


def error_of(
    gram: Gram,
    gains: Sequence[float],
    mask: Sequence[bool],
    damping: Sequence[float],
    starts: Sequence[int],
) -> float:
    """Predicted mean squared error of one prompt's final latents."""
    runs: dict[Anchors, float] = {}
    left = iter(damping)

    def visit(step: int, anchors: Anchors) -> None:
        size = math.sqrt(gains[step] * error_at(gram, anchors, step, next(left)))
        runs[anchors] = runs.get(anchors, 0.0) + size

    walk(mask, starts, visit)
    return sum(size**2 for size in runs.values())


def error_at(gram: Gram, anchors: Anchors, step: int, damping: float) -> float:
    """Squared size of the guided output's error at a skipped step."""
    near, cross, far = inner_products(gram, anchors, step)
    if len(anchors) < 2:
        return near
    share = damping * (step - anchors[0]) / (anchors[0] - anchors[1])
    return max((1 + share) ** 2 * near - 2 * share * (1 + share) * cross + share**2 * far, 0.0)


def best_error(gram: Gram, anchors: Anchors, step: int) -> tuple[float, float]:
    """The smallest error at a skipped step and the damping that reaches it; 0 is hold."""
    near, cross, far = inner_products(gram, anchors, step)
    if len(anchors) < 2 or far == 0.0:
        return near, 0.0
    share = (cross - near) / max(near - 2 * cross + far, 1e-30)
    damping = share * (anchors[0] - anchors[1]) / (step - anchors[0])
    return error_at(gram, anchors, step, damping), damping


def inner_products(gram: Gram, anchors: Anchors, step: int) -> tuple[float, float, float]:
    """Of the effects of holding the newer and the older anchor's residual; zeros where the older is
    beyond the window.
    """
    inner, near = gram[step], step - 1 - anchors[0]
    far = step - 1 - anchors[1] if len(anchors) > 1 else len(inner)
    if far >= len(inner):
        return inner[near][near], 0.0, 0.0
    return inner[near][near], inner[near][far], inner[far][far]
