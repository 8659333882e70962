"""What can be known of a run before it starts: from the pipeline's scheduler, its experts, and the
model's calibration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ditcache.cache.policies.base import Schedule
from ditcache.cache.where import Finder
from ditcache.cli import conf_dir, options


def schedule_reader(target: Any, finder: Finder | None = None) -> Callable[[str, int], Schedule]:
    """(expert, number of steps) -> what the pipeline's scheduler says of them, if there is one."""
    pipe = getattr(target, "pipe", target)

    def read(expert: str, num_steps: int) -> Schedule:
        scheduler: Any = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        late = 0  # steps left out by a run that starts from a noised video
        if finder is not None and timesteps is not None and finder.timesteps is timesteps:
            late = finder.first
        elif getattr(scheduler, "num_inference_steps", None) != num_steps:
            return Schedule(num_steps)  # it is not this run's scheduler
        if timesteps is None or len(timesteps) - late != num_steps:
            return Schedule(num_steps)
        timesteps, sigmas = timesteps[late:].cpu(), scheduler.sigmas[late:]
        first, end = span_of(target, expert, timesteps)
        transformer = getattr(pipe, expert)
        return Schedule(
            num_steps,
            sigmas=tuple(sigmas[:num_steps].tolist()),
            first=first,
            end=end,
            embed=time_embeddings(transformer, timesteps),
        )

    return read


def span_of(target: Any, expert: str, timesteps: Tensor) -> tuple[int, int]:
    """First step of an expert and the one after its last."""
    pipe = getattr(target, "pipe", target)
    count = len(timesteps)
    if getattr(pipe, "transformer_2", None) is None or getattr(pipe, "transformer", None) is None:
        return 0, count
    share = getattr(target, "boundary", None) or pipe.config.boundary_ratio
    if share is None:
        return 0, count
    high = int((timesteps >= share * pipe.scheduler.config.num_train_timesteps).sum())
    return (0, high) if expert == "transformer" else (high, count)


def time_embeddings(
    transformer: nn.Module, timesteps: Tensor
) -> Callable[[], dict[str, Tensor]] | None:
    """A function that computes the embeddings of all timesteps, in fp32 where the weights are; None
    if the transformer has no Wan-like embedder.
    """
    embedder: Any = getattr(transformer, "condition_embedder", None)
    if not all(hasattr(embedder, n) for n in ("timesteps_proj", "time_embedder", "time_proj")):
        return None

    @torch.no_grad()
    def embed() -> dict[str, Tensor]:
        weight = embedder.time_embedder.linear_1.weight
        device = "cpu" if weight.is_meta else weight.device  # offloaded: its hook fetches both
        wave = embedder.timesteps_proj(timesteps.to(device)).to(weight.dtype)
        e = embedder.time_embedder(wave)
        e0 = embedder.time_proj(embedder.act_fn(e.to(embedder.time_proj.weight.dtype)))
        return {"e": e.float().cpu(), "e0": e0.float().cpu()}

    return embed


def calibration_of(target: Any) -> str | None:
    """The name of the calibration of a bundle's model; for a bare pipeline that of the conf/model
    option with the same checkpoint; None where nothing is known.
    """
    name = getattr(getattr(target, "model", None), "calibration", None)
    if name is None:
        pipe = getattr(target, "pipe", target)
        name = names_by_path().get(str(getattr(pipe, "config", {}).get("_name_or_path", "")))
    return name


def names_by_path() -> dict[str, str]:
    """Checkpoint -> name of its calibration, from conf/model."""
    from ditcache.models.base import ZOO

    found = {}
    for option in options("model"):
        node: Any = OmegaConf.load(conf_dir() / "model" / f"{option}.yaml")
        if node.get("calibration") is not None:
            path = str(node.path)
            found[str(ZOO / path[4:]) if path.startswith("zoo:") else path] = node.calibration
    return found
