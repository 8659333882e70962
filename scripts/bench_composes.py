"""The step cache together with compiled blocks and weights kept elsewhere: equal results, speed-up,
bytes moved.

    python scripts/bench_composes.py                  # the embedded model; weights on disk
    python scripts/bench_composes.py --device cuda    # weights in host memory

Every way of running (eager, compiled, offloaded, both) runs without and with the cache in turns. A
skipped unit must fetch none of its weights, and a cache must gain at least what it gains in eager
mode, over the same run uncached or over the one that is not compiled either (the compiler shortens
what the cache skips); the command fails if one of them does not hold.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from rich.progress import track
from torch import Tensor

import ditcache
from ditcache.pipeline.denoise import denoise
from ditcache.pipeline.inputs import draw_inputs
from ditcache.pipeline.text import encode_text

CACHE = {"policy": "taylorseer", "every": 2, "head": 2}
WAYS = ("eager", "compiled", "offloaded", "compiled, offloaded")
PROMPT = "a red star moves left on a striped blue background"
BASES = {"compiled": "eager", "compiled, offloaded": "offloaded"}  # the same, not compiled
SLACK = 0.97  # of eager mode's gain, for the clock's sake


@dataclass
class Moved:
    """Bytes of the blocks' weights that were fetched: in all, and per forward, in order."""

    blocks: set[int] = field(default_factory=set)  # ids of modules inside blocks
    here: int = 0
    forwards: list[int] = field(default_factory=list)

    @contextmanager
    def counted(self) -> Iterator[None]:
        original, moved = ModuleGroup.onload_, self

        def onload(group: Any, *args: Any, **more: Any) -> Any:
            if any(id(module) in moved.blocks for module in group.modules):
                sizes = (p.nbytes for m in group.modules for p in m.parameters())
                moved.here += sum(sizes)
            return original(group, *args, **more)

        ModuleGroup.onload_ = onload  # type: ignore[method-assign]
        try:
            yield
        finally:
            ModuleGroup.onload_ = original  # type: ignore[method-assign]

    def forward_done(self, *args: Any) -> None:
        self.forwards.append(self.here)
        self.here = 0


@dataclass
class Run:
    """latents. seconds: of denoising. skipped, computed: bytes fetched in forwards of that kind."""

    latents: Tensor
    seconds: float
    ratio: float
    computed: list[int]
    skipped: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="tiny", help="an option of conf/model")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("bench_composes: no CUDA device here; leave --device out")
    if arguments.steps < 6 or arguments.rounds < 1:
        parser.error("--steps must be >= 6 and --rounds >= 1")
    rows = {way: measure(way, arguments) for way in track(WAYS, description="ways", transient=True)}
    print(f"{arguments.model} on {arguments.device}, {arguments.steps} steps, {CACHE}\n")
    print(markdown(rows))
    if wrong := list(faults(rows)):
        sys.exit(f"bench_composes: {'; '.join(wrong)}")


def measure(way: str, arguments: argparse.Namespace) -> dict[bool, list[Run]]:
    """Without and with the cache -> its runs, after one round to warm up."""
    bundle = ditcache.load(arguments.model, device=arguments.device)
    transformer, moved = bundle.pipe.transformer, Moved()
    moved.blocks = {id(m) for block in transformer.blocks for m in block.modules()}
    runs: dict[bool, list[Run]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder, moved.counted():
        if "compiled" in way:
            # Fetching weights is no part of a graph, so that there are breaks around it.
            whole = "offloaded" not in way
            transformer.compile_repeated_blocks(fullgraph=whole, backend=arguments.backend)
        if "offloaded" in way:
            offload(transformer, arguments.device, folder)
        handle = transformer.register_forward_hook(moved.forward_done)
        for number in range(arguments.rounds + 1):
            for cached in (False, True) if number % 2 else (True, False):
                run = one_run(bundle, arguments.steps, cached, moved)
                if number:
                    runs[cached].append(run)
        handle.remove()
    torch._dynamo.reset()
    return runs


def offload(transformer: Any, device: str, folder: str) -> None:
    """A block's weights are fetched when it runs: from the host's memory, on a CPU from disk."""
    on_disk = {"offload_to_disk_path": folder} if torch.device(device).type == "cpu" else {}
    apply_group_offloading(
        transformer,
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        **on_disk,
    )


def one_run(bundle: Any, steps: int, cached: bool, moved: Moved) -> Run:
    text = encode_text(bundle, PROMPT, negative_prompt="", guidance=4.0)
    size = {"height": bundle.model.height, "width": bundle.model.width}
    inputs = draw_inputs(bundle, text, **size, num_frames=bundle.model.num_frames, seed=0)
    cache = ditcache.enable_cache(bundle, **CACHE) if cached else None
    moved.forwards.clear()
    synchronise(bundle.device)
    started = time.perf_counter()
    latents = denoise(bundle, inputs, steps=steps, guidance=4.0)
    synchronise(bundle.device)
    seconds = time.perf_counter() - started
    decided = [d.computed for d in cache.trace.decisions] if cache else [True] * 2 * steps
    ratio = cache.trace.blocks / cache.trace.blocks_computed if cache else 1.0
    ditcache.disable_cache(bundle)
    by_kind = {kind: [b for b, d in zip(moved.forwards, decided, strict=True) if d == kind]
               for kind in (True, False)}  # fmt: skip
    return Run(latents.cpu(), seconds, ratio, by_kind[True], by_kind[False])


def synchronise(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def gain(plain: list[Run], cached: list[Run]) -> float:
    """Median over rounds of the uncached run's time over the cached run's."""
    return median(a.seconds / b.seconds for a, b in zip(plain, cached, strict=True))


def apart(one: Tensor, other: Tensor) -> float:
    """Relative L2."""
    return float((one - other).norm() / other.norm())


def markdown(rows: dict[str, dict[bool, list[Run]]]) -> str:
    lines = [
        "| way | uncached | cached | cache gains (blocks allow) | over not compiled, uncached "
        "| latents against eager "
        "| MiB per computed forward | per skipped forward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    eager = rows["eager"]
    for way, runs in rows.items():
        plain, cached = runs[False], runs[True]
        away = max(apart(runs[kind][0].latents, eager[kind][0].latents) for kind in (False, True))
        cells = [
            way,
            *(f"{median(r.seconds for r in some):.3f} s" for some in (plain, cached)),
            f"{gain(plain, cached):.2f}x ({cached[0].ratio:.2f}x)",
            f"{gain(rows[BASES.get(way, way)][False], cached):.2f}x",
            "equal" if away == 0 else f"{away:.1e} apart",
            f"{median(cached[0].computed) / 2**20:.2f}",
            f"{max(cached[0].skipped) / 2**20:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def faults(rows: dict[str, dict[bool, list[Run]]]) -> Iterator[str]:
    least = gain(rows["eager"][False], rows["eager"][True])
    for way, runs in rows.items():
        if any(b for run in runs[True] for b in run.skipped):
            yield f"{way}: a skipped forward fetched weights"
        own, both = (
            gain(runs[False], runs[True]),
            gain(rows[BASES.get(way, way)][False], runs[True]),
        )
        if max(own, both) < least * SLACK:
            yield f"{way}: the cache gains {own:.2f}x here, {least:.2f}x alone"


if __name__ == "__main__":
    main()
