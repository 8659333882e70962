"""A report as `ditcache ab-test` writes it, with its videos: what the page's tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ditcache.metrics.psnr import psnr, psnr_per_frame
from ditcache.metrics.ssim import ssim
from ditcache.report.run_folder import finite
from ditcache.video import write_mp4

FPS, FRAMES, SIZE = 16, 17, 64
HOSTILE = "a </script><b>bold</b><!-- <img src=x onerror=alert(1)> \u2028 star | a `tick`"
PROMPTS = (
    "a red star moves to the right",
    "a large blue disc grows on a white ground while a small green square moves slowly upwards",
    HOSTILE,
    "two yellow rings turn",
)
SHIFTS = (0.6, 2.4, 1.2, 0.0)  # of B against A, in pixels; the last pair is identical
EVERY = "###..#..#..#..#..#..#..#"


def disc(shift: float, seed: int) -> np.ndarray:
    """A disc that crosses the picture -> [T, H, W, 3] in 0..1."""
    y, x = np.mgrid[:SIZE, :SIZE]
    colour = np.random.default_rng(seed).uniform(0.2, 1, 3)
    frames = []
    for t in range(FRAMES):
        cx, cy = 12 + 2.4 * t + shift * t / FRAMES, 32 + 10 * np.sin(t / 3)
        inside = np.clip(13 - np.hypot(x - cx, y - cy), 0, 1)[..., None]
        ground = (0.12 + 0.1 * y / SIZE)[..., None]
        frames.append(inside * colour + (1 - inside) * ground)
    return np.stack(frames)


def around(mean: float, width: float, worst: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - width, "high": mean + width, "worst": worst}


def row(name: str, kind: str, **more: Any) -> dict[str, Any]:
    unmeasured = dict.fromkeys(
        ("psnr", "ssim", "temporal", "flicker", "latent", "lpips", "vmaf", "obeyed")
    )
    seconds = {"text": 0.0112, "denoise": 1.94, "decode": 0.131, "write": 0.048}
    return {
        "name": name,
        "kind": kind,
        "steps": 24,
        "compute_ratio": 1.0,
        "bound": 1.0,
        "reached": None,
        "speedup": None,
        "seconds": {**seconds, "denoise": more.pop("denoise", 1.94)},
        "memory_bytes": 431_000_000,
        "state_bytes": 0,
        "identical": False,
        **unmeasured,
        **more,
    }


def rows() -> list[dict[str, Any]]:
    return [
        row("none", "a", identical=True),
        row(
            "taylorseer",
            "b",
            denoise=0.87,
            compute_ratio=2.4,
            bound=2.38,
            reached=0.937,
            speedup={"median": 2.23, "low": 2.11, "high": 2.29},
            memory_bytes=433_900_000,
            state_bytes=1_638_400,
            psnr=around(29.84, 2.1, 24.37),
            ssim=around(0.9532, 0.018, 0.9011),
            temporal=around(0.00812, 0.0011, 0.0117),
            flicker=around(0.0021, 0.0004, 0.0034),
            latent=around(0.0921, 0.012, 0.131),
        ),
        row(
            "none, 10 steps",
            "fewer_steps",
            steps=10,
            denoise=0.83,
            compute_ratio=2.4,
            bound=2.4,
            reached=0.973,
            speedup={"median": 2.34, "low": 2.31, "high": 2.36},
            psnr=around(24.11, 1.7, 20.02),
            ssim=around(0.8901, 0.03, 0.8102),
            temporal=around(0.0154, 0.002, 0.0231),
            flicker=around(0.0048, 0.0007, 0.0066),
            latent=around(0.213, 0.02, 0.291),
        ),
        row(
            "none again",
            "noise_floor",
            speedup={"median": 1.0, "low": 0.99, "high": 1.02},
            identical=True,
            ssim=around(1.0, 0.0, 1.0),
            temporal=around(0.0, 0.0, 0.0),
            flicker=around(0.0, 0.0, 0.0),
            latent=around(0.0, 0.0, 0.0),
        ),
    ]


def points() -> list[dict[str, Any]]:
    found = [
        ("taylorseer", "b", 2.23, 29.84, 0.9532, True),
        ("none, 10 steps", "fewer_steps", 2.34, 24.11, 0.8901, False),
        ("none again", "noise_floor", 1.0, None, 1.0, True),
        ("every=2", "sweep", 1.71, 34.6, 0.9791, True),
        ("every=4", "sweep", 2.71, 26.2, 0.9211, True),
        ("every=5", "sweep", 3.02, 23.4, 0.8712, True),
        ("fbcache 0.1", "sweep", 1.58, 30.9, 0.9604, False),
    ]
    keys = ("name", "kind", "speedup", "psnr", "ssim", "front")
    return [dict(zip(keys, point, strict=True)) for point in found]


def write_videos(folder: Path) -> list[dict[str, Any]]:
    """A and B of each prompt as mp4; their entries in the report."""
    entries = []
    for index, (prompt, shift) in enumerate(zip(PROMPTS, SHIFTS, strict=True)):
        a, b = disc(0.0, index), disc(shift, index)
        names = {arm: f"{arm}-{index:03d}.mp4" for arm in ("a", "b")}
        for name, frames in zip(names.values(), (a, b), strict=True):
            write_mp4(folder / name, frames, fps=FPS)
        curve = psnr_per_frame(a, b)
        entries.append(
            {
                "prompt": prompt,
                "seed": index,
                **names,
                "psnr": psnr(a, b),
                "identical": bool((a == b).all()),
                "ssim": ssim(a, b),
                "worst_frame": min(curve),
                "psnr_per_frame": [float(value) for value in curve],
                "temporal": shift * 0.0041,
                "latent": shift * 0.05,
                "speedup": 2.2 + 0.03 * index,
                "strips": {"transformer": {"cond": EVERY, "uncond": EVERY[:23] + "."}},
            }
        )
    return entries


def example(videos: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The whole dictionary; videos: those of `write_videos`."""
    return finite(
        {
            "schema": 1,
            "title": "none against taylorseer on tiny",
            "command": "ditcache ab-test model=tiny cache@a=none cache@b=taylorseer prompts=demo steps=24 seeds=[0,1,2,3]",
            "created": "2026-07-01T12:00:00+00:00",
            "model": "tiny",
            "machine": {"device": "cpu", "cpu": "a processor with 2 cores", "threads": 2},
            "versions": {"python": "3.11.7", "torch": "2.13.0", "diffusers": "0.42.1"},
            "settings": {
                "steps": 24,
                "guidance": 4.0,
                "seeds": [0, 1, 2, 3],
                "width": SIZE,
                "height": SIZE,
                "num_frames": FRAMES,
                "fps": FPS,
                "scheduler": "flow_euler",
            },
            "difference": [
                {"key": "cache.policy", "a": "null", "b": "Interval"},
                {"key": "cache.policy.every", "a": "absent", "b": "3"},
                {"key": "cache.forecaster", "a": "null", "b": "Taylor, order 1"},
            ],
            "arms": {"a": {"name": "none"}, "b": {"name": "taylorseer"}},
            "rows": rows(),
            "points": points(),
            "videos": videos or [],
            "gate": {"passed": False, "reasons": ["psnr: at least 30, got 29.84"]},
            "notes": ["LPIPS was left out: no weights were given (metrics.lpips=<file>)."],
        }
    )
