"""What every training stage shares: one or several processes, step-addressed randomness,
checkpoints, a log.

Several processes: `torchrun --nproc-per-node 2 scripts/train_zoo.py ...`. A step's data depend on
(seed, stage, step, rank) only, so a resumed run sees what an uninterrupted one would have seen.
"""

import json
import os
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from zoo.optim import MatrixAdam

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes(device: str) -> torch.device:
    """Join the process group if torchrun started several processes; one GPU or one CPU thread share
    each.
    """
    if PROCESSES > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
    return torch.device(f"cuda:{RANK}" if device == "cuda" else "cpu")


def barrier() -> None:
    """Wait until every process has come this far (rank 0 writes files the others read)."""
    if PROCESSES > 1:
        dist.barrier()


def step_rng(seed: int, stage: str, step: int) -> np.random.Generator:
    """numpy generator of one step on this process; also seeds torch, for noise drawn on the
    device.
    """
    key = [seed, zlib.crc32(stage.encode()), step, RANK]
    rng = np.random.default_rng(key)
    torch.manual_seed(int(rng.integers(2**62)))
    return rng


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    if PROCESSES == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= PROCESSES
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def fit(
    stage: str,
    model: nn.Module,
    optimiser: MatrixAdam,
    loss_of: Callable[[np.random.Generator, float], tuple[torch.Tensor, dict[str, float]]],
    *,
    steps: int,
    schedule: Callable[[float], float],
    folder: Path,
    seed: int,
    ema: nn.Module | None = None,
    ema_decay: float = 0.998,
    log_every: int = 50,
    save_every: int = 500,
    evaluate: Callable[[], dict[str, float]] | None = None,
    eval_every: int = 2000,
) -> None:
    """Run `loss_of(rng, progress)` and update until `steps`; resumes from `folder/<stage>.pt` if it
    is there.

    Writes one JSON line per `log_every` steps to `folder/<stage>.jsonl`, with the seconds spent
    over all resumptions.
    """
    checkpoint, log = folder / f"{stage}.pt", folder / f"{stage}.jsonl"
    first, before = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        first, before = state["step"], state["seconds"]
        log.write_text(
            "".join(
                x + "\n" for x in log.read_text().splitlines() if json.loads(x)["step"] <= first
            )
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    started, sums = time.perf_counter(), {}
    for step in range(first, steps):
        rng = step_rng(seed, stage, step)
        loss, parts = loss_of(rng, step / steps)
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step(schedule(step / steps))
        if ema is not None:
            decay = min(ema_decay, (step + 1) / (step + 10))
            for kept, live in zip(ema.parameters(), model.parameters(), strict=True):
                kept.data.lerp_(live.data, 1 - decay)
        for name, value in {"loss": float(loss.detach()), **parts}.items():
            sums[name] = sums.get(name, 0.0) + value
        done = step + 1
        if (done % log_every and done != steps) or RANK:
            continue
        seconds = before + time.perf_counter() - started
        count = done % log_every or log_every
        record = {
            "step": done,
            "seconds": round(seconds, 1),
            **{k: round(v / count, 5) for k, v in sums.items()},
        }
        sums = {}
        if evaluate and (done % eval_every == 0 or done == steps):
            record |= {name: round(value, 4) for name, value in evaluate().items()}
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(stage, record, flush=True)
        if done % save_every == 0 or done == steps:
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": done,
                "seconds": seconds,
            }
            save(state | ({"ema": ema.state_dict()} if ema is not None else {}), checkpoint)


def save(state: dict, path: Path) -> None:
    """torch.save that appears under its name only when complete."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
