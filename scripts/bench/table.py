"""Figures of many videos -> one row per arm -> Markdown."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np
from bench.arms import Arm
from bench.measure import IDENTICAL

HEAD = (
    "| library | setting | compute | steps | denoising | of bound | PSNR (95 % CI) | worst video "
    "| worst frame | SSIM | state |"
)


def interval(values: list[float]) -> tuple[float, float]:
    """Bootstrap 95 % confidence interval of the mean over prompts."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (10_000, len(values))).mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def summary(videos: list[dict[str, float]], all_blocks: int, kept: int | None) -> dict[str, Any]:
    """One arm over all prompts. compute: blocks of the uncached run over those run. speedup: median
    of the ratios of wall-clock time to the uncached video of the same prompt. bound: share of
    `compute` that the wall clock saw.
    """
    column = {key: [video[key] for video in videos] for key in videos[0]}
    compute = all_blocks / max(float(np.mean(column["blocks"])), 1e-9)
    low, high = interval(column["psnr"])
    return {
        "compute": compute,
        "steps": float(np.mean(column["steps"])),
        "seconds": median(column["seconds"]),
        "speedup": median(column["speedup"]),
        "bound": median(column["speedup"]) / compute,
        "psnr": float(np.mean(column["psnr"])),
        "psnr_low": low,
        "psnr_high": high,
        "worst_video": min(column["psnr"]),
        "worst_frame": min(column["worst_frame"]),
        "ssim": float(np.mean(column["ssim"])),
        "kept": kept,
    }


def markdown(rows: list[tuple[Arm, dict[str, Any]]], mark: set[str] | None = None) -> str:
    """One table; arms whose key is in `mark` get a dagger."""
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for arm, row in rows:
        dagger = " †" if mark and arm.key in mark else ""
        cells = [arm.who, f"`{arm.name}`{dagger}", f"{row['compute']:.2f}x", f"{row['steps']:.1f}"]
        cells += [f"{row['seconds']:.2f} s, {row['speedup']:.2f}x", f"{100 * row['bound']:.0f} %"]
        if row["worst_video"] < IDENTICAL:
            spread = f"{row['psnr_low']:.1f}-{row['psnr_high']:.1f}"
            cells += [f"{row['psnr']:.1f} ({spread}) dB", f"{row['worst_video']:.1f}"]
            cells += [f"{row['worst_frame']:.1f}", f"{row['ssim']:.4f}"]
        else:
            cells += ["identical", "", "", ""]
        cells.append("" if row["kept"] is None else f"{row['kept'] / 1024:.0f} KiB")
        lines.append(f"| {' | '.join(cells)} |".replace("  |", " |"))
    return "\n".join(lines)


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Mean of the paired differences over prompts, and its bootstrap 95 % interval."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    return (float(np.mean(gaps)), *interval(gaps))
