"""Entries of all cases -> the report's dictionary (ditcache/report/report.schema.json)."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from ditcache.ab.settings import AbTestSettings
from ditcache.metrics.bootstrap import bootstrap
from ditcache.metrics.measure import GOOD
from ditcache.report.pareto import mark_front
from ditcache.report.run_folder import command_line, finite, versions

METRICS = ("psnr", "ssim", "temporal", "flicker", "latent", "lpips", "vmaf")
NAMES = {"fewer_steps": "fewer steps", "noise_floor": "noise floor"}
KINDS = ("a", "b", *NAMES)
PARTS = ("text", "denoise", "decode", "write")
Entries = Sequence[dict[str, Any]]


def report_of(
    settings: AbTestSettings,
    cfg: DictConfig,
    names: dict[str, str],
    device: Any,
    entries: Entries,
    notes: list[str],
) -> dict[str, Any]:
    """names: the options chosen for `model`, `a` and `b`."""
    labels = {"a": names["a"], "b": names["b"], **NAMES}
    known = dict.fromkeys(arm for entry in entries for arm in entry["arms"])
    arms = ["a", "b", *(arm for arm in known if arm not in labels), *NAMES]
    rows = [row_of(arm, labels.get(arm, arm), entries) for arm in arms]
    bridged = settings.bridge is not None
    return {
        "schema": 1,
        "title": f"{names['b']} against {names['a']} on {names['model']}",
        "command": command_line("ab-test"),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": names["model"],
        "machine": machine(device),
        "versions": versions(),
        "settings": {
            "steps": settings.steps,
            "guidance": settings.guidance,
            "seeds": sorted({case.seed for case in settings.cases}),
            "width": settings.width,
            "height": settings.height,
            "num_frames": settings.total_frames,
            "segments": settings.segments,
            "fps": settings.fps,
            "shift": settings.shift,
            "prompts": len(settings.texts),
            "bridge": None if settings.bridge is None else settings.bridge.fusion.schedule,
        },
        "difference": difference_of(cfg),
        "arms": {name: {"name": names[name]} for name in ("a", "b")},
        "rows": rows,
        "points": points_of(rows, bridged=bridged),
        "videos": [video_of(entry) for entry in entries],
        "gate": None,
        "notes": notes,
    }


def row_of(arm: str, name: str, entries: Entries) -> dict[str, Any]:
    """One arm over its cases."""
    own = [entry for entry in entries if arm in entry["arms"]]
    arms = [entry["arms"][arm] for entry in own]
    seconds, blocks = [one["seconds"] for one in arms], fmean(one["blocks"] for one in arms)
    # A control's share is of the uncached run, whose blocks are a's in all.
    ratio = fmean(entry["arms"]["a"]["blocks_total"] for entry in own) / blocks
    steps = round(fmean(one["steps"] for one in arms))
    if arm == "fewer_steps" and steps > entries[0]["arms"]["a"]["steps"]:
        name = "more steps"  # a bridge's source computes blocks as well
    row: dict[str, Any] = {
        "name": name,
        "kind": arm if arm in KINDS else "control",
        "cases": len(own),
        "steps": steps,
        "compute_ratio": ratio,
        "seconds": {
            part: median(known) if (known := [s[part] for s in seconds if part in s]) else None
            for part in PARTS
        },
        "memory_bytes": max(one["memory"] for one in arms),
        "state_bytes": max(one["state"] for one in arms),
    }
    own_ratio = fmean(entry["arms"]["a"]["blocks"] for entry in own) / blocks
    row["bound"], row["speedup"], row["reached"] = own_ratio, None, None
    if arm != "a":
        gains = [speedup(entry, arm) for entry in own]
        row["speedup"] = middle(gains)
        row["reached"] = row["speedup"]["median"] / own_ratio
    qualities = [entry["quality"][arm] for entry in own] if arm != "a" else []
    row["identical"] = all(q["identical"] for q in qualities)
    for metric in METRICS:
        row[metric] = spread(metric, [q[metric] for q in qualities])
    row["obeyed"] = obeyed_in([entry for entry in own if known_to_all(entry, entries)], arm)
    row["worst_frame"] = finite(min((q["worst_frame"] for q in qualities), default=math.inf))
    return row


def known_to_all(entry: dict[str, Any], entries: Entries) -> bool:
    """Whether every arm that there is was rendered for this case, so that rows can be compared."""
    return len(entry["arms"]) == max(len(other["arms"]) for other in entries)


def obeyed_in(entries: Entries, arm: str) -> dict[str, float] | None:
    """Share of videos that show what their caption asks for."""
    told = [float(o) for e in entries if (o := e["arms"][arm]["obeyed"]) is not None]
    if not told:
        return None
    mean, low, high = bootstrap(told)
    return {"mean": mean, "low": low, "high": high, "worst": min(told)}


def speedup(entry: dict[str, Any], arm: str) -> float:
    """Of denoising one case, against a."""
    before, after = (entry["arms"][one]["seconds"]["denoise"] for one in ("a", arm))
    return before / after


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median, and the quartiles as its spread."""
    low, high = np.quantile(values, [0.25, 0.75])
    return {"median": median(values), "low": float(low), "high": float(high)}


