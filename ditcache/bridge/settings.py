"""The `bridge` group of `ditcache generate`: which projectors, which way, how often. Does not
import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditcache.bridge.fusion import SIDES, Fusion
from ditcache.bridge.partner import check_two, load_partner, side_of
from ditcache.bridge.projectors.base import Projector
from ditcache.bridge.saved import Header, locate, read_header
from ditcache.errors import ConfigError, one_of
from ditcache.models.base import Model

if TYPE_CHECKING:
    from ditcache.pipeline.settings import SamplingSettings


@dataclass(frozen=True)
class Wire:
    """One source of a run: its model, and its projector from a file, or untrained."""

    source: Model
    path: Path | None = None
    header: Header | None = None


@dataclass(kw_only=True)
class BridgeSettings:
    """The run's model is the target; what it reads comes from here.

    path: a file of bridge-train, its folder, `zoo:<name>`, or a list of them for several sources.
    projector: instead of a file, one that works untrained. source_model, source_path: the source's
    option in conf/model and its weights, where they are not those of the file. source_prompt: what
    the source reads instead of the prompt. target_model: `wan` or `chrono`, to make sure that the
    run's model is that one.

    Two stages: with draft_steps, the source first makes the whole video by itself in so many steps;
    noise up to the last step's sigma that is at most draft_sigma is put on it, and the target goes
    on from there, bridged.
    """

    fusion: Fusion
    path: Any = None
    projector: Projector | None = None
    source_model: str | None = None
    source_path: str | None = None
    source_prompt: str | None = None
    target_model: str | None = None
    draft_steps: int | None = None
    draft_sigma: float | None = None
    wires: list[Wire] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.projector is None):
            raise ValueError("path: set either it (a trained bridge) or projector (untrained)")
        if self.projector is not None and type(self.projector).__name__ not in UNTRAINED:
            raise ValueError(
                "projector: only identity and weighted do anything untrained; set path"
            )
        if self.projector is not None and self.projector.learns:
            raise ValueError("projector: a learned alpha starts at 0; set learnable_alpha=false")
        if self.target_model not in (None, *SIDES):
            raise ValueError(
                f"target_model: no '{self.target_model}'. {one_of(str(self.target_model), SIDES)}"
            )
        if (self.draft_steps is None) != (self.draft_sigma is None):
            raise ValueError("draft_steps: two stages need draft_steps and draft_sigma, or neither")
        if self.draft_steps is not None and self.draft_steps < 1:
            raise ValueError(f"draft_steps: must be >= 1, got {self.draft_steps}")
        if self.draft_sigma is not None and not 0 < self.draft_sigma < 1:
            raise ValueError(f"draft_sigma: must be between 0 and 1, got {self.draft_sigma}")
        paths = self.path if isinstance(self.path, list) else [self.path]
        if len(paths) > 1 and (self.source_model or self.source_path):
            raise ValueError("source_path: with several bridges each brings its own source")
        if len(set(map(str, paths))) < len(paths):
            raise ValueError("path: names a bridge twice")

    def connect(self, model: Model, num_frames: int) -> None:
        """Find the sources of a run with this model as the target. Raises ConfigError."""
        side = side_of(model)
        if self.target_model not in (None, side):
            raise ConfigError(
                f"bridge.target_model: is {self.target_model}, but model= loads the {side} side"
            )
        if side not in self.fusion.sources:
            direction = self.fusion.fusion_direction
            raise ConfigError(
                f"bridge.fusion.fusion_direction: {direction} has nothing for a {side} model"
            )
        try:
            if self.path is None:
                source = load_partner(model, self.source_model, self.source_path)
                self.wires = [Wire(source)]
            else:
                paths = self.path if isinstance(self.path, list) else [self.path]
                self.wires = [self.wire(model, str(path)) for path in paths]
            for wire in self.wires:
                check_two(model, wire.source, num_frames, self.fusion)
        except ValueError as error:
            raise ConfigError(f"bridge: {error}") from None

    def wire(self, model: Model, path: str) -> Wire:
        """One file's."""
        file = locate(path)
        header = read_header(file)
        side = side_of(model)
        if side not in header.ways:
            raise ConfigError(
                f"bridge.path: {file} has a projector into {' and '.join(header.ways)}, but model= "
                f"loads the {side} side"
            )
        (other,) = (end for name, end in header.ends.items() if name != side)
        where = self.source_path or other.path
        source = load_partner(model, self.source_model or other.model, where)
        return Wire(source, file, header)


UNTRAINED = ("Identity", "Weighted")


def check_bridge(settings: SamplingSettings, bridge: BridgeSettings, *, cached: bool) -> None:
    """What depends on the run as a whole. Raises ValueError or ConfigError."""
    if bridge.draft_steps is not None and cached:
        raise ValueError(
            "bridge.draft_steps: two stages do not go with a step cache; set cache=none"
        )
    if settings.guidance <= 1 and bridge.fusion.branches != "both":
        raise ValueError("bridge.fusion.branches: without guidance there is one branch; set both")
    if (
        0 < getattr(settings.model, "reasoning_steps", 0) < settings.steps
        and bridge.draft_steps is not None
    ):
        raise ValueError(
            "bridge.draft_steps: does not go with model.reasoning_steps' cut; set null"
        )
    bridge.connect(settings.model, settings.num_frames)
