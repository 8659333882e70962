"""A run's closing files and its final table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from ditcache.report import pictures
from ditcache.report.run_folder import versions, write_json, write_jsonl
from ditcache.video import write_png

if TYPE_CHECKING:
    from ditcache.commands.generate import GenerateSettings
    from ditcache.report.record import Record

SHEET_VIDEOS = 8


def write_summary(
    folder: Path, settings: GenerateSettings, names: dict[str, str], records: Sequence[Record]
) -> dict[str, Any]:
    """Write steps.jsonl, the pictures and metrics.json; returns the metrics.

    names: the options chosen for `model` and `cache`.
    """
    rows = [row for record in records for row in record.steps]
    write_jsonl(folder / "steps.jsonl", rows)
    write_png(folder / "cache_map.png", pictures.cache_map(rows))
    sheet = [(record.entry["prompt"], record.strips) for record in records[:SHEET_VIDEOS]]
    scale = max(1, min(settings.upscale, 128 // settings.width))
    write_png(folder / "contact_sheet.png", pictures.contact_sheet(sheet, scale))
    metrics = {
        "schema": 1,
        "command": "generate",
        "model": names["model"],
        "cache": names["cache"],
        "seed": settings.seed,
        "steps": settings.steps,
        "segments": settings.segments,
        "frames": settings.total_frames,
        "prompts": [record.entry["prompt"] for record in records],
        **totals([record.entry for record in records]),
        "versions": versions(),
    }
    write_json(folder / "metrics.json", metrics)
    return metrics


def totals(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over videos; against baselines, quality and median speed-up."""
    compute = summed([entry["compute"] for entry in entries])
    compute["ratio"] = compute["units_computed"] / compute["units_total"]
    compute["block_ratio"] = compute["blocks_computed"] / compute["blocks_total"]
    result: dict[str, Any] = {
        "timing": summed([entry["timing"] for entry in entries]),
        "compute": compute,
        "state_bytes_peak": max(entry["state_bytes_peak"] for entry in entries),
        **tiers([entry["store"] for entry in entries]),
        "video": list(entries),
    }
    if all("quality" in entry for entry in entries):
        result["baseline"] = {"timing": summed([entry["baseline"]["timing"] for entry in entries])}
        result["quality"] = overall([entry["quality"] for entry in entries])
        denoise = median(entry["speedup"]["denoise"] for entry in entries)
        result["speedup"] = {
            "denoise": denoise,
            "total": median(entry["speedup"]["total"] for entry in entries),
            "bound": 1 / compute["block_ratio"],  # what the skipped blocks alone allow
            "reached": denoise * compute["block_ratio"],
        }
    return result


def tiers(stores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per tier of a store that has some: bytes at most, and sums over videos of what went wrong or
    was lost.
    """
    seen = [store["tiers"] for store in stores if store.get("tiers")]
    if not seen:
        return {}
    return {
        "tiers": {
            name: {
                "bytes_peak": max(tier[name]["bytes_peak"] for tier in seen),
                **{key: sum(tier[name][key] for tier in seen) for key in ("evictions", "faults")},
                **({"codec": seen[0][name]["codec"]} if "codec" in seen[0][name] else {}),
            }
            for name in seen[0]
        }
    }


def summed(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(part[key] for part in parts) for key in parts[0]}


def overall(qualities: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """PSNR as the mean over videos that differ, and of the worst frame and the worst video."""
    different = [q for q in qualities if not q["identical"]]
    return {
        "psnr": fmean(q["psnr"] for q in different) if different else None,
        "ssim": fmean(q["ssim"] for q in qualities),
        "psnr_worst_frame": min((q["psnr_worst_frame"] for q in different), default=None),
        "psnr_worst_video": min((q["psnr"] for q in different), default=None),
        "identical": not different,
    }


def print_summary(folder: Path, metrics: dict[str, Any]) -> None:
    """The final table: a row per arm, speed-up beside the computed share, quality."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    compute, compared = metrics["compute"], "speedup" in metrics
    title = f"{metrics['model']}, {len(metrics['prompts'])} video(s), {metrics['steps']} steps"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    columns = ["cache", "denoise", "blocks", "kept"]
    columns += ["speed-up", "PSNR", "worst", "SSIM"] if compared else []
    for column in columns:
        table.add_column(column, justify="left" if column == "cache" else "right", no_wrap=True)
    if compared:
        table.add_row("none", seconds(metrics["baseline"]), "100 %", "0 B", "1.00x", "", "", "")
    row = [metrics["cache"], seconds(metrics), f"{100 * compute['block_ratio']:.0f} %"]
    row.append(human_bytes(metrics["state_bytes_peak"]))
    if compared:
        scores = metrics["quality"]
        row += [f"{metrics['speedup']['denoise']:.2f}x", decibel(scores["psnr"])]
        row += [decibel(scores["psnr_worst_frame"]), f"{scores['ssim']:.4f}"]
    table.add_row(*row)
    console = Console()
    console.print(table)
    for entry in metrics["video"]:
        if "bridge" in entry:
            console.print(bridge_line(entry["bridge"]))
    if not metrics["cache"].startswith("none") and compute["ratio"] == 1:
        console.print("nothing was skipped: every step was head, tail or asked for by the policy")
    if compared:
        bound, reached = metrics["speedup"]["bound"], metrics["speedup"]["reached"]
        console.print(
            f"blocks: share computed, allows {bound:.2f}x ({100 * reached:.0f} % of it reached);\n"
            "kept: cache state at most; PSNR, worst frame, SSIM: raw frames against no cache"
        )
    if "tiers" in metrics:
        console.print("kept per tier: " + ", ".join(map(tier_line, metrics["tiers"].items())))
    console.print(str(folder), style="bold", highlight=False, soft_wrap=True)


def bridge_line(bridge: dict[str, Any]) -> str:
    """`bridge: every 1, 48 source forwards beside 48: 2.00x; projector 0.8 % of the time`"""
    line = (
        f"bridge: {bridge['schedule']}, {bridge['source_forwards']} source forwards beside "
        f"{bridge['target_forwards']}: {bridge['cost']:.2f}x"
    )
    share = bridge.get("projector_share")
    return line if share is None else f"{line}; projector {share:.1%} of denoising"


def tier_line(tier: tuple[str, dict[str, Any]]) -> str:
    """`disk 80 KiB (int8, 2 evictions)`"""
    name, counts = tier
    notes = [counts["codec"]] if "codec" in counts else []
    notes += [f"{counts[key]} {key}" for key in ("evictions", "faults") if counts[key]]
    held = f"{name} {human_bytes(counts['bytes_peak'])}"
    return f"{held} ({', '.join(notes)})" if notes else held


def seconds(metrics: dict[str, Any]) -> str:
    return f"{metrics['timing']['denoise_s']:.2f} s"


def decibel(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
