"""Which settings no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the points that none beats in both coordinates (higher is better)."""
    found, best = set(), -float("inf")
    for index in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        if points[index][1] > best:
            found.add(index)
            best = points[index][1]
    return found


def mark_front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set `front` on the points of a report: by speed-up and PSNR, equal videos being best. The
    noise floor is no setting and never on it.
    """
    for point in points:
        point["front"] = False
    real = [point for point in points if point["kind"] != "noise_floor"]
    best = front([(p["speedup"], float("inf") if p["psnr"] is None else p["psnr"]) for p in real])
    for index, point in enumerate(real):
        point["front"] = index in best
    return points
