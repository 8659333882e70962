"""What a bridge costs at which refresh schedule, and how much of its effect that keeps.

    python scripts/bench_bridge.py                   # schedules of the shipped bridge into Wan
    python scripts/bench_bridge.py --bridge outputs/bridge-train/.../bridge.safetensors
    python scripts/bench_bridge.py --block           # projectors' shares at a 14B model's width
    python scripts/bench_bridge.py --block --tokens 12480    # ... at 480p and 8 latent frames

Effect kept: 1 - distance of the final latents to those of a source asked at every step, over the
distance of no bridge to them. Source and target are equally large here, so that cost is 1 + source
forwards / target forwards. CPU seconds are the process's own and do not see what else runs.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import ditcache
from ditcache.bridge.capture import Seen
from ditcache.bridge.data.zoo import ZooData
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.nets import Net
from ditcache.bridge.pair import Draw, Pair
from ditcache.bridge.projectors.base import Shape
from ditcache.bridge.projectors.full import Full
from ditcache.bridge.projectors.gating import Gating
from ditcache.bridge.projectors.weighted import Weighted
from ditcache.bridge.run import Bridge, Source
from ditcache.bridge.sampling import Sampling
from ditcache.bridge.saved import load_net, locate, read_header
from ditcache.store.device import DeviceStore

SCHEDULES = [
    *({"refresh_every": n} for n in (1, 2, 3, 5, 10)),
    *({"refresh_every": None, "refresh_drop": d} for d in (0.05, 0.1, 0.15, 0.2, 0.3)),
    {"window": [0.5, 1.0]},
    {"window": [0.0, 0.5]},
    {"layers": 4},
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bridge", default="zoo:chrono_to_wan")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--shift", type=float, default=3.0)
    parser.add_argument("--clips", type=int, default=8, help="of the composite domain, held out")
    parser.add_argument("--block", action="store_true", help="only the shares at 40 x 128 heads")
    parser.add_argument("--tokens", type=int, default=1024, help="for --block")
    arguments = parser.parse_args()
    if arguments.block:
        at_width(arguments.tokens)
        return
    path = locate(arguments.bridge)
    header = read_header(path)
    (target,) = header.ways[:1]
    (source,) = (side for side in header.ends if side != target)
    models = {"wan": ditcache.load("tiny_i2v"), "chrono": ditcache.load("tiny_chronoedit")}
    samples = ZooData().prepare(models, height=64, width=64, num_frames=29)
    transformers = {side: model.pipe.transformer for side, model in models.items()}
    pair = Pair(samples, transformers, target, source)
    net = load_net(path, header, target, pair.source, pair.target)
    rows = samples.rows("test", "composite")[: arguments.clips]
    sigmas = Sampling(arguments.steps, arguments.shift, guidance=1.0).sigmas
    with pair.opened():
        table = sweep(pair, net, rows, sigmas, f"{source}_to_{target}")
    table.title = (
        f"{path.stem}: {arguments.steps} steps, shift {arguments.shift:g}, {len(rows)} clips"
    )
    Console(width=130).print(table)


@torch.no_grad()
def sweep(pair: Pair, net: Net, rows: torch.Tensor, sigmas: list[float], direction: str) -> Table:
    plain, _, alone_seconds = denoised(pair, None, rows, sigmas, Fusion(fusion_direction=direction))
    table = Table()
    columns = (
        "schedule",
        "refreshes",
        "cost",
        "CPU time",
        "largest lag",
        "effect kept",
        "projector",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "schedule" else "right")
    table.add_row("no bridge", "0", "1.00x", "1.00x", "", "0 %", "")
    every = None
    for settings in SCHEDULES:
        fusion = replace(Fusion(fusion_direction=direction), **settings)
        latents, bridge, seconds = denoised(pair, net, rows, sigmas, fusion)
        every = latents if every is None else every
        kept = 1 - distance(latents, every) / distance(plain, every)
        asked = [step for step, _, _ in bridge.asked]
        steps = len(sigmas) - 1
        lags = [sigmas[max(a for a in asked if a <= s)] - sigmas[s] for s in range(asked[0], steps)]
        depth = (fusion.layers or len(net.partners)) / len(net.partners)
        table.add_row(
            fusion.schedule,
            str(len(asked)),
            f"{1 + depth * len(asked) / steps:.2f}x",
            f"{seconds / alone_seconds:.2f}x",
            f"{max(lags):.3f}" if fusion.window is None else "",
            f"{kept:.0%}",
            f"{bridge.seconds['projector'] / (bridge.seconds['total']):.1%}",
        )
    return table


def denoised(
    pair: Pair, net: Net | None, rows: torch.Tensor, sigmas: list[float], fusion: Fusion
) -> tuple[torch.Tensor, Bridge, float]:
    """Euler from noise to latents; the bridge that was at work; CPU seconds."""
    count = len(rows)
    noise = torch.randn(
        count, *pair.samples.latents.shape[1:], generator=torch.Generator().manual_seed(11)
    )
    nothing = torch.zeros(count, dtype=torch.bool)
    draw = Draw(rows, noise, torch.zeros(count), torch.zeros(count), nothing)
    told, look = pair.read("source", draw)
    text, image = pair.read("target", draw)
    sources = {} if net is None else {"source": Source(pair.source, net, {"cond": told}, look)}
    bridge = Bridge(pair.target, sources, fusion, DeviceStore())
    condition, x = pair.samples.condition[rows].float(), noise
    started, wall = time.process_time(), time.perf_counter()
    with bridge.attached({"cond": text}):
        for sigma, after in pairwise(sigmas):
            inputs = torch.cat([x, condition], 1)
            velocity = Seen(inputs, torch.full((count,), 1000 * sigma), text, image).call(
                pair.target
            )
            x = x + (after - sigma) * velocity
    bridge.seconds["total"] = time.perf_counter() - wall
    return x, bridge, time.process_time() - started


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square."""
    return float((a - b).square().mean().sqrt())


