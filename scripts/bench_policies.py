"""Our policies, diffusers' own caches and cache-dit side by side on the embedded model, in one
process, with the same captions, seeds and steps.

    python scripts/bench_policies.py                      # 40 held-out captions, on two idle cores
    python scripts/bench_policies.py --limit 4 --tune 0   # a look at it: defaults only
    python scripts/bench_policies.py --model tiny_wan2.2 --targets 1.8 2.4 --units blocks

Every method runs as shipped, and then tuned to the same compute by its own knob on other captions.
Two controls stand beside them: fewer steps without a cache, and the noise floor. Blocks are counted
by the same torch hooks for everyone. Arms take turns caption by caption; the uncached run opens and
closes each caption's round and has to come out bit-identical every time.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import cache_dit_arm, methods
from bench.arms import Arm
from bench.matched import LEAST, SENT, Tuner, allowed
from bench.measure import GUIDANCE, Bench, compared
from bench.picture import draw
from bench.table import difference, markdown, summary
from rich.progress import track

import ditcache
from ditcache.clips import world
from ditcache.config import load_yaml
from ditcache.errors import DitcacheError

STEPS, PROMPTS = 24, 40
TARGETS, UNITS = (2.0, 3.0), ("blocks", "steps")
NONE = Arm("control", "none")


def main() -> None:
    arguments = parse()
    started = time.perf_counter()
    bench = Bench(ditcache.load(arguments.model), STEPS)
    prompts, tuning = captions(arguments.prompts, arguments.tune)
    prompts = prompts[: arguments.limit]
    names = {method.name for method in methods.methods(bench.spans)}
    if unknown := set(arguments.only or names) - names:
        sys.exit(f"bench_policies: --only: no method {unknown}. One of: {', '.join(sorted(names))}")
    report = Report(arguments, bench, prompts, set(arguments.only or names))
    if tuning:
        inputs = [bench.inputs(text, 5000 + i) for i, text in enumerate(tuning)]
        report.tune(Tuner(bench, inputs, arguments.sent))
        print(f"tuned in {(time.perf_counter() - started) / 60:.1f} minutes", file=sys.stderr)
    shipped = [] if arguments.only else methods.defaults(STEPS)
    report.rehearse([NONE, *shipped, *methods.controls()], prompts[0])
    report.measure()
    out = arguments.out or Path("outputs/bench") / f"policies-{arguments.model}"
    out.mkdir(parents=True, exist_ok=True)
    text = f"{report.text()}\n\nTook {(time.perf_counter() - started) / 60:.0f} minutes.\n"
    (out / "table.md").write_text(text)
    (out / "results.json").write_text(json.dumps(report.data(), indent=1) + "\n")
    draw(report.rows(report.arms), out / "pareto.png")
    bench.close()
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", default="held-out", help="held-out, or an option of conf/prompts"
    )
    parser.add_argument("--limit", type=int, help="only the first so many captions")
    parser.add_argument("--tune", type=int, default=6, help="captions to tune on; 0: do not tune")
    parser.add_argument(
        "--sent", type=int, default=SENT, help="settings per method that go to the comparison"
    )
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="tune and compare these alone")
    parser.add_argument("--model", default="tiny", help="an embedded text-to-video model")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS, metavar="RATIO")
    parser.add_argument(
        "--units", nargs="+", default=UNITS, choices=UNITS, help="what the targets count"
    )
    parser.add_argument("--out", type=Path, help="folder; default: outputs/bench/policies-MODEL")
    arguments = parser.parse_args()
    if (arguments.limit is not None and arguments.limit < 1) or arguments.tune < 0:
        parser.error("--limit must be >= 1 and --tune >= 0")
    if arguments.sent < 1:
        parser.error("--sent must be >= 1")
    return arguments


def captions(option: str, tune: int) -> tuple[list[str], list[str]]:
    """Captions to compare on, and others to tune on."""
    held_out = drawn(20261121, PROMPTS, [])
    texts = held_out if option == "held-out" else list(load_yaml("prompts", option).texts)
    return texts, drawn(20261122, tune, [*held_out, *texts])


def drawn(seed: int, count: int, taken: list[str]) -> list[str]:
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        caption = world.draw_scene(rng).caption
        if caption not in taken:
            found.append(caption)
    return found


class Report:
    """Collects arms, their videos' figures, and what could not run."""

    def __init__(
        self, chosen: argparse.Namespace, bench: Bench, prompts: list[str], names: set[str]
    ):
        self.model, self.targets, self.units = chosen.model, chosen.targets, chosen.units
        self.bench, self.prompts, self.names = bench, prompts, names  # of methods to tune
        self.arms: list[Arm] = []
        self.shipped: list[Arm] = []
        self.matched: dict[tuple[float, str], list[Arm]] = {}
        self.skipped: dict[str, str] = {}
        self.unreached: dict[tuple[float, str], list[str]] = {}
        self.kept: dict[str, int | None] = {}
        self.videos: dict[str, list[dict[str, float]]] = {}
        self.tuning: list[dict[str, Any]] = []

    def tune(self, tuner: Tuner) -> None:
        """Every method at every target: equal blocks first, then equal steps where that differs."""
        every = methods.methods(self.bench.spans)
        known = [m for m in every if present(m.who) and m.name in self.names]
        rounds = [(t, u, m) for u in self.units for t in self.targets for m in known]
        for target, unit, method in track(rounds, description="tuning", transient=True):
            found = self.matched.setdefault((target, unit), [])
            if unit == "blocks":
                arms = tuner.best(method, target, unit)
            else:  # without a probe equal steps are equal blocks
                arms = self.arms_of(method, target)
                if method.probe:
                    arms = tuner.best(only(method, arms), target, unit)
            found += arms
            if not arms:
                name = f"{method.who} {method.name}"
                self.unreached.setdefault((target, unit), []).append(name)
        self.tuning, self.skipped = tuner.log, dict(tuner.refused)

    def arms_of(self, method: methods.Method, target: float) -> list[Arm]:
        """What stands for the method at equal blocks."""
        found = self.matched.get((target, "blocks"), [])
        return [arm for arm in found if (arm.who, arm.method) == (method.who, method.name)]

    def rehearse(self, arms: list[Arm], prompt: str) -> None:
        """Run everything once: warms up, shows what cannot run, looks at the kept state."""
        inputs = self.bench.inputs(prompt, 1000)
        uncached = self.bench.run(NONE, inputs).latents
        for arm in filter(lambda arm: present(arm.who), methods.exact(STEPS)):
            if not torch.equal(self.bench.run(arm, inputs).latents, uncached):
                sys.exit(f"bench_policies: {arm.who} changes the result though it skips nothing")
        tuned = [arm for found in self.matched.values() for arm in found]
        for arm in track([*arms, *tuned], description="rehearsal", transient=True):
            if arm.key in self.kept or not present(arm.who):
                continue
            try:
                self.kept[arm.key] = self.bench.run(arm, inputs, watch=True).kept
            except DitcacheError as error:
                self.skipped[arm.name] = str(error)
                continue
            self.arms.append(arm)
            self.videos[arm.key] = []
        self.shipped = [arm for arm in self.arms if arm in arms]

    def measure(self) -> None:
        """Arms in turns, another one first for every caption."""
        first = None
        rounds = track(self.prompts, description="captions", transient=True)
        for number, prompt in enumerate(rounds):
            inputs = self.bench.inputs(prompt, 1000 + number)
            before = self.bench.run(NONE, inputs)
            turn = number * 7 % len(self.arms)
            order = [arm for arm in self.arms[turn:] + self.arms[:turn] if arm != NONE]
            videos = {arm.key: self.bench.run(arm, inputs) for arm in order}
            videos[NONE.key] = after = self.bench.run(NONE, inputs)
            if not torch.equal(before.latents, after.latents):
                sys.exit("bench_policies: the uncached result has changed; an arm left traces")
            after.seconds = (before.seconds + after.seconds) / 2
            reference, *decoded = self.bench.frames([before, *videos.values()])
            for (key, video), frames in zip(videos.items(), decoded, strict=True):
                figures = compared(reference, frames)
                figures |= {"seconds": video.seconds, "blocks": video.blocks, "steps": video.steps}
                figures["speedup"] = after.seconds / video.seconds
                self.videos[key].append(figures)
            first = first or (inputs, before)
        assert first is not None
        if not torch.equal(self.bench.run(NONE, first[0]).latents, first[1].latents):
            sys.exit("bench_policies: the first uncached result does not come out again")

    def rows(self, arms: list[Arm]) -> list[tuple[Arm, dict[str, Any]]]:
        every = self.bench.all_blocks
        return [
            (arm, summary(self.videos[arm.key], every, self.kept[arm.key]))
            for arm in arms
            if arm.key in self.videos
        ]

    def text(self) -> str:
        parts = [
            f"{self.model}, {len(self.prompts)} captions, {STEPS} steps, guidance {GUIDANCE}, "
            f"{', '.join(f'{k} {v}' for k, v in versions().items())}, "
            f"{torch.get_num_threads()} threads. With threshold 0 every library gave the uncached "
            "latents bit for bit; after every caption and at the end the uncached video was "
            "bit-identical to the first.",
            f"## {'As shipped' if len(self.shipped) > 1 + len(methods.controls()) else 'Controls'}"
            f"\n\n{markdown(self.rows(self.shipped))}",
        ]
        parts += [self.section(target, unit) for target, unit in self.matched]
        if self.skipped:
            lines = [f"- `{name}`: {reason}" for name, reason in self.skipped.items()]
            parts.append("## Not run\n\n" + "\n".join(lines))
        return "\n\n".join(parts)

    def section(self, target: float, unit: str) -> str:
        """One target: every method's best setting, best first; those over the budget last."""
        rows = self.rows(self.matched[target, unit])
        over = {arm.key for arm, row in rows if not allowed(self.ratio(row, unit), target)}
        rows.sort(key=lambda pair: (pair[0].key in over, -pair[1]["psnr"]))
        rows = first_of_each(rows)
        rows += [pair for pair in self.rows(methods.controls()) if is_control(pair[1], target)]
        title = (
            f"## {target:.1f}x less blocks"
            if unit == "blocks"
            else (f"## {STEPS / target:.0f} of {STEPS} steps computed")
        )
        notes = [markdown(rows, over), *self.leads(rows, over)]
        if over:
            notes.append(f"† came out below {LEAST:.0%} of the target on these captions.")
        if names := self.unreached.get((target, unit)):
            notes.append(f"Cannot get there: {', '.join(names)}.")
        return "\n\n".join([title, *notes])

    def ratio(self, row: dict[str, Any], unit: str) -> float:
        return row["compute"] if unit == "blocks" else STEPS / max(row["steps"], 1.0)

    def leads(self, rows: list[tuple[Arm, dict[str, Any]]], over: set[str]) -> list[str]:
        """Our best against each peer's best, and settings per expert against the same for both,
        paired by caption.
        """
        best: dict[str, Arm] = {}
        for arm, _ in rows:
            if arm.key not in over:
                best.setdefault(arm.who, arm)
                if arm.who == "ditcache":
                    best.setdefault(f"our {arm.method}", arm)
        pairs = [("ditcache", who) for who in ("diffusers", "cache-dit", "control")]
        pairs += [(name, name.split(",")[0]) for name in best if name.endswith("per expert")]
        lines = []
        for ours, theirs in pairs:
            if ours in best and theirs in best:
                scores = [[v["psnr"] for v in self.videos[best[w].key]] for w in (ours, theirs)]
                mean, low, high = difference(*scores)
                whose = "" if theirs.startswith("our ") else f"{theirs}'s "
                lines.append(
                    f"- `{best[ours].name}` over {whose}`{best[theirs].name}`: "
                    f"{mean:+.1f} dB ({low:+.1f} to {high:+.1f}), paired by caption"
                )
        return ["\n".join(lines)] if lines else []

    def data(self) -> dict[str, Any]:
        rows = self.rows(self.arms)
        return {
            "versions": versions(),
            "model": self.model,
            "threads": torch.get_num_threads(),
            "steps": STEPS,
            "guidance": GUIDANCE,
            "captions": self.prompts,
            "arms": [
                {
                    "who": arm.who,
                    "method": arm.method,
                    "settings": arm.settings,
                    "name": arm.name,
                    "summary": row,
                    "videos": self.videos[arm.key],
                }
                for arm, row in rows
            ],
            "matched": [
                {"target": target, "unit": unit, "arms": [arm.key for arm in arms]}
                for (target, unit), arms in self.matched.items()
            ],
            "tuning": self.tuning,
            "not_run": self.skipped,
        }


def only(method: methods.Method, arms: list[Arm]) -> methods.Method:
    """The method with no other open settings than these arms', if there are any."""
    if not arms or not method.open:
        return method
    settings = [{k: v for k, v in arm.settings.items() if k != method.knob} for arm in arms]
    return replace(method, open=settings)


def first_of_each(rows: list[tuple[Arm, dict[str, Any]]]) -> list[tuple[Arm, dict[str, Any]]]:
    """The first row of every method."""
    first: dict[tuple[str, str], tuple[Arm, dict[str, Any]]] = {}
    for arm, row in rows:
        first.setdefault((arm.who, arm.method), (arm, row))
    return list(first.values())


def is_control(row: dict[str, Any], target: float) -> bool:
    return abs(row["compute"] / target - 1) < 0.03


def present(who: str) -> bool:
    return who != "cache-dit" or cache_dit_arm.is_there()


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "diffusers", "cache-dit"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


if __name__ == "__main__":
    main()
