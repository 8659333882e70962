"""One finished video -> its files and its entry in metrics.json; frames are not kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ditcache.cache.trace import Trace
from ditcache.files import complete_file
from ditcache.metrics.psnr import psnr, psnr_per_frame
from ditcache.metrics.ssim import ssim
from ditcache.report import pictures
from ditcache.video import write_mp4

if TYPE_CHECKING:
    from ditcache.commands.generate import GenerateSettings
    from ditcache.pipeline.render import Video

PARTS = ("text", "denoise", "decode")


@dataclass
class Record:
    """What is left of a video: its entry in metrics.json, its lines of steps.jsonl, its strips.

    strips: (label, a few frames [n, H, W, 3]) per arm, for the contact sheet.
    """

    entry: dict[str, Any]
    steps: list[dict[str, Any]]
    strips: list[tuple[str, np.ndarray]]


def write_video(
    folder: Path, settings: GenerateSettings, cache: str, video: Video, baseline: Video | None
) -> Record:
    """Write the mp4s (and latents, if asked) of one prompt; measure against its baseline, if any.

    cache: the option's name, for labels.
    """
    index, fps, upscale = video.index, settings.fps, settings.upscale
    entry: dict[str, Any] = {"file": f"video-{index:03d}.mp4", **facts(video)}
    write_mp4(folder / entry["file"], video.frames, fps=fps, upscale=upscale)
    arms = [(label(cache, video), video.frames)]
    if baseline is not None:
        arms.insert(0, (label("no cache", baseline), baseline.frames))
        entry["baseline_file"] = f"baseline-{index:03d}.mp4"
        write_mp4(folder / entry["baseline_file"], baseline.frames, fps=fps, upscale=upscale)
        pair = pictures.side_by_side(video.prompt, arms, upscale)
        write_mp4(folder / f"compare-{index:03d}.mp4", pair, fps=fps)
        entry["baseline"] = {"timing": timing(baseline)}
        entry["quality"] = quality(baseline.frames, video.frames)
        entry["speedup"] = {
            "denoise": speedup(baseline, video, ("denoise",)),
            "total": speedup(baseline, video, PARTS),
        }
    if settings.save_latents:
        save_latents(folder / f"latents-{index:03d}.safetensors", video)
    rows = [{"video": index, **row} for row in video.trace.rows()]
    return Record(entry, rows, [(name, pictures.sample(frames)) for name, frames in arms])


def facts(video: Video) -> dict[str, Any]:
    trace = video.trace
    return {
        "prompt": video.prompt,
        "timing": timing(video),
        "compute": {
            "units_total": len(trace.decisions),
            "units_computed": trace.computed,
            "blocks_total": trace.blocks,
            "blocks_computed": trace.blocks_computed,
        },
        "state_bytes_peak": video.state_bytes_peak,
        "store": video.store,
        **({} if len(video.segment_seconds) == 1 else {"segments": segments(video)}),
        **({"bridge": video.bridge} if video.bridge else {}),
    }


def segments(video: Video) -> list[dict[str, Any]]:
    """Per segment of a long video: seconds of denoising, and blocks, of them those computed."""
    found = []
    for number, taken in enumerate(video.segment_seconds):
        own = [d for d in video.trace.decisions if d.segment == number]
        part = Trace(own)
        found.append(
            {
                "segment": number,
                "denoise_s": taken,
                "units_total": len(own),
                "units_computed": part.computed,
                "units_warm": sum(d.reason == "warm" for d in own),
                "blocks_computed": part.blocks_computed,
            }
        )
    return found


def label(name: str, video: Video) -> str:
    return f"{name}\n{video.seconds['denoise']:.2f} s denoising"


def timing(video: Video) -> dict[str, float]:
    """Seconds per part and in total."""
    return {
        **{f"{part}_s": video.seconds[part] for part in PARTS},
        "total_s": sum(video.seconds[part] for part in PARTS),
    }


def speedup(baseline: Video, video: Video, parts: Sequence[str]) -> float:
    before, after = (sum(v.seconds[part] for part in parts) for v in (baseline, video))
    return before / after


def quality(reference: np.ndarray, candidate: np.ndarray) -> dict[str, Any]:
    """On raw float frames. Where `identical`, PSNR is infinite and written as null."""
    return {
        "psnr": psnr(reference, candidate),
        "ssim": ssim(reference, candidate),
        "psnr_worst_frame": min(psnr_per_frame(reference, candidate)),
        "identical": bool((reference == candidate).all()),
    }


def save_latents(path: Path, video: Video) -> None:
    from safetensors.torch import save_file

    with complete_file(path) as partial:
        metadata = {"prompt": video.prompt}
        save_file({"latents": video.latents.contiguous()}, partial, metadata=metadata)
