"""What a cache costs per transformer call when it skips nothing.

    python scripts/bench_overhead.py

Every arm has its own copy of the embedded transformer, all in one process, called in turns. Blocks
are replaced by one multiplication, so that what remains beside the model's own small work is the
cache's; a second round lets the blocks take about 15 ms per call, to show what that is worth.
Overhead: an arm's call minus the uncached call of the same turn; median and quartiles.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from bench import cache_dit_arm
from bench.arms import Arm
from diffusers.hooks import HookRegistry
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import nn

import ditcache

STEPS = 24
ARMS = {
    "none": Arm("control", "none"),
    "ditcache `interval every=1`": Arm("ditcache", "", {"policy": "interval", "every": 1}),
    "ditcache `taylorseer head=24`": Arm("ditcache", "", {"policy": "taylorseer", "head": STEPS}),
    "ditcache `taylorseer max_skips=0`, residual kept": Arm(
        "ditcache", "", {"policy": "taylorseer", "head": 1, "max_skips": 0}
    ),
    "ditcache `fbcache threshold=0`": Arm("ditcache", "", {"policy": "fbcache", "threshold": 0.0}),
    "cache-dit F1B0, threshold 0": Arm(
        "cache-dit", "", {"Fn": 1, "warmup": 0, "threshold": 0.0, "steps": STEPS}
    ),
    "cache-dit F1B0, difference computed": Arm(
        "cache-dit", "", {"Fn": 1, "warmup": 0, "threshold": 1e-12, "steps": STEPS}
    ),
    "cache-dit F1B0, difference computed, TaylorSeer 1": Arm(
        "cache-dit",
        "",
        {
            "Fn": 1,
            "warmup": 0,
            "threshold": 1e-12,
            "steps": STEPS,
            "calibrator": "taylorseer1",
        },
    ),
    "diffusers FirstBlockCache": Arm(
        "diffusers", "", {"config": "FirstBlockCacheConfig", "threshold": -1.0}
    ),
}


class Block(nn.Module):
    """Takes what a Wan block takes, and about `seconds`."""

    ran = 0

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: torch.Tensor,
    ) -> torch.Tensor:
        Block.ran += 1
        until = time.perf_counter() + self.seconds
        out = hidden_states * 1.01
        while time.perf_counter() < until:
            pass
        return out


@dataclass
class Turn:
    """One arm's transformer and the function that calls it once, inside its cache context."""

    call: Callable[[int], None]
    close: Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=4000, help="turns with empty blocks")
    parser.add_argument("--slow-calls", type=int, default=240, help="turns with slow blocks")
    parser.add_argument(
        "--slow-ms", type=float, default=15.0, help="what slow blocks take together"
    )
    parser.add_argument("--profile", metavar="ARM", help="where this arm's time goes, instead")
    arguments = parser.parse_args()
    if min(arguments.calls, arguments.slow_calls) < 2:
        parser.error("needs at least two turns")
    torch.set_num_threads(1)
    transformer = ditcache.load("tiny").pipe.transformer
    if arguments.profile:
        profile(transformer, arguments.profile, arguments.calls)
        return
    empty = measure(transformer, 0.0, arguments.calls)
    slow = measure(transformer, arguments.slow_ms / 1000, arguments.slow_calls)
    print(
        f"torch {torch.__version__}, one thread, {arguments.calls} turns with empty blocks, ",
        end="",
    )
    print(f"{arguments.slow_calls} with {arguments.slow_ms:.0f} ms of blocks\n")
    print(markdown(empty, slow))


