"""One finished case: its arms measured against a, its videos written, its entry in the run folder.

An entry that is there already, made with the same settings, is not made again: that is how an
interrupted run goes on.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from ditcache.ab.results import Result, digest, plain
from ditcache.ab.runs import FLOOR, Made, Runner
from ditcache.ab.settings import AbTestSettings, Case
from ditcache.bridge.controls_file import controls_path
from ditcache.bridge.generate import SHUFFLED
from ditcache.bridge.partner import side_of
from ditcache.cache.settings import CacheSettings
from ditcache.clips.captions import obeyed
from ditcache.files import sha256_of
from ditcache.metrics.measure import measure
from ditcache.report.run_folder import write_json
from ditcache.video import write_mp4

ENTRIES = "cases"


def entry_of(folder: Path, runner: Runner, case: Case) -> dict[str, Any]:
    """The case's entry, from the folder or made now."""
    settings = runner.settings
    path = folder / ENTRIES / f"{case.index:03d}.json"
    made_of = fingerprint_of(runner, case)
    known = finished(path, folder, made_of)
    if known is not None:
        return known
    arms = render(runner, case)
    entry: dict[str, Any] = {
        "made_of": made_of,
        "prompt": case.prompt,
        "seed": case.seed,
        "arms": {
            name: {**facts(result), "obeyed": obeyed_of(runner, case, frames)}
            for name, (result, frames) in arms.items()
        },
        "quality": {name: quality(arms["a"], arms[name], settings) for name in arms if name != "a"},
        "files": {name: f"{name}-{case.index:03d}.mp4" for name in ("a", "b")},
    }
    for name, file in entry["files"].items():
        started = time.perf_counter()
        write_mp4(folder / file, arms[name][1], fps=settings.fps, upscale=settings.upscale)
        entry["arms"][name]["seconds"]["write"] = time.perf_counter() - started
    path.parent.mkdir(exist_ok=True)
    write_json(path, entry)
    return entry


def fingerprint_of(runner: Runner, case: Case) -> str:
    """Hash of all that an entry depends on."""
    s = runner.settings
    return digest(
        {
            **runner.key(case, s.steps, 0.0),
            "a": plain(s.a),
            "b": plain(s.candidate),
            "bridge": bridge_of(runner, case),
            "store": plain(s.store),
            "metrics": plain(s.metrics),
            "controls": case.index < s.controls,
            "look": [s.fps, s.upscale],
        }
    )


def finished(path: Path, folder: Path, made_of: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        there = all((folder / file).is_file() for file in entry["files"].values())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return restored(entry) if entry.get("made_of") == made_of and there else None


def restored(entry: dict[str, Any]) -> dict[str, Any]:
    """Infinity, which JSON cannot say, back in its places."""
    for values in entry["quality"].values():
        for name in ("psnr", "worst_frame"):
            values[name] = math.inf if values[name] is None else values[name]
        values["psnr_per_frame"] = [math.inf if v is None else v for v in values["psnr_per_frame"]]
    return entry


def render(runner: Runner, case: Case) -> dict[str, Made]:
    """a and b in turns, another one first for every case, then the controls."""
    s = runner.settings
    caches = {"a": s.a, "b": s.candidate}
    bridged = {"a": False, "b": s.bridge is not None}
    order = ("a", "b") if case.index % 2 == 0 else ("b", "a")
    arms = {name: runner.arm(case, caches[name], bridged=bridged[name]) for name in order}
    if case.index < s.controls:
        result = arms["b"][0]
        fewer = max(1, round(s.steps * result.blocks / arms["a"][0].blocks_total))
        arms["fewer_steps"] = runner.uncached(case, steps=fewer)
        arms["noise_floor"] = runner.uncached(case, moved=FLOOR)
        for name in runner.bridge_controls:
            if name != SHUFFLED or case.other is not None:
                arms[name] = runner.rendered(case, CacheSettings(), arm=name)
    return arms


def bridge_of(runner: Runner, case: Case) -> Any:
    """Everything that a bridge's video and its controls depend on."""
    settings = runner.settings
    if settings.bridge is None:
        return None
    files = [wire.path for wire in settings.bridge.wires if wire.path is not None]
    side = side_of(settings.model)
    files += [path for file in files if (path := controls_path(file, side)).is_file()]
    known = [plain(settings.bridge), [sha256_of(file) for file in files]]
    if case.index >= settings.controls:
        return known
    return [*known, runner.bridge_controls, plain(case.other)]


def obeyed_of(runner: Runner, case: Case, frames: np.ndarray) -> bool | None:
    """Whether the video shows what its caption asks for; can be told of embedded models."""
    embedded = runner.bundle.model.path.startswith("zoo:")
    return obeyed(case.prompt, frames) if embedded else None


def facts(result: Result) -> dict[str, Any]:
    values = result.facts()
    del values["born"]
    return {**values, "seconds": dict(result.seconds)}


def quality(reference: Made, candidate: Made, settings: AbTestSettings) -> dict[str, Any]:
    """Metrics of one arm against a, on raw frames and exact latents."""
    first, second = (np.asarray(made[0].latents.float()) for made in (reference, candidate))
    return measure(reference[1], candidate[1], first, second, settings.metrics)
