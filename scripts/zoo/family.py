"""Puts trained parts together as an ordinary diffusers pipeline, in memory or as the folder that
ships.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from transformers import PreTrainedTokenizerFast

from ditcache.clips import judge, world
from zoo.dit import Denoiser

STEPS, GUIDANCE, FLOW_SHIFT = 24, 4.0, 3.0


def make_pipeline(
    denoiser: Denoiser, vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerFast
) -> WanPipeline:
    """The settings of the published Wan2.1 pipelines: UniPC on flow sigmas, shift 3 for small
    frames.
    """
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=denoiser.text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=denoiser.transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: WanPipeline, captions: list[str], *, seed: int, batch: int = 8) -> np.ndarray:
    """Videos float [N, T, H, W, 3] in 0..1, one generator per caption."""
    videos = []
    for first in range(0, len(captions), batch):
        part = captions[first : first + batch]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        videos.append(
            pipe(
                part,
                height=world.HEIGHT,
                width=world.WIDTH,
                num_frames=world.NUM_FRAMES,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=generators,
                output_type="np",
            ).frames
        )
    return np.concatenate(videos)


def caption_following(pipe: WanPipeline, *, seed: int, count: int) -> dict[str, float]:
    """Share of fresh captions obeyed, per quality."""
    rng = np.random.default_rng([seed, 1])
    scenes = [world.draw_scene(rng) for _ in range(count)]
    videos = generate(pipe, [scene.caption for scene in scenes], seed=seed)
    scores = judge.score([(s, judge.judge(v)) for s, v in zip(scenes, videos, strict=True)])
    return {quality: right / asked for quality, (right, asked) in scores.items()}


def export(pipe: WanPipeline, folder: Path) -> int:
    """Write the diffusers folder: transformer and VAE as fp16, the text encoder as fp32. Returns
    bytes.

    fp32 for the text encoder because transformers loads a checkpoint in its stored dtype unless
    told otherwise.
    """
    pipe.transformer.half()
    pipe.vae.half()
    pipe.text_encoder.float()
    pipe.save_pretrained(folder, safe_serialization=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
