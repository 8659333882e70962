"""What tiers cost and what prefetch gains.

    python scripts/bench_store.py                 # all tables, about ten minutes
    python scripts/bench_store.py --only prefetch --rounds 7
    python scripts/bench_store.py --out docs      # also store_long_run.png, store_prefetch.png

(a) A long run that drops nothing: bytes per tier, resident memory, threads, descriptors.
(b) One put and one get per tier and size.
(c), (d) Segments with a warm start whose residuals do not fit the first tier, in four arms that
take turns: everything on the device, tiers that hold everything in the first, tiers with prefetch,
tiers without. Blocks and the disk take a set time without using the processor (they sleep), so that
the figures are those of waiting, not of how busy the machine is. Ratios are of one round, medians
over rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import ditcache
from ditcache.cache.policies.interval import Interval
from ditcache.cache.warmstart.reuse import WarmStart
from ditcache.store.base import Key, Store
from ditcache.store.device import DeviceStore
from ditcache.store.disk import DiskTier
from ditcache.store.tiered import TieredStore

MIB = 2**20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARTS = ("long", "cost", "prefetch")
# (c): a block that always runs, as long as the four cached ones; of twelve steps six start warm.
CACHED, STEPS, WARM, SEGMENTS, WIDTH = 4, 12, 6, 3, 4096
ENTRY = 4 * WIDTH * 4  # bytes of a residual
KEPT = CACHED * 2 * (WARM + 1)  # residuals at once: warm ones and the generation's own
ARMS = ("device", "tiers, all fits", "tiers, prefetch", "tiers, no prefetch")
FIRST = 32 * ENTRY  # budget of the first tier
RATIOS = (0.25, 0.5, 0.75, 2.0)  # time to move what a forward needs / time it computes before that


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block", type=float, default=30.0, help="milliseconds per block in (c)")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--out", type=Path, help="folder for plots")
    arguments = parser.parse_args()
    parts = (arguments.only,) if arguments.only else PARTS
    failed: list[str] = []
    if "long" in parts:
        failed += long_run(arguments.out)
    if "cost" in parts:
        cost_per_tier()
    if "prefetch" in parts:
        failed += prefetch(arguments.rounds, arguments.block / 1e3, arguments.ratios, arguments.out)
    if failed:
        sys.exit("bench_store: " + "; ".join(failed))


# (a) A long run


def long_run(out: Path | None, generations: int = 30) -> list[str]:
    """12 MiB of fresh keys per generation into 8 + 16 + 32 MiB; nothing is dropped."""
    budgets = {"gpu": 8 * MIB, "cpu": 16 * MIB, "disk": 32 * MIB}
    rows = []
    with tempfile.TemporaryDirectory() as folder, TieredStore(**budgets, directory=folder) as store:
        for generation in range(1, generations + 1):
            for unit in range(48):
                store.put(Key(generation, "bench", "cond", unit, "0"), tensor(MIB // 4))
                store.get(Key(generation, "bench", "cond", unit - 20, "0"))
            tiers = store.stats()["tiers"]
            rows.append(
                {
                    **{name: tiers[name]["bytes"] / MIB for name in budgets},
                    **{f"{name} peak": tiers[name]["bytes_peak"] / MIB for name in budgets},
                    "RSS": resident() / MIB,
                    "threads": threading.active_count(),
                    "descriptors": len(os.listdir("/proc/self/fd")),
                }
            )
    print(f"(a) {generations} generations of 12 MiB, nothing dropped; MiB\n")
    shown = [1, 2, 3, 4, 5, 6, 10, 15, 20, 25, 30]
    table(
        ["generation", *rows[0]],
        [[n, *(f"{v:.1f}" if isinstance(v, float) else v for v in rows[n - 1].values())]
         for n in shown if n <= generations],
    )  # fmt: skip
    full = rows[5:]
    spread = max(r["RSS"] for r in full) / min(r["RSS"] for r in full) - 1
    print(f"\nfrom generation 6 on: resident memory within {100 * spread:.1f} %\n")
    if out is not None:
        plot_long_run(rows, budgets, out / "store_long_run.png")
    failed = []
    for name, budget in budgets.items():
        if max(row[f"{name} peak"] for row in rows) * MIB > budget:
            failed.append(f"{name} exceeded its budget")
    if spread > 0.05:
        failed.append(f"resident memory moved by {100 * spread:.1f} %")
    if len({row["threads"] for row in full}) > 1:
        failed.append("threads leak")
    if max(row["descriptors"] for row in full) > min(row["descriptors"] for row in full) + 2:
        failed.append("descriptors leak")
    return failed


def tensor(nbytes: int) -> torch.Tensor:
    return torch.full((nbytes // 4,), 1.5, device=DEVICE)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# (b) Cost per tier


def cost_per_tier(repeats: int = 11) -> None:
    """Milliseconds of one put and one get, both waited for."""
    print("(b) one put + one get, milliseconds, median\n")
    rows = []
    for tier in ("gpu", "cpu", "disk", "remote"):
        row = [tier]
        for size in (64 * 1024, MIB, 16 * MIB):
            row.append("{:.2f} + {:.2f}".format(*put_and_get(tier, size, repeats)))
        rows.append(row)
    table(["tier", "64 KiB", "1 MiB", "16 MiB"], rows)
    print()


def put_and_get(tier: str, size: int, repeats: int) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        budgets: dict[str, Any] = {n: None if n == tier else 0 for n in ("gpu", "cpu", "disk")}
        settings = {"remote": f"file://{folder}"} if tier == "remote" else {}
        if tier == "disk":
            settings["directory"] = folder
        with TieredStore(**budgets, **settings) as store:
            for number in range(repeats):
                key, value = Key(number, "bench", "cond", 0, "0"), tensor(size)
                times[0].append(timed(lambda k=key, v=value: store.put(k, v)))
                times[1].append(timed(lambda k=key: store.get(k)))
                store.drop(number)
    return median(times[0]) * 1e3, median(times[1]) * 1e3


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# (c), (d) Prefetch


class Slow(nn.Module):
    """A block that takes its time."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return hidden_states * 1.01


