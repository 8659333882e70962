"""A run's files and its final table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from ditcache.metrics.psnr import psnr, psnr_per_frame
from ditcache.metrics.ssim import ssim
from ditcache.report import pictures
from ditcache.report.run_folder import versions, write_json, write_jsonl
from ditcache.video import write_mp4, write_png

if TYPE_CHECKING:
    from ditcache.commands.generate import GenerateSettings
    from ditcache.pipeline.render import Video

PARTS = ("text", "denoise", "decode")
SHEET_VIDEOS = 8


def write_run(
    folder: Path,
    settings: GenerateSettings,
    videos: Sequence[Video],
    baselines: Sequence[Video],
    names: dict[str, str],
) -> dict[str, Any]:
    """Write videos, pictures, steps.jsonl and metrics.json into `folder`; returns the metrics.

    names: the options chosen for `model` and `cache`. baselines: the same prompts without cache, or
    nothing.
    """
    rows = [{"video": video.index, **row} for video in videos for row in video.trace.rows()]
    write_jsonl(folder / "steps.jsonl", rows)
    write_png(folder / "cache_map.png", pictures.cache_map(rows))
    entries = []
    for index, video in enumerate(videos):
        write_mp4(
            folder / f"video-{index:03d}.mp4",
            video.frames,
            fps=settings.fps,
            upscale=settings.upscale,
        )
        shown = [(label(names["cache"], video), video.frames)]
        if baselines:
            base = baselines[index]
            write_mp4(
                folder / f"baseline-{index:03d}.mp4",
                base.frames,
                fps=settings.fps,
                upscale=settings.upscale,
            )
            shown.insert(0, (label("no cache", base), base.frames))
            pair = pictures.side_by_side(video.prompt, shown, settings.upscale)
            write_mp4(folder / f"compare-{index:03d}.mp4", pair, fps=settings.fps)
        if settings.save_latents:
            save_latents(folder / f"latents-{index:03d}.safetensors", video)
        entries.append((video.prompt, shown))
    write_png(
        folder / "contact_sheet.png",
        pictures.contact_sheet(entries[:SHEET_VIDEOS], min(settings.upscale, 2)),
    )
    metrics = measure(settings, videos, baselines, names)
    write_json(folder / "metrics.json", metrics)
    return metrics


def label(name: str, video: Video) -> str:
    return f"{name}\n{video.seconds['denoise']:.2f} s denoising"


def save_latents(path: Path, video: Video) -> None:
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file({"latents": video.latents.contiguous()}, partial, metadata={"prompt": video.prompt})
    partial.replace(path)


def measure(
    settings: GenerateSettings,
    videos: Sequence[Video],
    baselines: Sequence[Video],
    names: dict[str, str],
) -> dict[str, Any]:
    """metrics.json: sums over videos, per-video entries, and against baselines quality and
    speed-up.
    """
    units = sum(len(video.trace.decisions) for video in videos)
    blocks = sum(video.trace.blocks for video in videos)
    computed = sum(video.trace.blocks_computed for video in videos)
    metrics: dict[str, Any] = {
        "schema": 1,
        "command": "generate",
        "model": names["model"],
        "cache": names["cache"],
        "seed": settings.seed,
        "steps": settings.steps,
        "prompts": [video.prompt for video in videos],
        "timing": timing(videos),
        "compute": {
            "units_total": units,
            "units_computed": sum(video.trace.computed for video in videos),
            "ratio": sum(video.trace.computed for video in videos) / units,
            "block_ratio": computed / blocks,
        },
        "state_bytes_peak": max(video.state_bytes_peak for video in videos),
        "store": videos[-1].store,
        "video": [entry(index, video) for index, video in enumerate(videos)],
        "versions": versions(),
    }
    if baselines:
        for one, video, base in zip(metrics["video"], videos, baselines, strict=True):
            one["quality"] = quality(base, video)
            one["speedup"] = {
                "denoise": speedup(base, video, ("denoise",)),
                "total": speedup(base, video, PARTS),
            }
        metrics["baseline"] = {"timing": timing(baselines)}
        metrics["quality"] = overall([one["quality"] for one in metrics["video"]])
        metrics["speedup"] = {
            "denoise": median(one["speedup"]["denoise"] for one in metrics["video"]),
            "total": median(one["speedup"]["total"] for one in metrics["video"]),
            "bound": blocks / computed,
        }
    return metrics


def timing(videos: Sequence[Video]) -> dict[str, float]:
    sums = {f"{part}_s": sum(video.seconds[part] for video in videos) for part in PARTS}
    return {**sums, "total_s": sum(sums.values())}


def entry(index: int, video: Video) -> dict[str, Any]:
    return {
        "file": f"video-{index:03d}.mp4",
        "prompt": video.prompt,
        "timing": timing([video]),
        "ratio": video.trace.computed / len(video.trace.decisions),
    }


def speedup(base: Video, video: Video, parts: tuple[str, ...]) -> float:
    return sum(base.seconds[part] for part in parts) / sum(video.seconds[part] for part in parts)


def quality(base: Video, video: Video) -> dict[str, Any]:
    """On raw float frames. `psnr` is null where `identical`: an infinite value is not a number."""
    return {
        "psnr": psnr(base.frames, video.frames),
        "ssim": ssim(base.frames, video.frames),
        "psnr_worst_frame": min(psnr_per_frame(base.frames, video.frames)),
        "identical": bool((base.frames == video.frames).all()),
    }


def overall(qualities: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the videos that differ; the worst frame and the worst video of all."""
    different = [q for q in qualities if not q["identical"]]
    return {
        "psnr": fmean(q["psnr"] for q in different) if different else None,
        "ssim": fmean(q["ssim"] for q in qualities),
        "psnr_worst_frame": min((q["psnr_worst_frame"] for q in different), default=None),
        "psnr_worst_video": min((q["psnr"] for q in different), default=None),
        "identical": not different,
    }


def print_summary(folder: Path, metrics: dict[str, Any]) -> None:
    """The final table: a row per arm, speed-up beside the computed share, quality on raw frames."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    compute, compared = metrics["compute"], "speedup" in metrics
    title = f"{metrics['model']}, {len(metrics['prompts'])} video(s), {metrics['steps']} steps"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    columns = ["cache", "denoising", "computed", "kept"]
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
    if metrics["cache"] != "none" and compute["ratio"] == 1:
        console.print(
            "the cache skipped nothing: every step was head, tail or asked for by the policy"
        )
    if compared:
        bound = metrics["speedup"]["bound"]
        console.print(
            f"computed: share of blocks run, which allows {bound:.2f}x; worst: worst frame"
        )
        console.print("PSNR and SSIM on raw frames, against the same prompt and seed without cache")
    console.print(str(folder), style="bold", highlight=False, soft_wrap=True)


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
