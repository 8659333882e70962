"""What is trained: a projector, and beside it the controls that must lose to it.

Each student turns a batch into a velocity; the models stay frozen. Letters: B batch, C channels, T
latent frames, H W latent sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditcache.bridge.capture import Seen, fuse, fusing
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.nets import KeyValues, Net


@dataclass
class Batch:
    """One batch, with what the frozen models make of it.

    seen: the target's inputs at sigma. wanted [B, C, T, H, W]: the velocity of the data. alone: the
    target's own. sources: `source`, `self` or `shuffled` -> its keys and values per layer; velocity
    of `source`, where a student mixes outputs. present [B]: False where the source is dropped.
    """

    seen: Seen
    wanted: Tensor
    alone: Tensor
    sources: dict[str, list[KeyValues]] = field(default_factory=dict)
    source_velocity: Tensor | None = None
    present: Tensor | None = None

    @property
    def frames(self) -> int:
        return self.seen.latents.shape[2]


class Student(nn.Module):
    """Base. feed: which keys and values it reads (None: none). mixes_outputs: reads the source's
    velocity. forwards: what one of its steps costs, in forwards of the target.
    """

    feed: str | None = None
    forwards = 1.0
    mixes_outputs = False

    def asks(self, sigma: float) -> tuple[str, ...]:
        """The plain forwards, of `target` and `source`, that a step at sigma needs beside what
        `forward` itself runs.
        """
        return ()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def attached(self, batch: Batch | None, target: nn.Module) -> Any:
        """Context in which `target` is changed; backward passes belong into it as well."""
        return nullcontext()

    def forward(self, batch: Batch, target: nn.Module) -> Tensor:
        """velocity [B, C, T, H, W]"""
        return batch.seen.call(target)


class Bridged(Student):
    """The target reads a source through a projector."""

    def __init__(self, net: Net, fusion: Fusion, feed: str = "source"):
        super().__init__()
        self.net, self.fusion, self.feed = net, fusion, feed
        self.forwards = 2.0

    def asks(self, sigma: float) -> tuple[str, ...]:
        return ("target",) if self.feed == "self" else ("source",)

    @contextmanager
    def attached(self, batch: Batch | None, target: nn.Module) -> Iterator[None]:
        assert batch is not None and self.feed is not None
        sources, net, fusion = batch.sources[self.feed], self.net, self.fusion

        def fused(layer: int, own: KeyValues) -> KeyValues:
            if layer not in net.partners or not (fusion.layers is None or layer < fusion.layers):
                return own
            given = {"source": (net, sources[net.partners[layer]])}
            mixed = fuse(fusion, layer, own, given, batch.seen.sigma, batch.frames)
            if batch.present is None:
                return mixed
            key, value = (
                torch.where(batch.present[:, None, None, None], mixed[i], own[i]) for i in (0, 1)
            )
            return key, value

        with fusing(target, fused):
            yield


class LowRankUpdate(Student):
    """LoRA on the target's own self-attention keys and values (arXiv:2106.09685): as many
    parameters, no source.
    """

    def __init__(self, target: nn.Module, rank: int):
        super().__init__()
        self.rank, self.pairs = rank, nn.ModuleList()
        for linear in self.linears(target):
            down = nn.Linear(linear.in_features, rank, bias=False)
            up = nn.Linear(rank, linear.out_features, bias=False)
            nn.init.zeros_(up.weight)
            self.pairs.append(nn.Sequential(down, up))

    @staticmethod
    def linears(target: nn.Module) -> list[Any]:
        blocks: Any = target.blocks
        return [getattr(block.attn1, name) for block in blocks for name in ("to_k", "to_v")]

    @staticmethod
    def rank_for(target: nn.Module, parameters: int) -> int:
        """The rank whose number of parameters is nearest."""
        linears = LowRankUpdate.linears(target)
        return max(1, round(parameters / sum(x.in_features + x.out_features for x in linears)))

    @contextmanager
    def attached(self, batch: Batch | None, target: nn.Module) -> Iterator[None]:
        def changed(pair: nn.Module) -> Any:
            return lambda module, args, output: output + pair(args[0])

        handles = [
            linear.register_forward_hook(changed(pair))
            for linear, pair in zip(self.linears(target), self.pairs, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Router(Student):
    """Mixes both models' outputs, place by place: two small convolutions over the noisy latents and
    both velocities. The strongest control: it costs what the bridge costs.
    """

    forwards = 2.0
    mixes_outputs = True

    def __init__(self, channels: int, hidden: int = 4):
        super().__init__()
        self.into = nn.Conv3d(3 * channels, hidden, 3, padding=1)
        self.out = nn.Conv3d(hidden, 1, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def asks(self, sigma: float) -> tuple[str, ...]:
        return ("target", "source")

    def forward(self, batch: Batch, target: nn.Module) -> Tensor:
        alone, other = batch.alone, batch.source_velocity
        assert other is not None
        noisy = batch.seen.latents[:, : alone.shape[1]].to(alone)
        share = torch.tanh(self.out(F.silu(self.into(torch.cat([noisy, alone, other], 1)))))
        return alone + share * (other - alone)
