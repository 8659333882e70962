"""Renders the arms of one case: a, b, and the controls. Uncached results come from the shared
archive where they are there already.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ditcache.ab import fingerprint, memory
from ditcache.ab.results import Archive, Result
from ditcache.ab.settings import AbTestSettings, Case
from ditcache.bridge.generate import SHUFFLED
from ditcache.cache.settings import CacheSettings
from ditcache.cache.trace import Trace
from ditcache.models.base import Bundle
from ditcache.pipeline.render import Renderer, Video
from ditcache.pipeline.segments import decode_segments

SESSION = uuid.uuid4().hex  # of this process
FLOOR = 1e-4  # how far the initial noise is moved to see what differences mean nothing
CHECKED: dict[str, float] = {}  # archives whose results came out again here: how much slower

Made = tuple[Result, np.ndarray]


@dataclass
class Runner:
    """reused: uncached results that were there already. refresh: do not look for them."""

    bundle: Bundle
    settings: AbTestSettings
    renderer: Renderer
    archive: Archive
    refresh: bool = False
    reused: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = fingerprint.of_bundle(self.bundle, self.settings.shift)

    def arm(self, case: Case, cache: CacheSettings, *, bridged: bool = False) -> Made:
        """One of the two that are compared."""
        if bridged:
            return self.rendered(case, cache, arm="bridge")
        if cache.policy is None:
            return self.uncached(case)
        return self.rendered(case, cache)

    @property
    def bridge_controls(self) -> list[str]:
        """What a bridge is compared with beside a: names that `rendered` takes as `arm`."""
        bridging = self.renderer.bridging
        return [] if bridging is None else bridging.controls

    def uncached(self, case: Case, *, steps: int | None = None, moved: float = 0.0) -> Made:
        """From the archive, or rendered and put there."""
        key = self.key(case, steps or self.settings.steps, moved)
        known = None if self.refresh else self.archive.get(key)
        if known is not None and known.born != SESSION:
            known = self.believed(case, known, steps, moved)
        if known is not None:
            self.reused += 1
            return known, decode_segments(self.bundle, known.latents, self.settings.segments)
        result, frames = self.rendered(case, CacheSettings(), steps=steps, moved=moved)
        self.archive.put(key, result)
        return result, frames

    def believed(self, case: Case, known: Result, steps: int | None, moved: float) -> Result | None:
        """A result of another process. The first one is rendered again: if it does not come out bit
        for bit, none is used; its time says how fast the machine is now.
        """
        place = f"{self.archive.folder.resolve()} {fingerprint.of_weights(self.bundle.model.path)}"
        if place not in CHECKED:
            again, _ = self.rendered(case, CacheSettings(), steps=steps, moved=moved)
            if not torch.equal(again.latents, known.latents):
                self.refresh = True
                self.notes.append(
                    "The stored baseline did not come out again bit for bit; all of it was "
                    "rendered anew."
                )
                return None
            CHECKED[place] = again.seconds["denoise"] / known.seconds["denoise"]
        slower = CHECKED[place]
        known.seconds = {part: slower * value for part, value in known.seconds.items()}
        note = (
            "Uncached results of an earlier run were used; the first was rendered again and is "
            f"bit-identical. Their times are multiplied by {slower:.3f}, what it took now."
        )
        if note not in self.notes:
            self.notes.append(note)
        return known

    def rendered(
        self,
        case: Case,
        cache: CacheSettings,
        *,
        steps: int | None = None,
        moved: float = 0.0,
        arm: str | None = None,
    ) -> Made:
        memory.start_peak(self.bundle.device)
        video = self.renderer.render(
            case.index,
            case.prompt,
            cache,
            case.picture,
            seed=case.seed,
            steps=steps,
            moved=moved,
            arm=arm,
            other=case.other if arm == SHUFFLED else None,
        )
        held = memory.peak(self.bundle.device)
        return result_of(video, steps or self.settings.steps, held), video.frames

    def key(self, case: Case, steps: int, moved: float) -> dict[str, Any]:
        """Everything an uncached result depends on."""
        s = self.settings
        return {
            **self.model,
            "prompt": case.prompt,
            "negative_prompt": s.negative_prompt if s.guidance > 1 else None,
            "picture": fingerprint.of_picture(case.picture),
            "seed": case.seed,
            "steps": steps,
            "moved": moved,
            "guidance": [s.guidance, s.guidance_low],
            "size": [s.num_frames, s.height, s.width],
            "segments": [s.segments, s.held] if s.segments > 1 else None,
        }


def result_of(video: Video, steps: int, held: int) -> Result:
    return Result(
        video.latents,
        steps,
        dict(video.seconds),
        # A bridge's source computes blocks as well; other mixes may not run the target at all.
        video.bridge.get("target_blocks", video.trace.blocks_computed)
        + video.bridge.get("source_blocks", 0),
        video.trace.blocks,
        video.state_bytes_peak,
        held,
        strips_of(video.trace, steps, len(video.segment_seconds)),
        SESSION,
    )


def strips_of(trace: Trace, steps: int, segments: int = 1) -> dict[str, dict[str, str]]:
    """expert -> branch (and segment, where there are several) -> one mark per step: `#` computed,
    `.` skipped, `+` some of its units, a blank where the expert did not work.
    """
    found: dict[tuple[str, str], dict[int, set[bool]]] = {}
    for d in trace.decisions:
        line = d.branch if segments == 1 else f"{d.branch}, segment {d.segment}"
        found.setdefault((d.expert, line), {}).setdefault(d.step, set()).add(d.computed)
    marks = {frozenset({True}): "#", frozenset({False}): ".", frozenset({True, False}): "+"}
    strips: dict[str, dict[str, str]] = {}
    for (expert, line), by_step in found.items():
        cells = [marks.get(frozenset(by_step.get(step, ())), " ") for step in range(steps)]
        strips.setdefault(expert, {})[line] = "".join(cells)
    return strips
