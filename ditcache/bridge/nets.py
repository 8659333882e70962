"""The weights of projectors; those of `projector=full` are in matrices.py. Letters: L layers, B
batch, N tokens, H heads, D head size, C = H * D.

Every net fuses one layer's keys and values: `net(layer, source, target, time)`, each a pair of
[B, N, H, D]. Only fused layers are in a net's `layers`. Time [B] is sigma, 1 to 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditcache.bridge.projectors.base import Shape, partners

if TYPE_CHECKING:
    from ditcache.bridge.projectors.gating import Gating
    from ditcache.bridge.projectors.weighted import Weighted

KeyValues = tuple[Tensor, Tensor]
TIME_DIM = 256  # of the sinusoidal embedding of sigma
LARGE = 2**21  # numbers per tensor, 8 MiB in fp32, beyond which slices are faster on a CPU
SLICE = 2**17  # numbers per tensor in a slice: a few such stay in a CPU's cache


class Net(nn.Module):
    """Base: knows which layers it fuses. partners: target layer -> source layer.

    numbers: per token, in the largest tensor that comes up on the way. 0 where large matrices are
    read, which pays only for many tokens at once.
    """

    numbers = 0

    def __init__(self, source: Shape, target: Shape):
        super().__init__()
        self.source, self.target = source, target
        self.partners = partners(source, target)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, layer: int, source: KeyValues, target: KeyValues, time: Tensor) -> KeyValues:
        """Keys and values of target layer `layer` to attend to."""
        count = self.tokens_at_once(target[0])
        if count >= target[0].shape[1]:
            return self.fused(layer, source, target, time)
        fused = (torch.empty_like(target[0]), torch.empty_like(target[1]))
        parts = zip(*(x.split(count, 1) for x in (*source, *target, *fused)), strict=True)
        for s_key, s_value, t_key, t_value, key, value in parts:
            found = self.fused(layer, (s_key, s_value), (t_key, t_value), time)
            key.copy_(found[0])
            value.copy_(found[1])
        return fused

    def tokens_at_once(self, target: Tensor) -> int:
        """All of them where they are few, where gradients are kept, and on a GPU. A CPU without
        gradients takes slices, so that nothing on the way leaves its cache.
        """
        batch, tokens = target.shape[:2]
        plain = torch.is_grad_enabled() or target.device.type != "cpu"
        if plain or batch * tokens * self.numbers <= LARGE:
            return tokens
        return max(1, SLICE // (batch * self.numbers))

    def fused(self, layer: int, source: KeyValues, target: KeyValues, time: Tensor) -> KeyValues:
        """`forward` for the tokens given, which do not look at each other."""
        key, value = (self.one(layer, i, source[i], target[i], time) for i in (0, 1))
        return key, value

    def one(self, layer: int, which: int, source: Tensor, target: Tensor, time: Tensor) -> Tensor:
        """Keys (which 0) or values (1) alone."""
        raise NotImplementedError


class IdentityNet(Net):
    def one(self, layer: int, which: int, source: Tensor, target: Tensor, time: Tensor) -> Tensor:
        return source


class WeightedNet(Net):
    def __init__(self, spec: Weighted, source: Shape, target: Shape):
        super().__init__(source, target)
        self.alpha, self.raw, self.numbers = spec.fusion_alpha, None, target.width
        if spec.learnable_alpha:
            count, heads = target.layers, target.heads
            sizes = {"global": (1,), "layer": (count, 2), "head": (count, 2, heads)}
            self.raw = nn.Parameter(torch.zeros(sizes[spec.alpha_granularity]))

    def one(self, layer: int, which: int, source: Tensor, target: Tensor, time: Tensor) -> Tensor:
        if self.raw is None:
            return target + self.alpha * (source - target)
        raw = self.raw if self.raw.dim() == 1 else self.raw[layer, which]
        share = self.alpha * torch.tanh(raw)
        return target + share.view(1, 1, -1, 1).to(target.dtype) * (source - target)


class GateNet(nn.Module):
    """features [..., F] -> hidden (with time, if any) -> gate [..., O], zero at the start."""

    def __init__(self, features: int, hidden: int, outputs: int):
        super().__init__()
        self.into, self.out = nn.Linear(features, hidden), nn.Linear(hidden, outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, time: Tensor | None, bias: Tensor | None) -> Tensor:
        hidden = self.into(features)
        if time is not None:  # [B, hidden] under the tokens and, if they are there, heads
            hidden += time.view(len(time), *[1] * (hidden.dim() - 2), -1)
        raw = self.out(F.silu(hidden, inplace=not torch.is_grad_enabled()))
        return torch.tanh(raw if bias is None else raw + bias)


class GatingNet(Net):
    def __init__(self, spec: Gating, source: Shape, target: Shape):
        super().__init__(source, target)
        self.spec = spec
        heads, size, flat = target.heads, target.head_dim, spec.gate_net == "flat"
        features = (heads * size if flat else size) * (2 if spec.gate_input == "both" else 1)
        per_head = {"head": 1, "token": 1, "value": size}[spec.gate_granularity]
        outputs = per_head * (heads if flat and spec.gate_granularity != "token" else 1)
        copies = (1 if spec.share_layers else target.layers) * (1 if spec.share_key_value else 2)
        self.gates = nn.ModuleList(
            GateNet(features, spec.projector_hidden_dim, outputs) for _ in range(copies)
        )
        self.time = nn.Linear(TIME_DIM, spec.projector_hidden_dim) if spec.time_embedding else None
        self.numbers = 0 if flat else heads * max(features, spec.projector_hidden_dim)
        self.bias = None
        if spec.layer_bias:
            count = {"head": heads, "token": 1, "value": heads * size}[spec.gate_granularity]
            self.bias = nn.Parameter(torch.zeros(target.layers, 2, count))

    def forward(self, layer: int, source: KeyValues, target: KeyValues, time: Tensor) -> KeyValues:
        if self.time is not None:  # once for keys, values and all tokens
            time = self.time(time_features(time).to(target[0].dtype))
        return super().forward(layer, source, target, time)

    def one(self, layer: int, which: int, source: Tensor, target: Tensor, time: Tensor) -> Tensor:
        change = source - target
        return torch.addcmul(target, self.gate(layer, which, target, change, time), change)

    def gate(self, layer: int, which: int, target: Tensor, change: Tensor, time: Tensor) -> Tensor:
        """[B, N, H or 1, D or 1]. change: source - target. time [B, hidden]: embedded."""
        spec, heads = self.spec, target.shape[2]
        seen = [target, change] if spec.gate_input == "both" else [target]
        if spec.gate_net == "flat":
            features = torch.cat([x.flatten(2) for x in seen], -1)  # [B, N, 1 or 2 C]
        else:
            features = torch.cat(seen, -1)  # [B, N, H, 1 or 2 D]
            if spec.gate_granularity == "token":
                features = features.mean(2)
        index = 0 if spec.share_layers else layer
        net = self.gates[index] if spec.share_key_value else self.gates[2 * index + which]
        when = None if self.time is None else time
        bias = None if self.bias is None else self.bias[layer, which]
        if bias is not None and spec.gate_net == "per_head" and spec.gate_granularity != "token":
            bias = bias.view(heads, -1)
        gate = net(features, when, bias)
        if spec.gate_granularity == "token":
            return gate[..., None]  # [B, N, 1, 1]
        if spec.gate_net == "flat":
            gate = gate.unflatten(2, (heads, -1))
        return gate


def time_features(time: Tensor) -> Tensor:
    """sigma [B] -> [B, TIME_DIM], sines and cosines."""
    half = TIME_DIM // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, device=time.device) / half)
    angles = 1000 * time.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)