class SlowTransformer(nn.Module):
    def __init__(self, seconds: float):
        super().__init__()
        times = [CACHED * seconds, *[seconds] * CACHED]
        self.blocks = nn.ModuleList(map(Slow, times))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@dataclass
class Probed(Interval):
    """Like DBCache's: what is at the front always runs, and there is time to fetch meanwhile."""

    @property
    def probe(self) -> int:
        return 1


@dataclass
class SlowDisk(DiskTier):
    """Every file takes `seconds` to read or write, and no processor."""

    seconds = 0.0

    def store(self, name: str, content: bytes) -> None:
        time.sleep(self.seconds)
        super().store(name, content)

    def load(self, name: str) -> bytes:
        time.sleep(self.seconds)
        return super().load(name)


@dataclass
class SlowTiers(TieredStore):
    """seconds: of its disk. fetches: whether prefetch does anything."""

    seconds: float = 0.0
    fetches: bool = True

    def make_tiers(self) -> list[Any]:
        tiers = super().make_tiers()
        disk = SlowDisk(tiers[-1].budget, tiers[-1].codec, Path(str(self.directory)))
        disk.seconds = self.seconds
        return [*tiers[:-1], disk]

    def prefetch(self, keys: Any) -> None:
        if self.fetches:
            super().prefetch(keys)


