"""CARD.md of a zoo member, filled from training logs and evaluation so that no number is typed."""

import json
import platform
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ditcache.clips import judge, world

TEMPLATE = Path(__file__).with_name("card_template.md")
STAGES = ("vae", "dit", "decoder")


def text(model: Path, logs: Path, results: dict, **settings: str) -> str:
    """Markdown. logs: the training folder, one jsonl per stage. settings: what the recipe fixes."""
    curves = {stage: read_lines(logs / f"{stage}.jsonl") for stage in STAGES}
    files = [p for p in model.rglob("*") if p.suffix in (".safetensors", ".json")]
    return TEMPLATE.read_text().format(
        megabytes=f"{sum(p.stat().st_size for p in files) / 1e6:.2f}",
        side=world.HEIGHT,
        num_frames=world.NUM_FRAMES,
        num_shapes=len(world.SHAPES),
        num_colours=len(world.OBJECT_COLOURS),
        num_backgrounds=len(world.BACKGROUNDS),
        num_textures=len(world.TEXTURES),
        num_directions=len(world.DIRECTIONS),
        textured=f"{100 * results['textured']:.0f}",
        machine=platform.machine(),
        torch=torch.__version__,
        qualities=" | ".join(judge.QUALITIES),
        stages="\n".join(stage_row(stage, lines[-1]) for stage, lines in curves.items()),
        probes="\n".join(probe_row(line) for line in curves["dit"] if "shape" in line),
        captions=results["captions"],
        eval_seed=results["seed"],
        scores="\n".join(score_row(name, row) for name, row in results["scores"].items()),
        vae_psnr=f"{results['vae_psnr']:.2f}",
        vae_psnr_worst=f"{results['vae_psnr_worst']:.2f}",
        **settings,
    )


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage_row(stage: str, line: dict) -> str:
    probe = ", ".join(f"{name} {value}" for name, value in list(line.items())[3:])
    minutes = f"{line['seconds'] / 60:.0f} min"
    return f"| {stage} | {line['step']} | {minutes} | {line['loss']:.4f} | {probe} |"


def probe_row(line: dict) -> str:
    shares = " | ".join(f"{line[quality]:.2f}" for quality in judge.QUALITIES)
    return f"| {line['step']} | {line['loss']:.4f} | {shares} |"


def score_row(name: str, row: dict) -> str:
    cells = " | ".join(f"{right}/{n} ({100 * right / n:.1f} %)" for right, n in row.values())
    return f"| {name} | {cells} |"


def sample_picture(scenes: list[world.Scene], videos: np.ndarray, count: int = 4) -> np.ndarray:
    """Generated videos with their captions, five frames each, two columns."""
    from ditcache.report.pictures import captioned
    from ditcache.video import to_uint8

    blocks = []
    for scene, video in zip(scenes[:count], videos[:count], strict=True):
        frames = to_uint8(video[np.linspace(0, len(video) - 1, 5).round().astype(int)], 2)
        blocks.append(captioned(np.concatenate(list(frames), 1), scene.caption))
    height = max(block.shape[0] for block in blocks)
    padding = [((0, height - b.shape[0]), (0, 8), (0, 0)) for b in blocks]
    padded = [np.pad(b, pad, constant_values=250) for b, pad in zip(blocks, padding, strict=True)]
    rows = [np.concatenate(padded[i : i + 2], 1) for i in range(0, len(padded), 2)]
    return np.concatenate(rows, 0)


def save_picture(pixels: np.ndarray, path: Path) -> None:
    """uint8 [H, W, 3] -> PNG of 64 colours, a fifth of the bytes: it ships in the package."""
    picture = Image.fromarray(pixels)
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
