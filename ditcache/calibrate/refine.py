"""A plan made better by rendering with it.

The shortest path trusts predicted errors, one step at a time. Here the final latents judge. First
computed steps move by one as long as that helps. Then every skipped step's weights of the last
computed residuals are fitted together: rendering with each of them changed a little says where it
moves the final latents, and where all of that is linear the best change is a least-squares problem
(Gauss-Newton). So what one skip gets wrong, later ones take back, which no fit of single steps can.

Errors are means over prompts of decibels, relative to the size of the uncached latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from torch import Tensor

from ditcache.calibrate.plan import Anchors, Gram, Plan, dampings, walk

Weights: TypeAlias = list[list[float]]  # per skipped step, newest residual first
Render: TypeAlias = Callable[[list[bool], Weights], list[Tensor]]  # final latents per prompt

ROUNDS = 3  # of moves
REACH = 3  # residuals that a forecast adds up
CHANGE = 0.03  # of a weight, to see what it does
LEAST = 0.02  # decibels that a move has to gain
RIDGE = 0.01  # keeps weights near what they were where the prompts disagree
SHARES = (1.0, 0.5, 0.25)  # of the fit's change that are tried


def refine(
    plan: Plan, grams: np.ndarray, starts: Sequence[int], references: list[Tensor], render: Render
) -> Plan:
    """The plan with moved steps and fitted weights, never worse on these prompts.

    grams [P, T, W, W]: as in `make_plan`, of any prompts. references: uncached latents of those
    that `render` renders.
    """
    weights_at = 1 / (np.einsum("ptii->p", grams) + 1e-30)
    gram: Gram = np.tensordot(weights_at, grams, 1).tolist()
    seen: dict[str, float] = {}

    def error_with(mask: list[bool]) -> float:
        marks = replace(plan, mask=mask).marks
        if marks not in seen:
            lines = line_weights(mask, dampings(gram, mask, starts), starts)
            seen[marks] = decibel(render(mask, lines), references)
        return seen[marks]

    own = line_weights(plan.mask, plan.damping, starts)
    before = decibel(render(plan.mask, own), references)
    mask = moved(plan.mask, starts, error_with)
    weights, best = own, before
    if mask != plan.mask:
        weights, best = line_weights(mask, dampings(gram, mask, starts), starts), error_with(mask)
    weights, best = fitted(mask, weights, best, starts, references, render)
    return Plan(mask, [], plan.decibel, weights, (before, best))


def moved(
    mask: list[bool], starts: Sequence[int], error_with: Callable[[list[bool]], float]
) -> list[bool]:
    """Where the computed steps are after moving them by one while that helps."""
    best = error_with(mask)
    for _ in range(ROUNDS):
        tried = sorted((error_with(one), way) for way, one in neighbours(mask, starts))
        before = mask
        for error, (here, there) in tried:  # the best first; each has to help beside the others
            if error < best - LEAST and mask[here] and not mask[there]:
                one = swapped(mask, here, there)
                if error_with(one) < best - LEAST:
                    mask, best = one, error_with(one)
        if mask == before:
            break
    return mask


def neighbours(mask: list[bool], starts: Sequence[int]) -> list[tuple[tuple[int, int], list[bool]]]:
    """Masks with one computed step moved by one; experts' first steps and the last one stay."""
    fixed = {*starts, len(mask) - 1}
    ways = [
        (here, there)
        for here, computed in enumerate(mask)
        for there in (here - 1, here + 1)
        if computed and here not in fixed and not mask[there]
    ]
    return [(way, swapped(mask, *way)) for way in ways]


def swapped(mask: list[bool], here: int, there: int) -> list[bool]:
    after = list(mask)
    after[here], after[there] = after[there], after[here]
    return after


def line_weights(mask: Sequence[bool], damping: Sequence[float], starts: Sequence[int]) -> Weights:
    """The damped line as weights of as many residuals as there are, at most `REACH`."""
    found: Weights = []
    left = iter(damping)
    for step, behind in skipped(mask, starts):
        share = next(left)
        if len(behind) > 1:
            share *= (step - behind[0]) / (behind[0] - behind[1])
        else:
            share = 0.0
        found.append([1.0 + share, -share, 0.0][: len(behind)])
    return found


def skipped(mask: Sequence[bool], starts: Sequence[int]) -> list[tuple[int, Anchors]]:
    """Skipped steps, each with the computed steps behind it, newest first."""
    found: list[tuple[int, Anchors]] = []
    walk(mask, starts, lambda step, anchors: found.append((step, anchors)), reach=REACH)
    return found


def fitted(
    mask: list[bool],
    weights: Weights,
    best: float,
    starts: Sequence[int],
    references: list[Tensor],
    render: Render,
) -> tuple[Weights, float]:
    """Weights fitted to the final latents, and their error as rendered."""
    base = render(mask, weights)
    places = [(s, k) for s, row in enumerate(weights) for k in range(1, len(row))]
    if not places:
        return weights, best
    effects: list[list[np.ndarray]] = [[] for _ in base]
    for place in places:
        changed = render(mask, with_changes(weights, [place], [CHANGE]))
        for rows, latents, unchanged in zip(effects, changed, base, strict=True):
            rows.append(flat(latents - unchanged) / CHANGE)
    matrices = [np.stack(rows) for rows in effects]
    off = [flat(latents - reference) for latents, reference in zip(base, references, strict=True)]
    products = np.array([matrix @ matrix.T for matrix in matrices])
    slopes = np.array([matrix @ one for matrix, one in zip(matrices, off, strict=True)])
    change = least_squares(products, slopes, np.array([one @ one for one in off]))
    for share in SHARES:  # where it is not linear, less is more
        tried = with_changes(weights, places, list(share * change))
        error = decibel(render(mask, tried), references)
        if error < best:
            return tried, error
    return weights, best


def with_changes(
    weights: Weights, places: Sequence[tuple[int, int]], changes: Sequence[float]
) -> Weights:
    """Older residuals' weights grow by the changes, at the cost of the newest: they add up to 1."""
    after = [list(row) for row in weights]
    for (s, k), change in zip(places, changes, strict=True):
        after[s][k] += change
        after[s][0] -= change
    return after


def least_squares(products: np.ndarray, slopes: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The change x [n] that makes the mean over prompts of log(e + 2 x.s + x.A.x) smallest.

    products A [P, n, n], slopes s [P, n], errors e [P]. Each prompt weighs one over its error and
    the fit is repeated (majorise-minimise), with a ridge on what hardly matters.
    """
    x = np.zeros(slopes.shape[1])
    for _ in range(20):
        left = errors + 2 * slopes @ x + np.einsum("i,pij,j->p", x, products, x)
        weights = 1 / np.maximum(left, 1e-12 * errors + 1e-30)
        matrix = np.tensordot(weights, products, 1)
        matrix += np.diag(RIDGE * np.diag(matrix) + 1e-30)
        x = -np.linalg.solve(matrix, weights @ slopes)
    return x


def decibel(latents: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Mean over prompts of the squared error relative to the reference's size, in decibels."""
    return float(
        np.mean(
            [
                10 * np.log10(((flat(a - b) ** 2).sum() + 1e-30) / (flat(b) ** 2).sum())
                for a, b in zip(latents, references, strict=True)
            ]
        )
    )


def flat(values: Tensor) -> np.ndarray:
    return values.double().flatten().cpu().numpy()
