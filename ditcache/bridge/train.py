"""The training loop: students learn side by side on the same batches, the models stay frozen.

A step's data depend on (seed, step, process) alone, so that a resumed run is the same run.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ditcache.bridge.fusion import Fusion
from ditcache.bridge.pair import Draw, Pair, draw_sigma
from ditcache.bridge.students import Student
from ditcache.errors import ConfigError
from ditcache.files import complete_file


@dataclass(kw_only=True)
class Recipe:
    """How to train, in numbers. shift: of the noise levels' distribution. own_domain: where the
    model is at home; preservation: weight of staying with its own velocity there. max_lag, dropout:
    see conf/bridge_train.yaml. digest: of every setting, so that only the same run is resumed.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    shift: float
    seed: int
    preservation: float
    own_domain: str | None
    max_lag: float
    source_dropout: float
    caption_dropout: float
    save_every: int
    digest: str


@dataclass
class History:
    """Losses per step, per student: flow loss, and what staying at home costs."""

    steps: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


OnStep = Callable[[int, Mapping[str, float]], None]


def train(
    accelerator: Accelerator,
    pair: Pair,
    students: Mapping[str, Student],
    fusion: Fusion,
    recipe: Recipe,
    checkpoint: Path,
    on_step: OnStep,
) -> History:
    """Train every student in place; goes on from `checkpoint` if it is there."""
    optimisers = {
        name: torch.optim.AdamW(
            student.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        for name, student in students.items()
    }
    history, first = History(), 0
    if checkpoint.is_file():
        first = resume(checkpoint, students, optimisers, history, recipe)
    wrapped = {name: accelerator.prepare(student) for name, student in students.items()}
    started, before = time.perf_counter(), history.seconds
    for step in range(first, recipe.steps):
        draw = draw_batch(pair, recipe, step, accelerator.process_index)
        with accelerator.autocast():
            feeds = {student.feed for student in students.values()}
            outputs = any(student.mixes_outputs for student in students.values())
            batch = pair.batch(draw, feeds, outputs=outputs, fusion=fusion)
        at_home = home(pair, recipe, draw)
        losses: dict[str, float] = {}
        for name, student in students.items():
            optimiser = optimisers[name]
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * schedule(step / recipe.steps)
            with student.attached(batch, pair.target):
                with accelerator.autocast():
                    velocity = wrapped[name](batch, pair.target).float()
                flow = (velocity - batch.wanted).square().mean()
                kept = ((velocity - batch.alone).square().flatten(1).mean(1) * at_home).mean()
                accelerator.backward(flow + recipe.preservation * kept)
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses[name] = float(flow.detach())
        losses["target alone"] = float((batch.alone - batch.wanted).square().mean())
        history.steps.append(losses)
        history.seconds = before + time.perf_counter() - started
        done = step + 1
        if accelerator.is_main_process and (done % recipe.save_every == 0 or done == recipe.steps):
            save(checkpoint, students, optimisers, history, recipe)
        on_step(done, losses)
    return history


def draw_batch(pair: Pair, recipe: Recipe, step: int, process: int) -> Draw:
    """One step's clips and noise. Domains are drawn evenly, whatever their sizes."""
    generator = torch.Generator().manual_seed(
        random.Random(f"{recipe.seed} {step} {process}").getrandbits(60)
    )
    samples, count = pair.samples, recipe.batch_size

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator)

    pools = [samples.rows("train", domain) for domain in samples.domains]
    pools = [pool for pool in pools if len(pool)]
    start = int(torch.randint(len(pools), (1,), generator=generator))
    rows = torch.stack(
        [
            pool[int(torch.randint(len(pool), (1,), generator=generator))]
            for pool in (pools[(start + i) % len(pools)] for i in range(count))
        ]
    )
    noise = torch.randn(count, *samples.latents.shape[1:], generator=generator)
    sigma = draw_sigma(generator, count, recipe.shift)
    lagged = float(torch.rand(1, generator=generator)) < 0.5  # the whole batch or none of it
    lag = recipe.max_lag * uniform() if lagged else torch.zeros(count)
    uncond, present = uniform() < recipe.caption_dropout, uniform() >= recipe.source_dropout
    device = pair.device
    return Draw(rows, noise, sigma, lag, uncond, present.to(device))


def home(pair: Pair, recipe: Recipe, draw: Draw) -> Tensor:
    """[B]: 1 where the clip is of the target's own domain."""
    if recipe.own_domain is None:
        return torch.zeros(len(draw.rows), device=pair.device)
    own = pair.samples.domains.index(recipe.own_domain)
    return (pair.samples.domain[draw.rows] == own).float().to(pair.device)


def schedule(progress: float, warmup: float = 0.1) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def save(
    path: Path,
    students: Mapping[str, Student],
    optimisers: Mapping[str, Any],
    history: History,
    recipe: Recipe,
) -> None:
    state = {
        "digest": recipe.digest,
        "students": {name: student.state_dict() for name, student in students.items()},
        "optimisers": {name: optimiser.state_dict() for name, optimiser in optimisers.items()},
        "history": history.steps,
        "seconds": history.seconds,
    }
    with complete_file(path) as partial:
        torch.save(state, partial)


def resume(
    path: Path,
    students: Mapping[str, Student],
    optimisers: Mapping[str, Any],
    history: History,
    recipe: Recipe,
) -> int:
    """Steps done so far. Raises ConfigError for a checkpoint of other settings."""
    state = torch.load(path, weights_only=True)
    if state["digest"] != recipe.digest:
        raise ConfigError(f"resume: {path} was made with other settings; leave them as they were")
    for name, student in students.items():
        student.load_state_dict(state["students"][name])
        optimisers[name].load_state_dict(state["optimisers"][name])
    history.steps, history.seconds = state["history"], state["seconds"]
    return len(history.steps)
