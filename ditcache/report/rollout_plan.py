"""What a rollout will take, before anything is loaded: memory where it lies, floating-point
operations per chunk, time.

Counted from the shapes in conf/model. Frames are latent frames.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ditcache.errors import ConfigError
from ditcache.kv.size import kv_bytes
from ditcache.pipeline.chunks import ceiling
from ditcache.report.plan import BYTES, gib, resident

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ditcache.commands.rollout import RolloutSettings
    from ditcache.models.base import Architecture


def forward_flops(shape: Architecture, tokens: int, seen: int) -> int:
    """Of one forward over `tokens` that attend to `seen`, multiply and add counted apart."""
    d, text = shape.width, shape.text[0] + shape.image[0]
    linear = 2 * tokens * (6 * d * d + 2 * d * shape.ffn) + 4 * text * d * d
    return shape.layers * (linear + 4 * tokens * (text + seen) * d)


def chunk_flops(
    shape: Architecture, lengths: Sequence[int], unit: int, window: int | None, forwards: int
) -> list[int]:
    """Of every chunk with a cache, in `forwards` forwards each. unit: tokens of a frame."""
    found, end = [], 0
    for length in lengths:
        end += length
        seen = end if window is None else min(end, window)
        found.append(forwards * forward_flops(shape, length * unit, seen * unit))
    return found


def prefix_flops(shape: Architecture, lengths: Sequence[int], unit: int, steps: int) -> list[int]:
    """Likewise without a cache: every step runs over all frames so far, block by block causal."""
    found, end, pairs = [], 0, 0
    for length in lengths:
        end += length
        pairs += length * end
        seen = pairs * unit // end  # in the mean
        found.append(steps * forward_flops(shape, end * unit, seen))
    return found


def count(settings: RolloutSettings) -> dict[str, Any]:
    """Figures of one video; JSON-serialisable. Raises ConfigError where conf/model has no shapes.

    kv_bytes: on the device; offloaded_bytes: in the store at most. flops: with every step computed.
    """
    s, shape = settings, settings.model.architecture
    if shape is None:
        raise ConfigError("model.architecture: not given, so there is nothing to plan with")
    unit = shape.tokens(s.height, s.width, 1)
    size, branches = BYTES[s.model.dtype], 2 if s.guidance > 1 else 1
    caches, longest = branches * shape.experts, max(s.lengths)
    held = s.total if s.kv.window is None else min(s.kv.window, s.total)

    def bytes_of(frames: int, codec: str, layers: int = shape.layers) -> int:
        return caches * kv_bytes(layers, shape.heads, shape.head_dim, frames * unit, size, codec)

    window, offloaded = bytes_of(held, s.kv.codec), 0
    if s.kv.offload:
        window, offloaded = 0, window
    if s.kv.codec != "none" or s.kv.offload:
        window += bytes_of(longest, "none") + bytes_of(held, "none", layers=1)
    weights = {
        "transformer": shape.parameters * size * shape.experts,
        "text encoder": shape.text_encoder * size,
        "vae": shape.vae * BYTES[s.model.vae_dtype],
    }
    forwards = branches * (len(s.steps) + shape.experts)
    cached = chunk_flops(shape, s.lengths, unit, s.kv.window, forwards)
    prefix = prefix_flops(shape, s.lengths, unit, branches * len(s.steps))
    return {
        "frames": s.total,
        "video_frames": 4 * s.total - 3,
        "tokens_per_frame": unit,
        "weights_bytes": weights,
        "resident_bytes": resident(s.model, {**weights, "image encoder": 0}, shape),
        "activations_bytes": longest * unit * (shape.ffn + 8 * shape.width) * size,
        "kv_bytes": window,
        "offloaded_bytes": offloaded,
        "kv_bytes_per_frame": bytes_of(1, s.kv.codec),
        "forwards_per_chunk": forwards,
        "chunk_flops": cached,
        "prefix_flops": prefix,
        "video_flops": sum(cached),
        "ceiling": ceiling(len(s.steps)),
    }


def products_per_second(device: str, dtype: str) -> float:
    """Floating-point operations a second that matrix products reach here: what time is guessed
    from.
    """
    import torch

    size = 4096 if device.startswith("cuda") else 768
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        out = a @ a
        float(out[0, 0])  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def show(settings: RolloutSettings) -> None:
    """Print it as a table."""
    from rich.console import Console
    from rich.table import Table

    from ditcache.models.load import resolve_device

    found, s = count(settings), settings
    device = resolve_device(s.model)
    rate = products_per_second(device, s.model.dtype)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("model", f"{s.model.path}, {s.model.dtype}, offload {s.model.offload}")
    video = f"{found['video_frames']} frames of {s.width}x{s.height}"
    table.add_row("video", f"{video}: {len(s.lengths)} chunks, {s.total} latent frames")
    weights = ", ".join(f"{name} {gib(v)}" for name, v in found["weights_bytes"].items())
    table.add_row("weights", weights)
    resident_now = found["resident_bytes"]
    table.add_row("on the device", f"{gib(resident_now)} of weights at most")
    table.add_row("activations", f"about {gib(found['activations_bytes'])}")
    window = "everything" if s.kv.window is None else f"{s.kv.window} latent frames"
    kept = f"{window}, sink {s.kv.sink}, {s.kv.codec if s.kv.codec != 'none' else s.model.dtype}"
    table.add_row("keys and values", f"{gib(found['kv_bytes'])} on the device ({kept})")
    if found["offloaded_bytes"]:
        table.add_row("in the store", f"{gib(found['offloaded_bytes'])} at most")
    table.add_row("a latent frame", f"{gib(found['kv_bytes_per_frame'])} of keys and values")
    total = resident_now + found["activations_bytes"] + found["kv_bytes"]
    table.add_row("together", f"{gib(total)} on {device}")
    table.add_row("first chunk", chunk_line(found["chunk_flops"][0], rate, found, 0))
    table.add_row("last chunk", chunk_line(found["chunk_flops"][-1], rate, found, -1))
    flops = found["video_flops"]
    ratio = sum(found["prefix_flops"]) / flops
    table.add_row("one video", f"{peta(flops)}, {ratio:.1f}x less than recomputing the past")
    table.add_row(
        "time",
        f"at least {clock(flops / rate)} on this {device} ({rate / 1e12:.3g} TFLOP/s in matrix "
        "products), decoding not counted",
    )
    if note := s.kv.note(s.chunk):
        table.add_row("window", note)
    if s.cache.policy is not None:
        table.add_row("step cache", f"{found['ceiling']:g}x at most: (steps + 1) / 2")
    Console().print(table)


def chunk_line(flops: int, rate: float, found: dict[str, Any], which: int) -> str:
    ratio = found["prefix_flops"][which] / flops
    words = f"{ratio:.1f}x less than" if ratio >= 1 else f"{1 / ratio:.2f}x as much as"
    forwards = found["forwards_per_chunk"]
    return f"{peta(flops)} in {forwards} forwards, {words} recomputing the past"


def peta(flops: float) -> str:
    return f"{flops / 1e15:.3g} PFLOP" if flops >= 1e14 else f"{flops / 1e12:.3g} TFLOP"


def clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