def prefetch(rounds: int, block: float, ratios: Sequence[float], out: Path | None) -> list[str]:
    """Seconds of a video's later segments. The disk's latency follows from the ratio: a forward
    needs four residuals, which two threads read while the block at the front runs.
    """
    print(
        f"(c), (d) {SEGMENTS} segments, {KEPT} residuals at once, a first tier for "
        f"{FIRST // ENTRY}; {1e3 * block:g} ms per block; {rounds} rounds in turns; speed beside "
        "everything on the device, medians over rounds\n"
    )
    table(["move / compute", "disk", *ARMS, "prefetch gains"], [])
    failed, points = [], []
    for ratio in ratios:
        latency = ratio * CACHED * block / (CACHED / 2)
        taken: dict[str, list[float]] = {name: [] for name in ARMS}
        for number in range(rounds):
            turn = number % len(ARMS)
            with tempfile.TemporaryDirectory() as folder:
                arms = stores(folder, latency)
                for name in (*ARMS[turn:], *ARMS[:turn]):
                    taken[name].append(video(arms[name], block))
        share = {name: speeds(taken["device"], taken[name]) for name in ARMS}
        gain = speeds(taken["tiers, no prefetch"], taken["tiers, prefetch"])
        row = [f"{share[name]:.3f}" for name in ARMS[1:]]
        device = f"{median(taken['device']):.2f} s"
        cells = [f"{ratio:g}", f"{1e3 * latency:.0f} ms", device, *row, f"{gain:.2f}x"]
        print(f"| {' | '.join(cells)} |", flush=True)
        points.append((ratio, share))
        if ratio < 1 and share["tiers, prefetch"] < 0.97:
            failed.append(f"prefetch reaches {share['tiers, prefetch']:.3f} at ratio {ratio:g}")
        if gain < 0.97:
            failed.append(f"prefetch is slower than none at ratio {ratio:g}: {gain:.3f}x")
    print()
    if out is not None:
        plot_prefetch(points, out / "store_prefetch.png")
    return failed


def stores(folder: str, latency: float) -> dict[str, Store]:
    tiers: dict[str, Any] = {"cpu": 0, "disk": None, "directory": folder, "seconds": latency}
    return {
        "device": DeviceStore(),
        "tiers, all fits": SlowTiers(gpu=None, **tiers),
        "tiers, prefetch": SlowTiers(gpu=FIRST, **tiers),
        "tiers, no prefetch": SlowTiers(gpu=FIRST, **tiers, fetches=False),
    }


def speeds(reference: list[float], other: list[float]) -> float:
    """How fast `other` is beside `reference`, as the median over rounds."""
    return median(a / b for a, b in zip(reference, other, strict=True))


@torch.no_grad()
def video(store: Store, block: float) -> float:
    """Seconds of a video's segments after the first, which has nothing to start from."""
    model = SlowTransformer(block).to(DEVICE)
    hidden = torch.ones(1, 4, WIDTH, device=DEVICE)
    cache = ditcache.enable_cache(
        model, Probed(every=2), blocks="blocks", granularity="per_block", head=WARM, store=store,
        warmstart=WarmStart(steps=WARM, window=SEGMENTS),
    )  # fmt: skip
    with cache.one_video():
        for segment in range(SEGMENTS):
            if segment == 1:
                start = time.perf_counter()
            for step in range(STEPS):
                for branch in ("cond", "uncond"):
                    with cache.at(branch, step, STEPS):
                        model(hidden)
        seconds = time.perf_counter() - start
    ditcache.disable_cache(model)
    store.close()
    return seconds


# Tables and plots


def table(head: list[str], rows: list[list[Any]]) -> None:
    print(f"| {' | '.join(map(str, head))} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def plot_long_run(rows: list[dict[str, Any]], budgets: dict[str, int], path: Path) -> None:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    numbers = range(1, len(rows) + 1)
    for name, budget in budgets.items():
        line = left.plot(numbers, [row[name] for row in rows], label=name)[0]
        left.axhline(budget / MIB, color=line.get_color(), lw=0.8, ls=":")
    left.set(xlabel="generation", ylabel="MiB (dotted: budget)", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(numbers, [row["RSS"] for row in rows], color="#57606a")
    right.set(xlabel="generation", ylabel="resident memory, MiB", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def plot_prefetch(points: list[tuple[float, dict[str, float]]], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for name in ("tiers, all fits", "tiers, prefetch", "tiers, no prefetch"):
        axes.plot([r for r, _ in points], [share[name] for _, share in points], "o-", label=name)
    axes.axhline(0.97, color="#57606a", lw=0.8, ls=":")
    axes.set(xlabel="time to move / time to compute", ylabel="speed beside all on the device")
    axes.set_ylim(0, 1.1)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


if __name__ == "__main__":
    main()
