"""The weights of `projector=full`: matrices from a source's keys and values to a target's.

Letters: B batch, N tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditcache.bridge.nets import GateNet, KeyValues, Net
from ditcache.bridge.projectors.base import Shape

if TYPE_CHECKING:
    from ditcache.bridge.projectors.full import Full


class FullNet(Net):
    """P per layer, for keys and values apart or, of low rank, together."""

    def __init__(self, spec: Full, source: Shape, target: Shape):
        super().__init__(source, target)
        self.spec = spec
        forms = {"kronecker": Kronecker, "low_rank": LowRank, "dense": Dense}
        closed = spec.gate == "none"
        if spec.form == "kronecker":
            self.numbers = target.heads * (
                target.head_dim if closed else max(target.head_dim, spec.projector_hidden_dim)
            )
        self.maps = nn.ModuleDict(
            {
                str(layer): forms[spec.form](source, target, spec.rank, closed)
                for layer in self.partners
            }
        )
        self.gates = nn.ModuleDict()
        if not closed:
            size, hidden = target.head_dim, spec.projector_hidden_dim
            self.gates.update(
                {
                    str(layer): nn.ModuleList(GateNet(size, hidden, 1) for _ in range(2))
                    for layer in self.partners
                }
            )

    def fused(self, layer: int, source: KeyValues, target: KeyValues, time: Tensor) -> KeyValues:
        mapped = self.maps[str(layer)](*source)
        if self.spec.gate == "none":
            return target[0] + mapped[0], target[1] + mapped[1]
        gates: Any = self.gates[str(layer)]
        key, value = (
            target[i] + gates[i](target[i], None, None) * (mapped[i] - target[i]) for i in (0, 1)
        )
        return key, value


class Kronecker(nn.Module):
    """Heads mixed by one matrix, channels by another. closed: the second starts at zero."""

    def __init__(self, source: Shape, target: Shape, rank: int, closed: bool):
        super().__init__()
        heads, channels = (
            torch.eye(target.heads, source.heads).repeat(2, 1, 1),
            torch.eye(target.head_dim, source.head_dim).repeat(2, 1, 1),
        )
        self.heads = nn.Parameter(heads)
        self.channels = nn.Parameter(channels * (not closed))

    def forward(self, key: Tensor, value: Tensor) -> KeyValues:
        mapped = [
            torch.einsum("gh,bnhd,ed->bnge", self.heads[i].to(x), x, self.channels[i].to(x))
            for i, x in enumerate((key, value))
        ]
        return mapped[0], mapped[1]


class LowRank(nn.Module):
    """Keys and values together -> `rank` numbers -> both again. closed: the way out is zero."""

    def __init__(self, source: Shape, target: Shape, rank: int, closed: bool):
        super().__init__()
        self.size = (target.heads, target.head_dim)
        self.down = nn.Linear(2 * source.width, rank, bias=False)
        self.up = nn.Linear(rank, 2 * target.width, bias=False)
        if closed:
            nn.init.zeros_(self.up.weight)

    def forward(self, key: Tensor, value: Tensor) -> KeyValues:
        both = self.up(self.down(torch.cat([key.flatten(2), value.flatten(2)], -1)))
        mapped = [x.unflatten(2, self.size) for x in both.chunk(2, -1)]
        return mapped[0], mapped[1]


class Dense(nn.Module):
    """One matrix over all heads and channels, for keys and for values."""

    def __init__(self, source: Shape, target: Shape, rank: int, closed: bool):
        super().__init__()
        self.size = (target.heads, target.head_dim)
        start = torch.eye(target.width, source.width).repeat(2, 1, 1) * (not closed)
        self.weight = nn.Parameter(start)

    def forward(self, key: Tensor, value: Tensor) -> KeyValues:
        mapped = [
            (x.flatten(2) @ self.weight[i].to(x).mT).unflatten(2, self.size)
            for i, x in enumerate((key, value))
        ]
        return mapped[0], mapped[1]


class ConcatNet(Net):
    """C2C's fuser with a soft scalar gate, for keys and values apart, per layer."""

    def __init__(self, spec: Full, source: Shape, target: Shape):
        super().__init__(source, target)
        width = spec.projector_hidden_dim
        self.fusers = nn.ModuleDict(
            {
                str(layer): nn.ModuleList(Fuser(source, target, width) for _ in range(2))
                for layer in self.partners
            }
        )

    def one(self, layer: int, which: int, source: Tensor, target: Tensor, time: Tensor) -> Tensor:
        return target + self.fusers[str(layer)][which](source, target)  # type: ignore[index]


class Fuser(nn.Module):
    """[s; t] -> residual [B, N, H, D]: gate * weight per token and head * projection, zero at the
    start.
    """

    def __init__(self, source: Shape, target: Shape, width: int):
        super().__init__()
        self.heads = target.heads
        self.into = nn.Linear(source.width + target.width, width)
        self.fusion, self.weighing, self.projecting = (FeedForward(width) for _ in range(3))
        self.weight, self.projection = (
            nn.Linear(width, target.heads),
            nn.Linear(width, target.width),
        )
        self.gate = nn.Parameter(torch.ones(()))
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        hidden = self.fusion(self.into(torch.cat([source.flatten(2), target.flatten(2)], -1)))
        weight = torch.sigmoid(self.weight(self.weighing(hidden)))[..., None]
        projection = self.projection(self.projecting(hidden)).unflatten(2, (self.heads, -1))
        return self.gate * weight * projection


class FeedForward(nn.Module):
    """x + Linear(GELU(Linear(RMSNorm(x)))), without biases."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.into, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.gelu(self.into(self.norm(x))))
