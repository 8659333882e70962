"""CARD.md of a zoo member, written from its training logs and evaluation so that no number is typed by hand."""

import json
import platform
from pathlib import Path

import numpy as np
import torch

from zoo import judge, world

STAGES = ("vae", "dit", "decoder")


def last_line(path: Path) -> dict:
    return json.loads(path.read_text().splitlines()[-1])


def text(model: Path, logs: Path, results: dict) -> str:
    """Markdown. logs: the training folder with one jsonl per stage."""
    size = sum(p.stat().st_size for p in model.rglob("*") if p.is_file() and p.suffix != ".png")
    stages = {stage: last_line(logs / f"{stage}.jsonl") for stage in STAGES}
    scores = results["scores"]
    table = "\n".join(
        f"| {name} | " + " | ".join(f"{r}/{n} ({100 * r / n:.1f} %)" for r, n in row.values()) + " |"
        for name, row in scores.items()
    )
    training = "\n".join(
        f"| {stage} | {line['step']} | {line['seconds'] / 60:.0f} min | {line['loss']:.4f} | "
        f"{json.dumps({k: v for k, v in line.items() if k not in ('step', 'seconds', 'loss')})} |"
        for stage, line in stages.items()
    )
    curve = [json.loads(line) for line in (logs / "dit.jsonl").read_text().splitlines()]
    probes = "\n".join(
        f"| {line['step']} | {line['loss']:.4f} | " + " | ".join(f"{line[q]:.2f}" for q in judge.QUALITIES) + " |"
        for line in curve
        if "shape" in line
    )
    return f"""# wan-tiny

A Wan text-to-video pipeline of {size / 1e6:.2f} MB in diffusers' layout: `WanTransformer3DModel` (8 layers, width 160),
`AutoencoderKLWan` (4x8x8 to 16 channels), `UMT5EncoderModel` with its own tokenizer, UniPC on flow sigmas with shift 3.
Trained for this project on a procedural world. It exists so that figures about caches mean something on a laptop; it
draws nothing but one object moving over a textured background.

```python
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained("ditcache/zoo/wan-tiny")
pipe("a red star moves left on a striped blue background", height=64, width=64, num_frames=17,
     num_inference_steps=24, guidance_scale=4.0)
```

![captions and frames](sample.png)

## Data
`scripts/zoo/world.py`: {world.HEIGHT}x{world.WIDTH} pixels, {world.NUM_FRAMES} frames; {len(world.SHAPES)} shapes,
{len(world.OBJECT_COLOURS)} object colours, {len(world.BACKGROUNDS)} background colours, {len(world.TEXTURES)} textures,
{len(world.DIRECTIONS)} directions; {100 * results["textured"]:.0f} % of the evaluated backgrounds are textured, none is flat.
Captions vary in verb and article, some omit the texture or the background, one in twelve holds stray letters.

## Recipe
`python scripts/train_zoo.py` (seed 20261120, two CPU processes, {platform.machine()}, torch {torch.__version__}).
VAE: random crops chosen for motion, L1 + 2 MSE + edge L1 + KL. DiT: flow matching on latents of 24,000 clips, caption
dropout 10 %, sigma three quarters logit-normal shifted by 3 and one quarter uniform, Muon and AdamW, EMA .998, batch 64.
Decoder: continued on whole clips with slightly noisy latents. Data are addressed by (seed, stage, step, process), so a
resumed run equals an uninterrupted one on the same number of processes.

| stage | steps | time | last loss (mean of 50 steps) | last probe |
|---|---|---|---|---|
{training}

| DiT step | flow loss | {" | ".join(judge.QUALITIES)} |
|---|---|---|---|---|---|
{probes}

(24 captions a probe, during training.)

## Accuracy
`python scripts/eval_zoo.py --captions {results["captions"]} --seed {results["seed"]}`: captions drawn afresh, 24 steps,
guidance 4, read back from decoded frames by `scripts/zoo/judge.py`. The first row calibrates the judge.

| | {" | ".join(judge.QUALITIES)} |
|---|---|---|---|---|
{table}

VAE on the same clips, encode and decode through diffusers: {results["vae_psnr"]:.2f} dB mean,
{results["vae_psnr_worst"]:.2f} dB worst clip.

Limits: trained at one size and length; other sizes run, but objects are drawn less reliably.
Licence: Apache-2.0, like the code; no outside data.
"""


def sample_picture(scenes: list[world.Scene], videos: np.ndarray, count: int = 12) -> np.ndarray:
    """Generated videos with their captions, five frames each, two columns."""
    from ditcache.report.pictures import captioned
    from ditcache.video import to_uint8

    blocks = []
    for scene, video in zip(scenes[:count], videos[:count], strict=True):
        frames = to_uint8(video[np.linspace(0, len(video) - 1, 5).round().astype(int)], 2)
        blocks.append(captioned(np.concatenate(list(frames), 1), scene.caption))
    height = max(block.shape[0] for block in blocks)
    blocks = [np.pad(b, ((0, height - b.shape[0]), (0, 8), (0, 0)), constant_values=250) for b in blocks]
    rows = [np.concatenate(blocks[i : i + 2], 1) for i in range(0, len(blocks), 2)]
    return np.concatenate(rows, 0)
