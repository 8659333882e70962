"""The methods that are compared, each with every setting it may choose from.

A method has arms with one knob open, which is then turned until the compute is right, or ready
settings of which those with the right compute are taken. Ours and the peers' get the same kind of
choice: how many steps compute at the start, hold or forecast, how long a run of skips may be.

spans: the steps of each expert. Each expert computes its first step; peers count every expert's
steps from zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench import masks
from bench.arms import Arm

Settings = dict[str, Any]
TAYLOR: Settings = {"name": "taylor", "order": 1}
TAYLOR_SNR: Settings = {"name": "taylor", "order": 1, "axis": "log_snr"}


@dataclass(frozen=True)
class Method:
    """open: settings that lack `knob`. ready: whole settings; computed: how many steps they
    compute, where that is known without a run. probe: blocks that run on every step, so that equal
    blocks are not equal steps. alike: its skips do not depend on the prompt.
    """

    who: str
    name: str
    open: list[Settings] = field(default_factory=list)
    ready: list[Settings] = field(default_factory=list)
    computed: Callable[[Settings], int] | None = None
    probe: int = 0
    alike: bool = False
    knob: str = "threshold"

    def arm(self, settings: Settings) -> Arm:
        return Arm(self.who, self.name, settings)


def defaults(steps: int) -> list[Arm]:
    """What a user gets without tuning, and a sweep of the planned masks."""
    ours: list[Settings] = [
        {"policy": "taylorseer"},
        {"policy": "interval"},
        {"policy": "fbcache"},
        {"policy": "dbcache"},
        {"policy": "dicache"},
        {"policy": "seacache"},
        {"policy": "easycache"},
        {"policy": "scm"},
        {"policy": "teacache"},
        {"policy": "magcache"},
        *({"policy": "planned", "compute": count} for count in (6, 8, 10, 12, 16)),
        {"policy": "cfg_delta"},
    ]
    taylorseer = "TaylorSeerCacheConfig"
    hooks: list[tuple[str, Settings]] = [
        ("FirstBlockCache", {"config": "FirstBlockCacheConfig"}),
        ("MagCache", {"config": "MagCacheConfig", "num_inference_steps": steps}),
        ("SeaCache", {"config": "SeaCacheConfig"}),
        ("TaylorSeer lite", {"config": taylorseer, "use_lite_mode": True}),
        ("TaylorSeer attn, ffn", {"config": taylorseer, "cache_identifiers": PARTS}),
    ]
    cache_dit: list[Settings] = [
        {"Fn": 1, "warmup": 4, "threshold": 0.24, "max_run": 3},  # serving projects' for Wan
        {"Fn": 1, "warmup": 4, "threshold": 0.24, "max_run": 3, "calibrator": "taylorseer1"},
        {"Fn": 1, "warmup": 8, "threshold": 0.08},
    ]
    return [
        *(Arm("ditcache", str(settings["policy"]), settings) for settings in ours),
        *(Arm("diffusers", method, settings) for method, settings in hooks),
        *(Arm("cache-dit", "DBCache", {**settings, "steps": steps}) for settings in cache_dit),
    ]


PARTS = [r"blocks\.\d+\.(attn1|attn2|ffn)"]


def exact(steps: int) -> list[Arm]:
    """One arm per library that skips nothing and so must not change a bit."""
    peer = {"Fn": 1, "warmup": 0, "threshold": 0.0, "steps": steps}
    return [
        Arm("ditcache", "fbcache", {"policy": "fbcache", "threshold": 0.0}),
        Arm("diffusers", "FirstBlockCache", {"config": "FirstBlockCacheConfig", "threshold": 0.0}),
        Arm("cache-dit", "DBCache", peer),
    ]


def controls() -> list[Arm]:
    fewer = [
        Arm("control", f"{count} steps, no cache", {"steps": count})
        for count in (14, 13, 12, 10, 8)
    ]
    return [*fewer, Arm("control", "initial noise moved", {"moved": 1e-4})]


def methods(spans: list[range]) -> list[Method]:
    return [*ours(spans), *diffusers_methods(spans), *cache_dit_methods(spans)]


def ours(spans: list[range]) -> list[Method]:
    steps = spans[-1].stop

    def choices(policy: str, *rest: Settings) -> list[Settings]:
        return [{"policy": policy, **settings} for settings in rest]

    hold, line, snr = ({"forecaster": name} for name in ("hold", TAYLOR, TAYLOR_SNR))
    skips = [
        {"head": head, "max_skips": longest, **forecaster}
        for head, longest in ((1, 2), (1, 4), (2, 4))
        for forecaster in (hold, line)
    ]
    heads = [{"head": head, **forecaster} for head in (1, 4) for forecaster in (hold, line)]
    patterns = [run_length_settings(mask) for mask in every_placement(spans)]
    heads_and_gaps = (range(1, 11), range(2, 9)) if len(spans) == 1 else ((1, 2, 3, 5), range(2, 6))
    grid = [{"head": h, "every": e} for h in heads_and_gaps[0] for e in heads_and_gaps[1]]
    magcache = [{"max_run": k, "retention": r} for k in (2, 4, 6) for r in (0.1, 0.2)]
    teacache = [
        {"signal": signal, "head": head, **f}
        for signal, head in (("e0", 5), ("e", 1))
        for f in (hold, line)
    ]

    def known(computed: Callable[[Settings], int]) -> Callable[[Settings], int] | None:
        return computed if len(spans) == 1 else None  # two experts: measured

    return [
        *(per_expert() if len(spans) > 1 else []),
        Method(
            "ditcache",
            "interval",
            ready=choices("interval", *grid),
            computed=known(lambda s: interval_steps(s, steps)),
            alike=True,
        ),
        Method(
            "ditcache",
            "taylorseer",
            ready=choices(
                "taylorseer",
                *({**place, **f} for f in (line, snr, {"granularity": "output"}) for place in grid),
            ),
            computed=known(lambda s: interval_steps(s, steps)),
            alike=True,
        ),
        Method(
            "ditcache",
            "scm",
            ready=choices("scm", *({**p, **f} for p in patterns for f in (hold, line, snr))),
            computed=known(lambda s: sum(s["compute"])),
            alike=True,
        ),
        Method(
            "ditcache",
            "planned",
            ready=choices("planned", *({"compute": count} for count in range(2, steps))),
            computed=lambda s: s["compute"],
            alike=True,
        ),
        Method(
            "ditcache",
            "teacache",
            open=choices("teacache", *teacache),
            alike=True,
            knob="rel_l1_thresh",
        ),
        Method("ditcache", "magcache", open=choices("magcache", *magcache), alike=True),
        Method(
            "ditcache",
            "fbcache",
            open=choices("fbcache", *heads),
            probe=1,
        ),
        Method(
            "ditcache",
            "dbcache",
            open=choices(
                "dbcache",
                *({"front": 2, "head": 4, "max_skips": None, **f} for f in (hold, line)),
                *({"back": 1, "head": 4, "max_skips": None, **f} for f in (hold, line)),
            ),
            probe=1,
        ),
        Method(
            "ditcache",
            "dicache",
            open=choices("dicache", {"head": 3}, {"head": 5}, {"head": 4, **line}),
            probe=1,
        ),
        Method("ditcache", "seacache", open=choices("seacache", *skips)),
        Method(
            "ditcache",
            "easycache",
            open=choices(
                "easycache",
                {"head": 3},
                {"head": 5},
                {"head": 4, "forecaster": TAYLOR},
                {"head": 4, "granularity": "stack", "forecaster": TAYLOR},
            ),
        ),
        Method("ditcache", "with cfg_delta", ready=with_cfg_delta(steps), alike=True),
    ]


def per_expert() -> list[Method]:
    """Settings of its own for each expert, in everything that both have."""
    places = [{"head": head, "every": every} for head in (1, 3) for every in (2, 3, 4, 5)]
    pairs = [{**high, "low": low} for high in places for low in places if high != low]
    skips = [{"head": 1, "max_skips": 4}, {"head": 2, "max_skips": 2}]
    shares = [
        {**place, "forecaster": TAYLOR, "low_share": share}
        for place in skips
        for share in (0.5, 2.0)
    ]
    return [
        Method(
            "ditcache",
            f"{policy}, per expert",
            ready=[{"policy": policy, **pair} for pair in pairs],
            alike=True,
        )
        for policy in ("interval", "taylorseer")
    ] + [
        Method(
            "ditcache",
            "seacache, per expert",
            open=[{"policy": "seacache", **one} for one in shares],
        )
    ]


def with_cfg_delta(steps: int) -> list[Settings]:
    """A policy and CFG-delta together."""
    policies: list[Settings] = [
        *({"policy": "planned", "compute": count} for count in range(4, steps - 4, 2)),
        *({"policy": "taylorseer", "head": h, "every": e} for h in (2, 4, 6) for e in (2, 3, 4, 6)),
    ]
    return [{**policy, "cfg": {"every": every}} for policy in policies for every in (2, 3)]


def diffusers_methods(spans: list[range]) -> list[Method]:
    steps = spans[-1].stop

    def choices(config: str, *rest: Settings) -> list[Settings]:
        return [{"config": config, **settings} for settings in rest]

    magcache = [
        {"num_inference_steps": steps, "max_skip_steps": k, "retention_ratio": r}
        for k in (2, 4, 6)
        for r in (0.1, 0.2)
    ]
    seacache = [
        {"residual_order": order, "retention_steps": head, "max_consecutive_cached": longest}
        for head, longest in ((1, 2), (1, 4), (2, 4))
        for order in (0, 1)
    ]
    taylorseer = [
        {
            "cache_interval": every,
            "disable_cache_before_step": head,
            "disable_cache_after_step": steps - 1,
            "max_order": order,
        }
        for order in (1, 2)
        for head in range(1, 11)
        for every in range(2, 9)
    ]
    lite = [{**settings, "use_lite_mode": True} for settings in taylorseer]
    parts = [{**settings, "cache_identifiers": PARTS} for settings in taylorseer]
    return [
        Method(
            "diffusers",
            "FirstBlockCache",
            open=choices("FirstBlockCacheConfig", {}),
            probe=1,
        ),
        Method("diffusers", "MagCache", open=choices("MagCacheConfig", *magcache), alike=True),
        Method("diffusers", "SeaCache", open=choices("SeaCacheConfig", *seacache)),
        Method(
            "diffusers",
            "TaylorSeer lite",
            ready=choices("TaylorSeerCacheConfig", *lite),
            computed=lambda s: sum(taylorseer_steps(s, len(span)) for span in spans),
            alike=True,
        ),
        Method(
            "diffusers",
            "TaylorSeer attn, ffn",
            ready=choices("TaylorSeerCacheConfig", *parts),
            computed=lambda s: sum(taylorseer_steps(s, len(span)) for span in spans),
            alike=True,
        ),
    ]


def cache_dit_methods(spans: list[range]) -> list[Method]:
    """DBCache by threshold, and static masks. DMD needs four computed steps before it works."""
    steps = spans[-1].stop
    calibrators = [
        {},
        *({"calibrator": name} for name in ("taylorseer1", "taylorseer2", "dmd")),
    ]
    base = {"Fn": 1, "steps": steps}
    dynamic = [{**base, "warmup": w, **c} for w in (1, 2, 3, 4) for c in calibrators[:3]]
    dynamic.append({**base, "warmup": 4, **calibrators[3]})
    for more in ({"Fn": 2}, {"Bn": 1}, {"max_run": 3}):
        dynamic.append({**base, "warmup": 4, **more})
    if len(spans) > 1:
        pairs = ((4, 2), (4, 1), (2, 1))
        dynamic += [
            {**base, "warmup": high, "warmup_low": low, **c}
            for high, low in pairs
            for c in calibrators[:2]
        ]
    static = {"Fn": 1, "threshold": 0.08, "mask_policy": "static"}
    masked = [
        {**static, "mask": "".join(map(str, mask)), **c}
        for mask in every_placement(spans)
        for c in calibrators
    ]
    return [
        Method("cache-dit", "DBCache", open=dynamic, probe=1),
        Method(
            "cache-dit",
            "static mask",
            ready=masked,
            computed=lambda s: s["mask"].count("1"),
            probe=1,
            alike=True,
        ),
    ]


def every_placement(spans: list[range]) -> list[list[int]]:
    steps, starts = spans[-1].stop, [span.start for span in spans]
    found = [mask for count in range(4, steps) for mask in masks.placements(count, steps)]
    opened = [[int(step in starts or on) for step, on in enumerate(mask)] for mask in found]
    return list({tuple(mask): mask for mask in opened}.values())


def run_length_settings(mask: list[int]) -> Settings:
    compute, skip = masks.run_lengths(mask)
    return {"preset": None, "compute": compute, "skip": skip}


def interval_steps(settings: Settings, steps: int) -> int:
    """Steps an interval computes, the last one included."""
    anchor, every = settings["head"] - 1, settings["every"]
    return sum(i <= anchor or (i - anchor) % every == 0 or i == steps - 1 for i in range(steps))


def taylorseer_steps(settings: Settings, steps: int) -> int:
    """Likewise for diffusers' TaylorSeer."""
    head, every = settings["disable_cache_before_step"], settings["cache_interval"]
    return sum(i < head or (i - head - 1) % every == 0 or i == steps - 1 for i in range(steps))