@torch.no_grad()
def at_width(tokens: int) -> None:
    """Projectors beside one block of a 14B Wan, fp32, on this machine: what a step with a fresh
    source does per layer is two blocks and one fusion.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    shape = Shape(layers=40, heads=40, head_dim=128)
    block = WanTransformerBlock(shape.width, 13824, shape.heads, cross_attn_norm=True).eval()
    specs = {"gating": Gating(), "weighted": Weighted(), "full (kronecker)": Full()}
    nets = {name: spec.make(shape, shape) for name, spec in specs.items()}
    hidden, text = torch.randn(1, tokens, shape.width), torch.randn(1, 512, shape.width)
    modulation = torch.randn(1, 6, shape.width)
    rotary = (torch.ones(1, tokens, 1, 128), torch.zeros(1, tokens, 1, 128))
    keys_values = [torch.randn(1, tokens, shape.heads, shape.head_dim) for _ in range(4)]
    two, one = tuple(keys_values[:2]), tuple(keys_values[2:])
    work = {name: partial(net, 20, two, one, torch.tensor([0.5])) for name, net in nets.items()}
    seconds = clocked({"block": partial(block, hidden, text, modulation, rotary), **work})
    table = Table(title=f"blocks of 40 x 128, {tokens} tokens: {seconds['block']:.2f} s each")
    for name in ("projector", "parameters", "CPU seconds", "share of a bridged step"):
        table.add_column(name, justify="left" if name == "projector" else "right")
    for name, net in nets.items():
        share = seconds[name] / (2 * seconds["block"] + seconds[name])
        table.add_row(name, f"{net.num_parameters:,}", f"{seconds[name]:.3f}", f"{share:.2%}")
    Console(width=130).print(table)


def clocked(work: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU seconds of each, taking turns: three, or as many as begin within a minute."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(3):
        for name, run in work.items():
            if sum(taken[name]) < 60:
                started = time.process_time()
                run()
                taken[name].append(time.process_time() - started)
    return {name: float(np.median(found)) for name, found in taken.items()}


if __name__ == "__main__":
    main()
