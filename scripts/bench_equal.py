"""`planned` against diffusers' SeaCache at exactly equal compute, on the held-out captions.

    python scripts/bench_equal.py                 # 40 captions, about 5 s each on one core

A dynamic policy cannot be set to a compute ratio: what it comes to differs from caption to caption.
So SeaCache runs with several thresholds, in the settings that bench_policies.py tuned on other
captions, and is compared in two ways: its setting that computes at least as much as ours, as it is;
and mixed, caption by caption, with the next cheaper one, in the share that makes the mean compute
of the mixture that of ours. Blocks are counted by hooks.
"""

import argparse
import sys

from bench.arms import Arm
from bench.measure import Bench, compared
from bench.table import difference, interval
from bench_policies import NONE, STEPS, captions
from rich.progress import track

import ditcache

COMPUTES = (13, 10)
SEACACHE = (  # thresholds per setting, rising
    ({"retention_steps": 2, "max_consecutive_cached": 4}, (0.2588, 0.31)),
    ({"retention_steps": 1, "max_consecutive_cached": 2}, (0.72, 0.7663)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny_wan2.2")
    parser.add_argument("--limit", type=int, help="only the first so many captions")
    parser.add_argument("--computes", type=int, nargs="+", default=COMPUTES, metavar="STEPS")
    chosen = parser.parse_args()
    bench = Bench(ditcache.load(chosen.model), STEPS)
    ours = [
        Arm("ditcache", "planned", {"policy": "planned", "compute": c}) for c in chosen.computes
    ]
    theirs = [seacache(settings, t) for settings, values in SEACACHE for t in values]
    arms = [*ours, *theirs]
    psnr: dict[str, list[float]] = {arm.key: [] for arm in arms}
    blocks: dict[str, list[float]] = {arm.key: [] for arm in arms}
    prompts = captions("held-out", 0)[0][: chosen.limit]
    for number, prompt in enumerate(track(prompts, transient=True)):
        inputs = bench.inputs(prompt, 1000 + number)
        videos = [bench.run(arm, inputs) for arm in (NONE, *arms)]
        reference, *decoded = bench.frames(videos)
        for arm, video, frames in zip(arms, videos[1:], decoded, strict=True):
            psnr[arm.key].append(compared(reference, frames)["psnr"])
            blocks[arm.key].append(video.blocks)
    bench.close()

    def mean_blocks(arm: Arm) -> float:
        return sum(blocks[arm.key]) / len(prompts)

    print(f"{chosen.model}, {len(prompts)} captions, {STEPS} steps")
    print("| setting | compute | PSNR (95 % CI) | worst video |\n|---|---|---|---|")
    for arm in arms:
        values, ratio = psnr[arm.key], bench.all_blocks / mean_blocks(arm)
        low, high = interval(values)
        mean = sum(values) / len(values)
        spread = f"{mean:.1f} ({low:.1f}-{high:.1f}) dB | {min(values):.1f}"
        print(f"| {arm.who} `{arm.name}` | {ratio:.3f}x | {spread} |")
    for arm in ours:
        budget = mean_blocks(arm)
        dear = [one for one in theirs if mean_blocks(one) >= budget * (1 - 1e-6)]
        if not dear:
            sys.exit(f"bench_equal: no SeaCache setting computes as much as {arm.name}")
        above = min(dear, key=mean_blocks)
        print(f"- `{arm.name}` over `{above.name}`, {line(psnr[arm.key], psnr[above.key])}")
        cheap = [one for one in theirs if mean_blocks(one) < budget]
        if cheap:
            below = max(cheap, key=mean_blocks)
            share = (budget - mean_blocks(below)) / (mean_blocks(above) - mean_blocks(below))
            pairs = zip(psnr[above.key], psnr[below.key], strict=True)
            mixed = [share * a + (1 - share) * b for a, b in pairs]
            what = f"{share:.0%} of it and {1 - share:.0%} of `{below.name}`: equal compute"
            print(f"- over {what}, {line(psnr[arm.key], mixed)}")


def planned(count: int) -> Arm:
    return Arm("ditcache", "planned", {"policy": "planned", "compute": count})


def seacache(settings: dict[str, int], threshold: float) -> Arm:
    every = {"config": "SeaCacheConfig", "residual_order": 1, **settings, "threshold": threshold}
    return Arm("diffusers", "SeaCache", every)


def line(ours: list[float], theirs: list[float]) -> str:
    mean, low, high = difference(ours, theirs)
    return f"paired by caption: {mean:+.1f} dB ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main()
