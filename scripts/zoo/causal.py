"""What wan-causal-tiny learns from: long clips, and its own rollouts.

Letters: B batch, C channels, T latent frames, N tokens, L text tokens. A chunk is three latent
frames that are denoised together; each attends to itself and to the clean chunks before it, which
is what a rolling KV cache gives it later.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from ditcache.clips import world
from ditcache.kv.attach import kv_attention
from ditcache.kv.rolling import RollingKVCache
from zoo import dit

CHUNK, TRAINED, LONG = 3, 9, 18  # latent frames: of a chunk, of a training sample, of a clip
TOKENS = 16  # per latent frame
SHIFT = 3.0
LEVELS = tuple(SHIFT * u / (1 + (SHIFT - 1) * u) for u in (1.0, 0.75, 0.5, 0.25))  # of sampling
ROTARY_FRAMES = 1024
PERIOD = 76.0  # pixels until the object comes back: it enters on one side as it leaves on the other
CHANGES = {"colour": 0.5, "direction": 0.2, "shape": 0.15, "background": 0.15}


@dataclass
class LongClips:
    """Training data in memory.

    latents fp16 [N, 16, 18, 8, 8], normalised; tokens [N, 2, L]: the caption and the one after the
    switch; switch [N]: first chunk of the second caption (6: there is none).
    """

    latents: Tensor
    tokens: Tensor
    switch: Tensor


def video_frames(latent_frames: int) -> int:
    return 4 * latent_frames - 3


def draw_change(rng: np.random.Generator, scene: world.Scene) -> world.Scene:
    """The same object and place with one thing changed, and a caption that says so."""
    kind = str(rng.choice(list(CHANGES), p=list(CHANGES.values())))
    while True:  # the words that may go together are drawn there
        other = world.draw_scene(rng)
        words = {name: getattr(scene, name) for name in ("colour", "shape", "direction")}
        words |= {"background": scene.background, "texture": scene.texture}
        words[kind] = getattr(other, kind)
        if kind == "background":
            words["texture"] = other.texture
        if getattr(scene, kind) != words[kind] and words["colour"] != words["background"]:
            break
    rgb = other.colour_rgb if kind == "colour" else scene.colour_rgb
    surface = (other if kind == "background" else scene).background_rgb
    caption = world.draw_caption(rng, **words)
    if kind == "background" and "background" not in caption:
        return draw_change(rng, scene)
    return replace(scene, **words, colour_rgb=rgb, background_rgb=surface, caption=caption)


def draw_clip(
    rng: np.random.Generator, latent_frames: int, *, switch: int | None = None
) -> tuple[list[world.Scene], np.ndarray]:
    """Scenes (one, or two with a switch at that latent frame) and uint8 [T, H, W, 3]. The object
    keeps moving at its speed; what leaves on one side comes in on the other.
    """
    scenes = [world.draw_scene(rng)]
    if switch is None:
        return scenes, render_on(scenes, [video_frames(latent_frames)])
    scenes.append(draw_change(rng, scenes[0]))
    first = video_frames(switch)
    return scenes, render_on(scenes, [first, video_frames(latent_frames) - first])


def render_on(scenes: list[world.Scene], lengths: list[int]) -> np.ndarray:
    """Scenes one after another, each starting where the one before has left its object."""
    place, parts = np.array(scenes[0].start), []
    for scene, length in zip(scenes, lengths, strict=True):
        speed = np.array(world.DIRECTIONS[scene.direction]) * scene.travel / (world.NUM_FRAMES - 1)
        track = (place + speed * np.arange(length + 1)[:, None]) % PERIOD
        parts.append(world.paint(scene, *track[:-1].T.astype(np.float32), PERIOD))
        place = track[-1]
    return np.concatenate(parts)


class Twice(nn.Module):
    """Positions for a clip and, behind it, the same clip again."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        half = self.rope(latents[:, :, : latents.shape[2] // 2])
        return tuple(torch.cat([table, table], 1) for table in half)


def make_causal(base: dit.Denoiser, tokenizer) -> dit.Denoiser:
    """The base with room for longer videos in its rotary table."""
    model = dit.Denoiser(tokenizer)
    config = {name: base.transformer.config[name] for name in base.transformer.config}
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    model.transformer = WanTransformer3DModel(**config | {"rope_max_seq_len": ROTARY_FRAMES})
    model.transformer.load_state_dict(base.transformer.state_dict())
    model.text_encoder = base.text_encoder
    return model


