"""How well the embedded model follows captions, read back from its decoded frames, and how well its
VAE reconstructs.

    python scripts/eval_zoo.py                          # 200 fresh captions, about three minutes on
    two cores python scripts/eval_zoo.py --captions 32 --seed 5   # other captions, other noise
    python scripts/eval_zoo.py --write-card             # also CARD.md and sample.png beside the
    weights

The judge is calibrated first: on true clips it must be right, on VAE reconstructions it shows the
ceiling.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import train_zoo
from diffusers import WanPipeline
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ditcache.clips import judge, world
from zoo import card, family, vae

GOALS = {"background": 0.98, "colour": 0.93, "direction": 0.95, "shape": 0.75, "psnr": 30.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("ditcache/zoo/wan-tiny"))
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path, default=Path("outputs/zoo"), help="for --write-card")
    parser.add_argument("--write-card", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.captions < 1 or not (arguments.model / "model_index.json").is_file():
        parser.error("needs at least one caption and a diffusers folder")

    pipe = WanPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    results, videos, scenes = evaluate(pipe, arguments.captions, arguments.seed)
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.write_card:
        card.save_picture(card.sample_picture(scenes, videos), arguments.model / "sample.png")
        words = card.text(arguments.model, arguments.logs, results, **train_zoo.recipe())
        (arguments.model / "CARD.md").write_text(words)


def evaluate(
    pipe: WanPipeline, count: int, seed: int
) -> tuple[dict, np.ndarray, list[world.Scene]]:
    """Figures as a dictionary, the generated videos [N, T, H, W, 3] and the scenes their captions
    describe.
    """
    rng = np.random.default_rng([seed, 2])
    scenes = [world.draw_scene(rng) for _ in range(count)]
    clips = np.stack([world.render(scene) for scene in scenes])
    textured = np.mean([scene.texture != "plain" for scene in scenes])
    rows = {"true clips": [judge.judge(clip / 255) for clip in clips]}
    rebuilt = [reconstruct(pipe.vae, clip) for clip in clips]
    rows["through the VAE"] = [judge.judge(frames) for frames in rebuilt]
    started, videos = time.perf_counter(), []
    for first in track(range(0, count, 8), description="generating", transient=True):
        part = [scene.caption for scene in scenes[first : first + 8]]
        videos.append(family.generate(pipe, part, seed=seed * 100_003 + first))
    videos = np.concatenate(videos)
    rows["generated"] = [judge.judge(video) for video in videos]
    errors = [np.mean((a - b / 255) ** 2) for a, b in zip(rebuilt, clips, strict=True)]
    return (
        {
            "captions": count,
            "seed": seed,
            "scores": {
                name: judge.score(list(zip(scenes, verdicts, strict=True)))
                for name, verdicts in rows.items()
            },
            "vae_psnr": float(np.mean(-10 * np.log10(errors))),
            "vae_psnr_worst": float(np.min(-10 * np.log10(errors))),
            "textured": float(textured),
            "seconds_per_video": (time.perf_counter() - started) / count,
        },
        videos,
        scenes,
    )


@torch.no_grad()
def reconstruct(autoencoder, clip: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] -> float frames in 0..1, by diffusers' own encode and decode."""
    latents = autoencoder.encode(vae.to_video(clip[None])).latent_dist.mode()
    video = autoencoder.decode(latents).sample[0]
    return (video.permute(1, 2, 3, 0).numpy() / 2 + 0.5).astype(np.float64)


def show(results: dict) -> None:
    table = Table(
        title=f"caption following, {results['captions']} fresh captions, seed {results['seed']}"
    )
    table.add_column("")
    for quality in judge.QUALITIES:
        table.add_column(quality, justify="right")
    for name, scores in results["scores"].items():
        table.add_row(name, *(f"{100 * right / asked:.1f} %" for right, asked in scores.values()))
    table.add_row("goal", *(f"{100 * GOALS[quality]:.0f} %" for quality in judge.QUALITIES))
    console = Console()
    console.print(table)
    console.print(
        f"VAE on these {results['captions']} clips: {results['vae_psnr']:.2f} dB mean, "
        f"{results['vae_psnr_worst']:.2f} dB worst (goal {GOALS['psnr']:.0f}); "
        f"{100 * results['textured']:.0f} % of the backgrounds are textured"
    )


if __name__ == "__main__":
    main()
