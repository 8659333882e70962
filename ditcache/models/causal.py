"""Wan made causal: few-step students that generate chunk by chunk (Self-Forcing, arXiv:2506.08009,
and its relatives).

The architecture is plain Wan's; causality lies in what a rollout lets attention see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ditcache.errors import one_of
from ditcache.models.wan import Wan

POSITIONS = ("absolute", "relative")
CONTEXTS = ("clean", "recompute")


@dataclass
class Weights:
    """A transformer's weights apart from its pipeline, as their authors published them.

    path: hub id or local folder. file: in it, `.pt` or `.safetensors`. entries: where in a `.pt`
    the state dict may be, first found first; empty: the file is one. lora: a second file there,
    whose low-rank updates are added (W += scale B A); lora_entry: where in it. lora_scale: their
    factor.
    """

    path: str
    file: str
    entries: list[str] = field(default_factory=list)
    lora: str | None = None
    lora_entry: str | None = None
    lora_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.file.endswith((".pt", ".pth", ".safetensors")):
            raise ValueError(f"file: must be .pt, .pth or .safetensors, got {self.file}")
        if self.lora is None and (self.lora_entry is not None or self.lora_scale != 1.0):
            raise ValueError("lora: without it lora_entry and lora_scale have no effect")


@dataclass
class CausalWan(Wan):
    """Text to video by rollout.

    weights: the transformer, where it is published apart; `path` then is the pipeline around it.
    chunk: latent frames generated together; first_chunk: of the first one (None: the same).
    timesteps: of a chunk's steps, from 1000 down; warp: whether they still have to be warped by
    `shift`. window, sink, positions: see `KVSettings`. recache: encode the window anew at a change
    of prompt. context: `clean` encodes a finished chunk once; `recompute` encodes the whole window
    before each chunk. num_frames: of the clips it was trained on.
    """

    causal: ClassVar[bool] = True

    weights: Weights | None = None
    chunk: int = 3
    first_chunk: int | None = None
    timesteps: list[float] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])
    warp: bool = True
    window: int | None = 21
    sink: int = 0
    positions: str = "absolute"
    recache: bool = True
    context: str = "clean"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("positions", POSITIONS), ("context", CONTEXTS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: no '{value}'. {one_of(value, allowed)}")
