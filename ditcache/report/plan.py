"""What a run will take, before anything is loaded: weights, state, floating-point operations.

Counted from the shapes in conf/model, so that it needs neither torch nor the checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ditcache.cache.policies.base import Schedule
from ditcache.errors import ConfigError, DitcacheError

if TYPE_CHECKING:
    from ditcache.cache.settings import CacheSettings
    from ditcache.commands.generate import GenerateSettings
    from ditcache.models.base import Architecture, Model

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def count(settings: GenerateSettings) -> dict[str, Any]:
    """Figures of one video; JSON-serialisable. Raises ConfigError where conf/model has no shapes.

    flops: of one forward, multiply and add counted apart, linear layers and attention. activations:
    the widest moment of one block, roughly.
    """
    model, shape = settings.model, settings.model.architecture
    if shape is None:
        raise ConfigError("model.architecture: not given, so there is nothing to plan with")
    tokens = shape.tokens(settings.height, settings.width, settings.num_frames)
    size, branches = BYTES[model.dtype], 2 if settings.guidance > 1 else 1
    experts = ("transformer", "transformer_2")[: shape.experts]
    forward = shape.flops(tokens)
    weights = {
        "transformer": shape.parameters * size * shape.experts,
        "text encoder": shape.text_encoder * size,
        "vae": shape.vae * BYTES[model.vae_dtype],
        "image encoder": shape.image_encoder * size,
    }
    all_forwards = settings.segments * settings.steps * branches
    computed = computed_steps(settings)
    state = max(kept(settings.cache.of(name), shape, tokens, size) for name in experts)
    return {
        "tokens": tokens,
        "weights_bytes": {name: value for name, value in weights.items() if value},
        "resident_bytes": resident(model, weights, shape),
        "activations_bytes": tokens * (shape.ffn + 8 * shape.width) * size,
        "state_bytes": state * branches if settings.cache.policy is not None else 0,
        "forward_flops": forward,
        "forwards": all_forwards,
        "video_flops": forward * all_forwards,
        "computed_steps": computed,
        "compute_ratio": None if computed is None else computed / settings.steps,
    }


def resident(model: Model, weights: dict[str, int], shape: Architecture) -> int:
    """Bytes of weights on the device at once."""
    expert = weights["transformer"] // shape.experts
    others = [value for name, value in weights.items() if name != "transformer"]
    if model.offload == "model":  # one part at a time
        return max(*others, expert)
    if model.offload == "group":  # a layer, and the next one on its way
        return max(*others, expert // shape.layers * 2)
    return sum(weights.values())


def kept(cache: CacheSettings, shape: Architecture, tokens: int, size: int) -> int:
    """Bytes that one branch keeps between steps: the forecaster's tensors per unit, and the probe's
    reference.
    """
    if cache.policy is None:
        return 0
    hidden = tokens * shape.width * size
    reference = hidden if cache.policy.probe else 0
    if cache.granularity == "output":
        latents = tokens * 4 * shape.channels * 4  # 2x2 latent pixels per token, in fp32
        return cache.forecaster.tensors * latents + cache.forecaster.indicators * hidden + reference
    blocks = shape.layers - cache.policy.probe - cache.policy.back
    units = {"stack": 1, "per_block": blocks}.get(str(cache.granularity))
    if units is None:
        units = -(-blocks // int(cache.granularity))
    tensors = cache.forecaster.tensors + cache.forecaster.indicators
    return units * tensors * hidden + reference


def computed_steps(settings: GenerateSettings) -> int | None:
    """Steps per branch that a static policy computes; None where only a run can tell."""
    cache = settings.cache
    if cache.policy is None:
        return settings.steps
    limits = (cache.low, cache.cfg, cache.max_skips, cache.budget)
    shape = settings.model.architecture
    if any(limit is not None for limit in limits) or (shape is not None and shape.experts > 1):
        return None
    schedule = Schedule(settings.steps, cache.head, cache.tail, sigmas=())
    try:
        mask = cache.policy.fitted(settings.model.calibration).mask(schedule)
    except (DitcacheError, ConfigError, AssertionError):
        return None
    if mask is None:
        return None
    free = range(cache.head, settings.steps - cache.tail)
    return sum(mask[step] or step not in free for step in range(settings.steps))


def show(settings: GenerateSettings) -> None:
    """Print it as a table."""
    from rich.console import Console
    from rich.table import Table

    found, s = count(settings), settings
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    weights = ", ".join(f"{name} {gib(v)}" for name, v in found["weights_bytes"].items())
    table.add_row("model", f"{s.model.path}, {s.model.dtype}, offload {s.model.offload}")
    table.add_row(
        "video", f"{s.num_frames} frames of {s.width}x{s.height}: {found['tokens']} tokens"
    )
    table.add_row("weights", weights)
    table.add_row("on the device", f"{gib(found['resident_bytes'])} of weights at most")
    table.add_row("activations", f"about {gib(found['activations_bytes'])}")
    table.add_row("kept by the cache", f"{gib(found['state_bytes'])} ({s.cache.name})")
    table.add_row("one forward", f"{found['forward_flops'] / 1e12:.4g} TFLOPs")
    video = f"{found['video_flops'] / 1e15:.4g} PFLOPs in {found['forwards']} forwards"
    table.add_row("one video", f"{video}, without a cache")
    if found["computed_steps"] is not None and s.cache.policy is not None:
        share = f"{found['computed_steps']} of {s.steps} steps"
        ratio = 1 / found["compute_ratio"]
        table.add_row("with the cache", f"{share} computed: {ratio:.2f}x at most")
    elif s.cache.policy is not None:
        table.add_row("with the cache", "decided while it runs")
    Console().print(table)


def gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**27 else f"{value / 2**20:.2f} MiB"