def measure(transformer: nn.Module, seconds: float, turns: int) -> dict[str, np.ndarray]:
    """Arm -> microseconds of every call, after one generation to warm up."""
    arms = {name: arm for name, arm in ARMS.items() if present(arm)}
    opened = {name: opened_turn(transformer, arm, seconds) for name, arm in arms.items()}
    times = {name: np.zeros(turns) for name in arms}
    names, warm = list(arms), 2 * STEPS
    for number in range(warm + turns):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            Block.ran = 0
            started = time.perf_counter_ns()
            opened[name].call(number)
            elapsed = time.perf_counter_ns() - started
            if Block.ran != len(transformer.blocks):
                sys.exit(f"bench_overhead: {name} skipped something")
            if number >= warm:
                times[name][number - warm] = elapsed / 1000
    for turn in opened.values():
        turn.close()
    return times


def opened_turn(transformer: nn.Module, arm: Arm, seconds: float) -> Turn:
    """A copy of the transformer with other blocks and the arm attached for good."""
    own = copy.deepcopy(transformer)
    own.blocks = nn.ModuleList(Block(seconds / len(own.blocks)) for _ in own.blocks)
    HookRegistry.check_if_exists_or_initialize(own).invalidate_child_registries_cache()
    register_block()
    attached = arm.attached(Target(own), [range(STEPS)])
    attached.__enter__()
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(1, 16, 1, 2, 2, generator=generator) for _ in range(STEPS)]
    text, timestep = torch.zeros(1, 1, own.config.text_dim), torch.tensor([500.0])

    @torch.no_grad()
    def call(number: int) -> None:
        step = number // 2 % STEPS
        branch = ("cond", "uncond")[number % 2]
        where = {"step_index": step, "sigma": 0.5, "num_inference_steps": STEPS}
        with own.cache_context(branch, **where):
            own(
                hidden_states=latents[step],
                timestep=timestep,
                encoder_hidden_states=text,
                return_dict=False,
            )

    return Turn(call, lambda: attached.__exit__(None, None, None))


class Target(SimpleNamespace):
    """What arms are put on: something with a pipe that has a transformer."""

    def __init__(self, transformer: nn.Module):
        experts = {"transformer": transformer}
        super().__init__(pipe=SimpleNamespace(**experts), experts=experts)


def register_block() -> None:
    """diffusers' caches must be told what an unknown block returns."""
    metadata = TransformerBlockMetadata(
        return_hidden_states_index=0, return_encoder_hidden_states_index=None
    )
    TransformerBlockRegistry.register(model_class=Block, metadata=metadata)


def present(arm: Arm) -> bool:
    return arm.who != "cache-dit" or cache_dit_arm.is_there()


def markdown(empty: dict[str, np.ndarray], slow: dict[str, np.ndarray]) -> str:
    lines = [
        "| arm | call, empty blocks | overhead (quartiles) | overhead, slow blocks (quartiles) "
        "| share of a slow call |",
        "|---|---|---|---|---|",
    ]
    whole = float(np.median(slow["none"]))
    for name in empty:
        cells = [name, f"{np.median(empty[name]):.0f} µs"]
        if name == "none":
            cells += ["", "", ""]
        else:
            cells += [quartiles(empty[name] - empty["none"])]
            gap = slow[name] - slow["none"]
            cells += [quartiles(gap), f"{100 * np.median(gap) / whole:.2f} %"]
        lines.append(f"| {' | '.join(cells)} |".replace("  |", " |"))
    return "\n".join(lines)


def quartiles(values: np.ndarray) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:+.0f} µs ({low:+.0f} to {high:+.0f})"


def profile(transformer: nn.Module, name: str, calls: int) -> None:
    """The caches' own functions, and torch's module lists, by their own time."""
    import cProfile
    import pstats

    if name not in ARMS:
        sys.exit(f"bench_overhead: no arm '{name}'. One of: {', '.join(ARMS)}")
    turn, profiler = opened_turn(transformer, ARMS[name], 0.0), cProfile.Profile()
    for number in range(2 * STEPS):
        turn.call(number)
    profiler.enable()
    for number in range(calls):
        turn.call(number)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(
        r"ditcache/|cache_dit/|diffusers.hooks|container", 25
    )


if __name__ == "__main__":
    main()
