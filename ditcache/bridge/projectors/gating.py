"""A small network decides, token by token, how far to go from the target to the source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.bridge.projectors.base import Projector, Shape
from ditcache.errors import one_of

if TYPE_CHECKING:
    from ditcache.bridge.nets import Net

GRANULARITIES = ("head", "token", "value")
NETS = ("per_head", "flat")
INPUTS = ("both", "target")


@dataclass
class Gating(Projector):
    """t + g (s - t) with g = tanh of a network of one hidden layer, whose last layer starts at
    zero: closed. (The granularities are those of arXiv:2510.03215's ancestors.)

    gate_granularity: one gate per token and head (`head`), per token (`token`), or per channel
    (`value`). projector_hidden_dim: width of the hidden layer. gate_net: `per_head` reads one head
    at a time with the same weights for all (for `token`, the mean over heads); `flat` reads all
    heads at once and is many times larger. gate_input: `both` sees the target and what the source
    would change, [t, s - t]; `target` alone cannot see where they differ. time_embedding: the noise
    level enters the hidden layer. share_layers: one network for all layers. layer_bias: each layer
    and head then has a bias of its own (one per gate). share_key_value: one network for keys and
    values.
    """

    gate_granularity: str = "head"
    projector_hidden_dim: int = 256
    gate_net: str = "per_head"
    gate_input: str = "both"
    time_embedding: bool = True
    share_layers: bool = True
    layer_bias: bool = True
    share_key_value: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("gate_granularity", GRANULARITIES),
            ("gate_net", NETS),
            ("gate_input", INPUTS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: no '{value}'. {one_of(value, allowed)}")
        if self.projector_hidden_dim < 1:
            raise ValueError(f"projector_hidden_dim: must be >= 1, got {self.projector_hidden_dim}")
        if self.layer_bias and not self.share_layers:
            raise ValueError("layer_bias: networks per layer have their own; set layer_bias=false")

    def build(self, source: Shape, target: Shape) -> Net:
        from ditcache.bridge.nets import GatingNet

        return GatingNet(self, source, target)
