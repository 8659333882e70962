"""Compute ratio against PSNR, one point per arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench.arms import Arm
from bench.measure import IDENTICAL

from ditcache.report.pareto import front

LOOKS = {  # who: marker, colour, label
    "ditcache": ("o", "#1f6feb", "ditcache"),
    "diffusers": ("s", "#d9730d", "diffusers hooks"),
    "cache-dit": ("^", "#2da44e", "cache-dit"),
    "control": ("x", "#57606a", "fewer steps, no cache"),
}


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates, by rising first one."""
    return sorted(front(points), key=lambda i: points[i])


def draw(rows: list[tuple[Arm, dict[str, Any]]], path: Path) -> None:
    rows = [
        (arm, row)
        for arm, row in rows
        if row["worst_video"] < IDENTICAL and "moved" not in arm.settings
    ]
    figure, axes = plt.subplots(figsize=(8, 5.5))
    for who, (marker, colour, label) in LOOKS.items():
        points = [(row["compute"], row["psnr"]) for arm, row in rows if arm.who == who]
        if points:
            axes.scatter(
                *zip(*points, strict=True), s=36, c=colour, marker=marker, label=label, zorder=3
            )
    own = [(arm, row) for arm, row in rows if arm.who == "ditcache"]
    best = pareto([(row["compute"], row["psnr"]) for _, row in own])
    line = [(own[i][1]["compute"], own[i][1]["psnr"]) for i in best]
    if line:
        axes.plot(*zip(*line, strict=True), color=LOOKS["ditcache"][1], lw=1, zorder=2)
    for i in best:
        place = (own[i][1]["compute"], own[i][1]["psnr"])
        axes.annotate(
            own[i][0].method, place, (4, 4), textcoords="offset points", fontsize=7, color="#24292f"
        )
    axes.set_xlabel("compute ratio: blocks of the uncached run / blocks run")
    axes.set_ylabel("mean PSNR against the uncached video, dB")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