def spread(metric: str, values: Sequence[float | None]) -> dict[str, float | None] | None:
    """Mean with its bootstrap interval over cases, and the worst case. Equal videos, whose PSNR is
    infinite, are left out of its mean; the worst case counts all.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    mean, low, high = bootstrap(known)
    worst = min(known) if GOOD[metric] == "higher" else max(known)
    return {"mean": mean, "low": low, "high": high, "worst": worst}


def points_of(rows: Sequence[dict[str, Any]], *, bridged: bool) -> list[dict[str, Any]]:
    """For the Pareto picture: everything that was measured against a. bridged: there is no front,
    as what is far from a is not worse.
    """
    points = [
        {
            "name": row["name"],
            "kind": row["kind"],
            "speedup": row["speedup"]["median"],
            "psnr": None if row["psnr"] is None else row["psnr"]["mean"],
            "ssim": None if row["ssim"] is None else row["ssim"]["mean"],
        }
        for row in rows
        if row["speedup"] is not None
    ]
    return [{**p, "front": False} for p in points] if bridged else mark_front(points)


def video_of(entry: dict[str, Any]) -> dict[str, Any]:
    quality, arm = entry["quality"]["b"], entry["arms"]["b"]
    return {
        "prompt": entry["prompt"],
        "seed": entry["seed"],
        "a": entry["files"]["a"],
        "b": entry["files"]["b"],
        "identical": quality["identical"],
        "psnr": finite(quality["psnr"]),
        "ssim": quality["ssim"],
        "worst_frame": finite(quality["worst_frame"]),
        "psnr_per_frame": finite(quality["psnr_per_frame"]),
        "temporal": quality["temporal"],
        "latent": quality["latent"],
        "speedup": speedup(entry, "b"),
        "strips": arm["strips"],
    }


def difference_of(cfg: DictConfig) -> list[dict[str, str]]:
    """Keys of the two caches that differ, as the command line would say them; null is as good as
    not there.
    """
    b = "cache" if cfg.get("b") is None else "b"
    first, second = flat(cfg.a), flat(cfg[b])
    if cfg.get("bridge") is not None:
        second |= flat(cfg.bridge, "bridge.")
    keys = sorted(first.keys() | second.keys())
    return [
        {"key": key, "a": first.get(key, "-"), "b": second.get(key, "-")}
        for key in keys
        if first.get(key, "null") != second.get(key, "null")
    ]


def flat(node: DictConfig, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in node.items():
        name = f"{prefix}{key!s}"
        if isinstance(value, DictConfig):
            found |= flat(value, f"{name}.")
        else:
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            found[name] = "null" if plain is None else str(plain)
    return found


def machine(device: Any) -> dict[str, Any]:
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "cpu": processor(), "threads": torch.get_num_threads()}


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or sys.platform
