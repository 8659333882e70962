"""Speed, overhead and kept bytes of our caches on a Wan2.1-1.3B-shaped transformer on a GPU.

    python scripts/bench_gpu.py
    python scripts/bench_gpu.py --device cpu --tiny   # the same code on a toy shape

Weights are random (bf16, 30 layers, 12 heads of 128), so nothing is said about quality: skips are
laid out so that half of the steps compute. Latents are those of 81 frames at 480x832. Arms take
turns; CUDA events time every transformer call; medians over rounds.
"""

import argparse
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import ditcache

HALF = {"head": 1, "tail": 0}
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "interval every=1": {"policy": "interval", "every": 1},
    "fbcache threshold=0": {"policy": "fbcache", "threshold": 0.0},
    "interval every=2": {"policy": "interval", "every": 2, **HALF},
    "taylorseer every=2": {"policy": "taylorseer", "every": 2, **HALF},
    "fbcache, every other step": {"policy": "fbcache", "threshold": 1e9, "max_skips": 1, **HALF},
    "interval every=2 granularity=output": {
        "policy": "interval",
        "every": 2,
        "granularity": "output",
        **HALF,
    },
}
SHAPE = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "ffn_dim": 64}


@dataclass
class Inputs:
    latents: Tensor  # [1, 16, T, H, W]
    text: Tensor  # [1, 512, D]


class Clock:
    """Marks on the device's time line; milliseconds between two of them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        if not self.cuda:
            return 1000 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy shape")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("bench_gpu: no CUDA device here; --device cpu --tiny runs it on a toy shape")
    if arguments.steps < 2 or arguments.rounds < 1:
        parser.error("--steps must be >= 2 and --rounds >= 1")
    device = torch.device(arguments.device)
    transformer, inputs = make(device, arguments.tiny)
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(arguments.rounds + 1):
        for name, settings in ARMS.items():
            run = generation(transformer, inputs, settings, arguments.steps)
            if number:  # the first round warms up
                runs[name].append(run)
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    shape = "x".join(map(str, inputs.latents.shape))
    print(
        f"{label}, torch {torch.__version__}, {len(transformer.blocks)} layers, latents {shape}, "
    )
    print(f"{arguments.steps} steps of two branches, {arguments.rounds} rounds\n")
    print(markdown(runs))


def make(device: torch.device, tiny: bool) -> tuple[nn.Module, Inputs]:
    """A transformer with random weights, and noise and text of the right shape."""
    text_dim = 32 if tiny else 4096
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            transformer = WanTransformer3DModel(**(TINY if tiny else SHAPE), text_dim=text_dim)
            frames, height, width = (2, 8, 8) if tiny else (21, 60, 104)
            latents = torch.randn(1, 16, frames, height, width)
            text = torch.randn(1, 512, text_dim)
    finally:
        torch.set_default_dtype(default)
    return transformer.eval(), Inputs(latents, text)


@torch.no_grad()
def generation(
    transformer: nn.Module, inputs: Inputs, settings: dict[str, Any], steps: int
) -> dict[str, float]:
    """One run over all steps with an arm: milliseconds of calls, share of blocks, bytes."""
    clock = Clock(inputs.latents.device)
    cache = ditcache.enable_cache(transformer, **settings) if settings else None
    if clock.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    latents, marks = inputs.latents, []
    for index in range(steps):
        sigma = 1 - index / steps
        where = {"step_index": index, "sigma": sigma, "num_inference_steps": steps}
        timestep = torch.tensor([1000 * sigma], device=latents.device)
        for branch in ("cond", "uncond"):
            marks.append(clock.mark())
            with transformer.cache_context(branch, **where):
                velocity = transformer(latents, timestep, inputs.text, return_dict=False)[0]
            marks.append(clock.mark())
        latents = latents - velocity / steps
    calls = [clock.between(*marks[i : i + 2]) for i in range(0, len(marks), 2)]
    whole = clock.between(marks[0], marks[-1])
    decisions = cache.trace.decisions if cache else []
    skipped = [ms for ms, d in zip(calls, decisions, strict=False) if not d.computed]
    computed = [ms for ms, d in zip(calls, decisions, strict=False) if d.computed]
    result = {
        "whole": whole,
        "computed": median(computed or calls),
        "skipped": median(skipped) if skipped else float("nan"),
        "share": cache.trace.blocks_computed / cache.trace.blocks if cache else 1.0,
        "kept": cache.store.stats()["bytes_peak"] if cache else 0,
        "peak": torch.cuda.max_memory_allocated() if clock.cuda else 0,
    }
    ditcache.disable_cache(transformer)
    return result


def markdown(runs: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| arm | compute | all steps | of bound | a computed call | a skipped call | kept "
        "| peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    none = runs["none"]
    for name, rounds in runs.items():
        column = {key: median(r[key] for r in rounds) for key in rounds[0]}
        speed = median(a["whole"] / b["whole"] for a, b in zip(none, rounds, strict=True))
        extra = median(b["computed"] - a["computed"] for a, b in zip(none, rounds, strict=True))
        cells = [
            f"`{name}`",
            f"{1 / column['share']:.2f}x",
            f"{column['whole'] / 1000:.3f} s, {speed:.2f}x",
            f"{100 * speed * column['share']:.0f} %",
            f"{column['computed']:.2f} ms ({extra:+.2f})",
            "" if column["skipped"] != column["skipped"] else f"{column['skipped']:.2f} ms",
            f"{column['kept'] / 2**20:.2f} MiB",
            f"{column['peak'] / 2**30:.2f} GiB" if column["peak"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |".replace("  |", " |"))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
