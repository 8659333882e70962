"""Did b reach what was asked of it?"""

from __future__ import annotations

import math
from typing import Any

from ditcache.ab.settings import GateSettings


def judge(gate: GateSettings, report: dict[str, Any]) -> dict[str, Any] | None:
    """The report's `gate`: passed, and a reason for each condition. None if nothing is asked."""
    if not gate.asked:
        return None
    row = next(row for row in report["rows"] if row["kind"] == "b")
    found = {
        "min_psnr": reached(row, "psnr", "mean"),
        "min_ssim": reached(row, "ssim", "mean"),
        "min_worst_psnr": reached(row, "psnr", "worst"),
        "min_speedup": row["speedup"]["median"],
    }
    units = {"min_psnr": " dB", "min_worst_psnr": " dB", "min_speedup": "x"}
    passed, reasons = True, []
    for name, least in vars(gate).items():
        if least is None:
            continue
        value, unit = found[name], units.get(name, "")
        good = value >= least
        passed = passed and good
        shown = "identical" if math.isinf(value) else f"{value:.4g}{unit}"
        reasons.append(f"{name}: asked {least:g}{unit}, got {shown}{'' if good else ' (missed)'}")
    return {"passed": passed, "reasons": reasons}


def reached(row: dict[str, Any], metric: str, which: str) -> float:
    """Infinite where all videos are equal; NaN, which misses every gate, where it is not known."""
    if row["identical"]:
        return math.inf if metric == "psnr" else 1.0
    return math.nan if row[metric] is None else float(row[metric][which])
