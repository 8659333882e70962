"""Source keys and values mapped by matrices, also to other numbers of layers and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.bridge.projectors.base import Projector, Shape
from ditcache.errors import one_of

if TYPE_CHECKING:
    from ditcache.bridge.nets import Net

FORMS = ("kronecker", "low_rank", "dense", "concat")
GATES = ("none", "head")


@dataclass
class Full(Projector):
    """t + P s, or with a gate t + g (P s - t), per layer. Layers pair up from the last; a target
    layer without a partner gets nothing. Where keys and values have fewer heads than queries,
    theirs count.

    form: of P. `kronecker`: one matrix mixes heads, another the channels of each head.
    `low_rank`: keys and values together through `rank` numbers per token. `dense`: one matrix.
    `concat`: P reads the target as well, [P s; t], as C2C's fuser does (arXiv:2510.03215: residual
    feed-forward layers, weights per token and head), here with a soft gate and closed at the start.
    projector_hidden_dim: width inside `concat`. rank: of `low_rank`. gate: `head` decides per token
    and head from the target, with `projector_hidden_dim` in between; P then starts as the identity
    where shapes allow and the gate is closed. Without it, P starts at zero.
    """

    form: str = "kronecker"
    projector_hidden_dim: int = 256
    rank: int = 16
    gate: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("form", FORMS), ("gate", GATES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: no '{value}'. {one_of(value, allowed)}")
        for name in ("projector_hidden_dim", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be >= 1, got {getattr(self, name)}")
        if self.form == "concat" and self.gate != "none":
            raise ValueError("gate: form=concat weighs tokens and heads itself; set gate=none")

    @property
    def own_is_target(self) -> bool:
        return False

    def check(self, source: Shape, target: Shape) -> None:
        """Any two shapes can be mapped."""

    def build(self, source: Shape, target: Shape) -> Net:
        from ditcache.bridge.matrices import ConcatNet, FullNet

        return (ConcatNet if self.form == "concat" else FullNet)(self, source, target)