def clean_then_noisy_mask(frames: int) -> Tensor:
    """Additive [2N, 2N] over clean tokens and, behind them, noisy ones: both see the clean chunks
    before their own, and their own chunk among their like.
    """
    chunk = torch.arange(frames * TOKENS) // (CHUNK * TOKENS)
    before, own = chunk[:, None] > chunk[None], chunk[:, None] == chunk[None]
    clean = torch.cat([before | own, torch.zeros_like(own)], 1)
    noisy = torch.cat([before, own], 1)
    return torch.where(torch.cat([clean, noisy]), 0.0, -math.inf)


def caption_bias(tokens: Tensor, padded_to: Tensor, second: Tensor) -> Tensor:
    """Additive [B, 1, N, 2 (L + 1)]: tokens [B, 2, L] of both captions; second [B, N]: which of
    them each token sees.
    """
    both = torch.stack([dit.padding_bias(tokens[:, k], padded_to)[:, 0, 0] for k in (0, 1)], 1)
    seen = F.one_hot(second.long(), 2).bool()[..., None]  # [B, N, 2, 1]
    return torch.where(seen, both[:, None], -math.inf).flatten(2)[:, None]


def causal_loss(
    model: dit.Denoiser,
    attention: dit.TrainingAttention,
    latents: Tensor,
    context: Tensor,
    states: Tensor,
    bias: Tensor,
    sigma: Tensor,
    weight: Tensor,
) -> Tensor:
    """Mean squared error of the velocity of every chunk at its own noise level, given the clean
    chunks before it.

    latents, context [B, C, T, H, W]: what to predict, what the chunks before look like. states
    [B, 2 (L + 1), D], bias [B, 1, N, 2 (L + 1)] of one copy. sigma, weight [B, chunks].
    """
    attention.bias = torch.cat([bias, bias], 2)
    noise = torch.randn_like(latents)
    per_frame = sigma.repeat_interleave(CHUNK, 1)
    level = per_frame[:, None, :, None, None]
    noisy = (1 - level) * latents + level * noise
    times = torch.cat([torch.zeros_like(per_frame), per_frame * 1000], 1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model.transformer(
            torch.cat([context, noisy], 2),
            times.repeat_interleave(TOKENS, 1),
            states,
            return_dict=False,
        )[0][:, :, latents.shape[2] :]
    error = (velocity.float() - (noise - latents)).square().mean((1, 3, 4))
    weight = weight.repeat_interleave(CHUNK, 1)
    return (error * weight).sum() / weight.sum()


@torch.no_grad()
def own_context(
    model: dit.Denoiser,
    attention: dit.TrainingAttention,
    latents: Tensor,
    states: Tensor,
    bias: Tensor,
    first_level: int,
) -> Tensor:
    """The clip [B, C, T, H, W] as the model itself would have made it: a rollout with its KV cache
    in which every chunk starts from LEVELS[first_level] of the true one, so that errors pile up as
    they do in a free rollout, but near the true clip. attention: of the model's cross-attention.
    """
    made = []
    with kv_attention(model.transformer, RollingKVCache(len(model.transformer.blocks))) as kv:
        for start in range(0, latents.shape[2] - CHUNK, CHUNK):  # nothing attends to the last one
            attention.bias = bias[:, :, start * TOKENS : (start + CHUNK) * TOKENS]
            true = latents[:, :, start : start + CHUNK]
            level = LEVELS[first_level]
            noisy = (1 - level) * true + level * torch.randn_like(true)
            kv.cache.enable_append_mode()
            for index in range(first_level, len(LEVELS)):
                clean = noisy - LEVELS[index] * velocity_of(model, noisy, LEVELS[index], states)
                kv.cache.enable_overwrite_mode()
                if index + 1 < len(LEVELS):
                    level = LEVELS[index + 1]
                    noisy = (1 - level) * clean + level * torch.randn_like(clean)
            velocity_of(model, clean, 0.0, states)  # clean keys and values for the chunks to come
            made.append(clean)
    return torch.cat([*made, latents[:, :, -CHUNK:]], 2)


def velocity_of(model: dit.Denoiser, latents: Tensor, sigma: float, states: Tensor) -> Tensor:
    times = torch.full((len(latents),), sigma * 1000)
    with torch.autocast("cpu", torch.bfloat16):
        return model.transformer(latents, times, states, return_dict=False)[0].float()
