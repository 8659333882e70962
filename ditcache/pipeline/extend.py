"""One prompt's rollout from the command's settings: text, picture, chunks, and their frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from ditcache.errors import ConfigError
from ditcache.kv.size import kv_bytes
from ditcache.models.base import Bundle
from ditcache.pipeline.render import Clock, open_picture
from ditcache.pipeline.rollout import Chunk, Recipe, rollout
from ditcache.pipeline.stepping import check_step_cache
from ditcache.pipeline.streaming import StreamDecoder, encode_picture
from ditcache.pipeline.text import encode_text
from ditcache.store.sizes import read_size
from ditcache.store.tiered import TieredStore

if TYPE_CHECKING:
    from ditcache.commands.rollout import RolloutSettings


def recipe_of(settings: RolloutSettings) -> Recipe:
    s = settings
    return Recipe(
        lengths=tuple(s.lengths),
        timesteps=tuple(s.steps),
        guidance=s.guidance,
        guidance_low=s.guidance_low,
        kv=s.kv,
        recache=s.recache,
        context=s.context,
        context_noise=s.context_noise,
        cache=s.cache,
        seed=s.seed,
    )


def extend(
    bundle: Bundle, settings: RolloutSettings, prompt: str
) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Chunks as they are finished, each with its frames, float [T, H, W, 3] in 0..1. Decoding is
    among the chunk's seconds.
    """
    s = settings
    texts = {
        index: encode_text(bundle, text, negative_prompt=s.negative_prompt, guidance=s.guidance)
        for index, text in {0: prompt, **s.switches}.items()
    }
    start = None
    if s.picture is not None:
        start = encode_picture(bundle, open_picture(s.picture), s.height, s.width)
    decoder = StreamDecoder(bundle)
    chunks = rollout(
        bundle,
        recipe_of(s),
        texts,
        height=s.height,
        width=s.width,
        start=start,
        store=s.store,
    )
    with closing(chunks):
        for chunk in chunks:
            clock = Clock(bundle.device)
            frames = decoder.decode(chunk.latents)
            clock.lap("decode")
            chunk.seconds |= clock.seconds
            yield chunk, frames


def check_rollout(bundle: Bundle, settings: RolloutSettings) -> None:
    """What only the loaded model knows. Raises ConfigError."""
    s = settings
    if len(bundle.experts) == 1:
        for name, value in (
            ("guidance_low", s.guidance_low),
            ("model.boundary", s.model.boundary),
        ):
            if value is not None:
                raise ConfigError(f"{name}: this model has one expert; set {name}=null")
    elif bundle.boundary is None:
        raise ConfigError("model.boundary: the checkpoint does not say where its experts divide")
    config, spatial = bundle.pipe.transformer.config, bundle.pipe.vae.config.scale_factor_spatial
    table = config.rope_max_seq_len
    for name, value, unit in (
        ("height", s.height, spatial * config.patch_size[1]),
        ("width", s.width, spatial * config.patch_size[2]),
    ):
        if value > table * unit:
            raise ConfigError(
                f"{name}: this model's position tables end at {table * unit}, got {value}"
            )
    longest = s.total if s.kv.window is None else min(s.kv.window, s.total)
    if s.kv.positions == "absolute" and s.total > table:
        raise ConfigError(
            f"{'chunks' if s.frames is None else 'frames'}: this rollout has {s.total} latent "
            f"frames, the model's position table {table}; ask for less, or set "
            "kv.positions=relative, which has no limit"
        )
    if s.kv.positions == "relative" and longest > table:
        raise ConfigError(
            f"kv.window: {longest} latent frames are more than the model's position table of "
            f"{table}; set a shorter kv.window"
        )
    check_step_cache(bundle, s.cache, s.steps)
    if s.kv.offload:
        check_room(bundle, s, longest, s.height // spatial // 2 * (s.width // spatial // 2))


def check_room(bundle: Bundle, settings: RolloutSettings, frames: int, unit: int) -> None:
    """Whether the store's tiers hold what the window offloads: it must not lose any."""
    store, config = settings.store, bundle.pipe.transformer.config
    assert isinstance(store, TieredStore)
    sizes = [read_size(name, getattr(store, name)) for name in ("gpu", "cpu", "disk")]
    if None in sizes or store.remote is not None:
        return
    caches = len(bundle.experts) * (2 if settings.guidance > 1 else 1)
    size = bundle.pipe.transformer.dtype.itemsize
    heads, width = config.num_attention_heads, config.attention_head_dim
    need = caches * kv_bytes(config.num_layers, heads, width, frames * unit, size, "none")
    room = sum(size for size in sizes if size is not None)
    if need > room:
        raise ConfigError(
            f"store: its tiers hold {room / 2**20:.0f} MiB, keys and values of the window are "
            f"{need / 2**20:.0f} MiB; raise store.cpu or store.disk, or lower kv.window"
        )
