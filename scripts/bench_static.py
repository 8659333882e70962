"""Planned masks against every other static policy at the same number of computed steps.

    python scripts/bench_static.py                    # on two idle cores, about ten minutes
    python scripts/bench_static.py --budgets 12       # one budget

The others choose their best setting (pattern, head, threshold, forecaster) for each budget on
tuning captions; planned has nothing to choose. They meet on captions that neither the tuning nor
the calibration has seen.
"""

import argparse
import sys

import numpy as np
from bench import methods
from bench.arms import Arm
from bench.matched import Tuner
from bench.measure import Bench, compared
from bench.table import difference
from bench_policies import GUIDANCE, STEPS, captions
from rich.progress import track

import ditcache

BUDGETS = (6, 8, 10, 12, 14, 16)
NONE = Arm("control", "none")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, metavar="B")
    parser.add_argument("--prompts", default="held-out", help="held-out, or a conf/prompts option")
    parser.add_argument("--limit", type=int, default=20, help="captions to compare on")
    parser.add_argument("--tune", type=int, default=5, help="captions to tune on")
    arguments = parser.parse_args()
    if min(arguments.budgets) < 4 or max(arguments.budgets) >= STEPS:
        parser.error(f"--budgets must be 4..{STEPS - 1}")
    bench = Bench(ditcache.load("tiny"), STEPS)
    prompts, tuning = captions(arguments.prompts, arguments.tune)
    tuner = Tuner(bench, [bench.inputs(text, 5000 + i) for i, text in enumerate(tuning)])
    arms = {budget: chosen(tuner, budget) for budget in arguments.budgets}
    scores = measured(bench, prompts[: arguments.limit], arms)
    bench.close()
    print(
        f"wan-tiny, {len(prompts[: arguments.limit])} captions, {STEPS} steps, guidance {GUIDANCE}"
    )
    print("\n| steps | planned | next best static policy | planned over it |\n|---|---|---|---|")
    behind = [budget for budget in arms if not shown(budget, arms[budget], scores)]
    if behind:
        sys.exit(f"bench_static: planned is not the best at {behind}")


def chosen(tuner: Tuner, budget: int) -> list[Arm]:
    """Every static policy's best setting that computes `budget` steps."""
    static = [m for m in methods.ours(tuner.bench.spans) if m.alike and m.name != "with cfg_delta"]
    rounds = track(static, description=f"tuning, {budget} steps", transient=True)
    return [arm for method in rounds for arm in tuner.best(method, STEPS / budget, "steps")]


def measured(
    bench: Bench, prompts: list[str], arms: dict[int, list[Arm]]
) -> dict[str, list[tuple[float, float]]]:
    """Per arm: steps computed and PSNR of every caption."""
    every = {arm.key: arm for found in arms.values() for arm in found}
    scores: dict[str, list[tuple[float, float]]] = {key: [] for key in every}
    for number, prompt in enumerate(track(prompts, description="captions", transient=True)):
        inputs = bench.inputs(prompt, 1000 + number)
        videos = [bench.run(arm, inputs) for arm in every.values()]
        reference, *decoded = bench.frames([bench.run(NONE, inputs), *videos])
        for key, video, frames in zip(every, videos, decoded, strict=True):
            scores[key].append((video.steps, compared(reference, frames)["psnr"]))
    return scores


def shown(budget: int, arms: list[Arm], scores: dict[str, list[tuple[float, float]]]) -> bool:
    """Print a row; whether planned leads those that computed exactly as many steps."""
    exact = [arm for arm in arms if {steps for steps, _ in scores[arm.key]} == {float(budget)}]
    psnr = {arm.key: [value for _, value in scores[arm.key]] for arm in exact}
    exact.sort(key=lambda arm: -float(np.mean(psnr[arm.key])))
    planned = next(arm for arm in exact if arm.method == "planned")  # it has one setting
    rival = next((arm for arm in exact if arm.method != "planned"), None)
    if rival is None:
        print(f"| {budget} | {np.mean(psnr[planned.key]):.1f} dB | no other computes exactly | |")
        return True
    ours, theirs = psnr[planned.key], psnr[rival.key]
    mean, low, high = difference(ours, theirs)
    print(
        f"| {budget} | {np.mean(ours):.1f} dB | `{rival.name}`: {np.mean(theirs):.1f} dB "
        f"| {mean:+.1f} dB ({low:+.1f} to {high:+.1f}) |"
    )
    return mean > 0


if __name__ == "__main__":
    main()
