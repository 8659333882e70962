"""Benchmark of rollout: a rolling cache against recomputing the past, a ring against concatenation,
and 200 chunks in flat memory and time.

    python scripts/bench_rollout.py                       # all parts, the embedded causal model
    python scripts/bench_rollout.py speed --chunks 8      # one part
    python scripts/bench_rollout.py flat --path zoo:wan-tiny --chunks 200

Writes outputs/bench_rollout/<part>.json and pictures into --pictures. Speed is of the transformer
alone, at --size pixels, where attention weighs as it does in large models: at the embedded model's
own 64 pixels, projecting the 512 tokens of text in every forward costs more than a chunk's 48
tokens. Arms take turns. Beside the wall clock stands the process's own CPU time, for machines that
have other work.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import ditcache
from ditcache.kv.oracle import band, masked_forward
from ditcache.kv.rolling import RollingKVCache
from ditcache.kv.settings import KVSettings
from ditcache.pipeline.chunks import Noise, warped
from ditcache.pipeline.rollout import Recipe, rollout
from ditcache.pipeline.text import encode_text

PROMPT = "a red star moves left on a blue background"
OUT = Path("outputs/bench_rollout")


def rounds(count: int, *arms):
    """Per arm its results, arms in turn, the first round not counted."""
    results = [[] for _ in arms]
    for number in range(count + 1):
        for arm, kept in zip(arms, results, strict=True):
            result = arm()
            if number:
                kept.append(result)
    return results


class Stopwatch:
    """Wall-clock and CPU seconds since it was last looked at."""

    clocks = (time.perf_counter, time.process_time)

    def __init__(self):
        self.last = [clock() for clock in self.clocks]

    def lap(self) -> tuple[float, float]:
        now = [clock() for clock in self.clocks]
        self.last, before = now, self.last
        return now[0] - before[0], now[1] - before[1]


class Speed:
    """Cached, recomputed and a single forward, chunk by chunk, on the same chunks."""

    def __init__(self, bundle, chunks: int, size: int):
        self.bundle, self.lengths = bundle, [bundle.model.chunk] * chunks
        self.steps = tuple(warped(bundle.model.timesteps, bundle.model.shift))
        self.text = encode_text(bundle, PROMPT, negative_prompt="", guidance=1.0)
        self.size, self.side = {"height": size, "width": size}, size // 8

    def cached(self) -> tuple[list[tuple[float, float]], Tensor]:
        """Everything kept, so that it is the same video."""
        recipe = Recipe(tuple(self.lengths), self.steps, kv=KVSettings(window=None))
        seconds, latents, watch = [], [], Stopwatch()
        for chunk in rollout(self.bundle, recipe, {0: self.text}, **self.size):
            seconds.append(watch.lap())
            latents.append(chunk.latents)
        return seconds, torch.cat(latents, dim=2)

    @torch.no_grad()
    def recomputed(self) -> tuple[list[tuple[float, float]], Tensor]:
        """Every step over the whole video so far, under the causal mask."""
        noise = Noise(0, len(self.steps), (16, self.side, self.side))
        past, seconds, watch = [], [], Stopwatch()
        for index, length in enumerate(self.lengths):
            x = noise.draw(0, length).double()
            for step, t in enumerate(self.steps):
                velocity = self.whole(past, x, t, index)[:, :, -length:].double()
                clean = x - t / 1000 * velocity
                if step + 1 < len(self.steps):
                    s = self.steps[step + 1] / 1000
                    x = (1 - s) * clean + s * noise.draw(step + 1, length).double()
            past.append(clean)
            seconds.append(watch.lap())
        return seconds, torch.cat(past, dim=2).float()

    @torch.no_grad()
    def single(self) -> tuple[list[tuple[float, float]], None]:
        """One forward over the video so far: what a single step of the above costs."""
        seconds, past, watch = [], [], Stopwatch()
        for index, length in enumerate(self.lengths):
            x = torch.randn(1, 16, length, self.side, self.side).double()
            watch.lap()
            self.whole(past, x, 500.0, index)
            seconds.append(watch.lap())
            past.append(x)
        return seconds, None

    def whole(self, past: list[Tensor], x: Tensor, t: float, index: int) -> Tensor:
        latents = torch.cat([*past, x], dim=2).float()
        times = torch.zeros(latents.shape[2])
        times[-x.shape[2] :] = t
        mask = band(self.lengths[: index + 1], None, 0)
        transformer = self.bundle.pipe.transformer
        return masked_forward(transformer, latents, times, self.text.cond, mask)


def speed(bundle, args) -> dict:
    warm, arms = Speed(bundle, 1, args.size), Speed(bundle, args.chunks, args.size)
    warm.cached(), warm.recomputed()
    runs = [(arms.cached(), arms.recomputed(), arms.single()) for _ in range(args.rounds)]
    found = list(zip(*runs, strict=True))
    difference = float((found[0][0][1] - found[1][0][1]).abs().max())
    result: dict = {"difference": difference}
    print(f"{args.chunks} chunks of {arms.lengths[0]} latent frames, {args.size} pixels, "
          f"{args.rounds} rounds, {torch.get_num_threads()} thread(s)")  # fmt: skip
    for kind, name in enumerate(("wall", "cpu")):
        times = [[[lap[kind] for lap in run[0]] for run in arm] for arm in found]
        per_chunk = [[median(run[i] for run in arm) for i in range(args.chunks)] for arm in times]
        totals = [median(map(sum, arm)) for arm in times]
        ratios = [sum(r) / sum(c) for c, r in zip(times[0], times[1], strict=True)]
        print(f"| chunk ({name}) | cached | past recomputed | ratio | one forward over all |")
        print("|---|---|---|---|---|")
        for i, (c, r, one) in enumerate(zip(*per_chunk, strict=True)):
            print(
                f"| {i} | {1e3 * c:.0f} ms | {1e3 * r:.0f} ms | {r / c:.2f}x | {1e3 * one:.0f} ms |"
            )
        cells = f"{totals[0]:.2f} s | {totals[1]:.2f} s | {median(ratios):.2f}x | {totals[2]:.2f} s"
        print(f"| all | {cells} |")
        arms_by_name = dict(zip(("cached", "recomputed", "single"), per_chunk, strict=True))
        result[name] = {"ratio": median(ratios), "ratios": ratios, "per_chunk_s": arms_by_name}
    print(f"largest difference of latents: {difference:.1e}")
    if args.pictures:
        draw_speed(list(result["cpu"]["per_chunk_s"].values()), args.pictures / "rollout-speed.png")
    return result


class Concatenating:
    """What the ring is measured against: new tensors at every append."""

    def __init__(self, blocks: int, window: int):
        self.window, self.kept, self.overwrite = window, [None] * blocks, False

    def update(self, block: int, key: Tensor, value: Tensor):
        n = key.shape[1]
        if self.kept[block] is None:
            self.kept[block] = [key.clone(), value.clone()]
        elif self.overwrite:
            for kept, new in zip(self.kept[block], (key, value), strict=True):
                kept[:, -n:] = new
        else:
            keep = self.window - n
            pairs = zip(self.kept[block], (key, value), strict=True)
            self.kept[block] = [torch.cat([kept[:, -keep:], new], dim=1) for kept, new in pairs]
        return tuple(self.kept[block])


@torch.no_grad()
def layout(bundle, args) -> dict:
    """Handling alone, five forwards a chunk, in CPU time, in the shape of four blocks of a 1.3B
    model at a quarter of its tokens.
    """
    blocks, unit, heads, size = 4, 390, 12, 128
    new = [torch.randn(1, 3 * unit, heads, size) for _ in range(2)]

    def handle(cache, ring: bool) -> float:
        start = time.process_time()
        for _ in range(8):
            for again in range(5):
                if ring:
                    cache.enable_overwrite_mode() if again else cache.enable_append_mode()
                else:
                    cache.overwrite = bool(again)
                for block in range(blocks):
                    cache.update(block, *new)
        return (time.process_time() - start) / 8

    print("| window, sink | ring | concatenation | ratio |")
    print("|---|---|---|---|")
    rows = []
    for window, sink in ((12, 0), (12, 3), (21, 0), (21, 3)):
        ring = RollingKVCache(blocks, window * unit, sink * unit)
        plain = Concatenating(blocks, window * unit)
        handle(ring, True), handle(plain, False)  # full from here on
        one, other = rounds(
            args.rounds, lambda r=ring: handle(r, True), lambda p=plain: handle(p, False)
        )
        row = [median(one), median(other), median(b / a for a, b in zip(one, other, strict=True))]
        print(
            f"| {window}, {sink} | {1e3 * row[0]:.1f} ms | {1e3 * row[1]:.1f} ms | {row[2]:.2f}x |"
        )
        rows.append(
            {"window": window, "sink": sink, "ring_s": row[0], "cat_s": row[1], "ratio": row[2]}
        )
    return {"rows": rows}


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def flat(bundle, args) -> dict:
    """Time per chunk, decoding included, and memory over a long rollout."""
    from ditcache.pipeline.streaming import StreamDecoder

    model, count = bundle.model, args.long
    table = bundle.pipe.transformer.config.rope_max_seq_len
    positions = "absolute" if count * model.chunk <= table else "relative"
    kv = KVSettings(args.window, args.sink, positions)
    steps = tuple(warped(model.timesteps, model.shift))
    recipe = Recipe((model.chunk,) * count, steps, kv=kv)
    text = {0: encode_text(bundle, PROMPT, negative_prompt="", guidance=1.0)}
    decoder, rows, yardstick = StreamDecoder(bundle), [], Yardstick(bundle)
    watch = Stopwatch()
    for chunk in rollout(bundle, recipe, text, height=model.height, width=model.width):
        decoder.decode(chunk.latents)
        own = watch.lap()
        yardstick.forward()
        rows.append((*own, *watch.lap(), resident(), chunk.kv_bytes))
    rows = rows[:-1]  # the last chunk has no clean pass
    wall, cpu, wall_of_one, cpu_of_one, memory, kv_bytes = (
        list(column) for column in zip(*rows, strict=True)
    )
    series = {
        "wall": wall,
        "cpu": cpu,
        "wall over yardstick": [a / b for a, b in zip(wall, wall_of_one, strict=True)],
        "cpu over yardstick": [a / b for a, b in zip(cpu, cpu_of_one, strict=True)],
        "process memory": memory,
    }
    full = -(-args.window // model.chunk)
    least, most = (f(kv_bytes[full:]) / 2**20 for f in (min, max))
    print(f"{count} chunks, window {args.window}, sink {args.sink}, {positions} positions")
    print(f"keys and values: {least:.2f} to {most:.2f} MiB")
    print("| per chunk | median of chunks 20-70 | of the last 50 | drift |")
    print("|---|---|---|---|")
    result: dict = {"kv_bytes": kv_bytes, "series": series, "drift": {}}
    for name, values in series.items():
        early, late = median(values[20:70]), median(values[-50:])
        result["drift"][name] = late / early - 1
        unit, scale = ("MiB", 2**-20) if "memory" in name else ("ms", 1e3)
        if "over" in name:
            unit, scale = "x", 1.0
        cells = f"{scale * early:.4g} {unit} | {scale * late:.4g} {unit}"
        print(f"| {name} | {cells} | {100 * (late / early - 1):+.1f} % |")
    if args.pictures:
        draw_flat(wall, cpu, memory, args.pictures / "rollout-flat.png")
    return result


class Yardstick:
    """The same forward again and again, beside each chunk: tells a slower machine from a slower
    rollout.
    """

    def __init__(self, bundle):
        self.transformer = copy.deepcopy(bundle.pipe.transformer)
        self.latents = torch.zeros(1, 16, bundle.model.chunk, 8, 8)
        self.text = torch.zeros(1, 512, self.transformer.config.text_dim)

    @torch.no_grad()
    def forward(self) -> None:
        for _ in range(2):
            self.transformer(self.latents, torch.tensor([0.0]), self.text, return_dict=False)


def draw_speed(per_chunk: list[list[float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 3.6))
    for times, label in zip(
        per_chunk, ("cached", "past recomputed", "one forward over all"), strict=True
    ):
        ax.plot([1e3 * t for t in times], marker="o", label=label)
    ax.set(xlabel="chunk", ylabel="CPU time, ms", ylim=(0, None))
    ax.legend(frameon=False)
    save(fig, path)


def draw_flat(wall: list[float], cpu: list[float], memory: list[int], path: Path) -> None:
    import matplotlib.pyplot as plt

    fig, (top, below) = plt.subplots(2, 1, figsize=(7, 4.4), sharex=True)
    top.plot([1e3 * t for t in wall], lw=0.8, label="wall")
    top.plot([1e3 * t for t in cpu], lw=0.8, label="process")
    top.set(ylabel="ms per chunk", ylim=(0, 2.5 * 1e3 * median(wall)))
    top.legend(frameon=False)
    below.plot([m / 2**20 for m in memory], lw=1)
    below.set(xlabel="chunk", ylabel="process, MiB", ylim=(0, None))
    save(fig, path)


def save(fig, path: Path) -> None:
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="of speed, layout, flat; default: all")
    parser.add_argument("--path", default=None, help="another checkpoint for model=tiny_causal")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--size", type=int, default=192, help="pixels a side, of the speed part")
    parser.add_argument("--long", type=int, default=200, help="chunks of the flat part")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=int, default=9)
    parser.add_argument("--sink", type=int, default=0)
    parser.add_argument("--pictures", type=Path, default=None, help="folder for pictures")
    args = parser.parse_args()
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    bundle = ditcache.load("tiny_causal", **({"path": args.path} if args.path else {}))
    parts = {"speed": speed, "layout": layout, "flat": flat}
    unknown = set(args.parts) - set(parts)
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; one of {', '.join(parts)}")
    OUT.mkdir(parents=True, exist_ok=True)
    for name in args.parts or parts:
        print(f"## {name}")
        found = parts[name](bundle, args)
        (OUT / f"{name}.json").write_text(json.dumps(found))
        print()


if __name__ == "__main__":
    main()
