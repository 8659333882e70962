"""Controls without anything to train: what mixing two models costs nothing to try.

Each has settings that are picked on the validation clips, never on those it is judged on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ditcache.bridge.students import Batch, Student

SHARES = (0.1, 0.25, 0.5)


class Alone(Student):
    """One of the two models by itself."""

    def __init__(self, source: bool = False):
        super().__init__()
        self.mixes_outputs = source

    def asks(self, sigma: float) -> tuple[str, ...]:
        return ("source" if self.mixes_outputs else "target",)

    def forward(self, batch: Batch, target: nn.Module) -> Tensor:
        if not self.mixes_outputs:
            return batch.alone
        assert batch.source_velocity is not None
        return batch.source_velocity


class OutputAverage(Student):
    """A fixed share of the source's velocity."""

    forwards = 2.0
    mixes_outputs = True

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def asks(self, sigma: float) -> tuple[str, ...]:
        return ("target", "source")

    def forward(self, batch: Batch, target: nn.Module) -> Tensor:
        assert batch.source_velocity is not None
        return batch.alone + self.share * (batch.source_velocity - batch.alone)


class TimestepSwitch(Student):
    """The source's velocity on one side of a noise level, the target's on the other
    (arXiv:2402.14167). Costs one forward.
    """

    mixes_outputs = True

    def __init__(self, sigma: float, *, source_above: bool):
        super().__init__()
        self.sigma, self.source_above = sigma, source_above

    def asks(self, sigma: float) -> tuple[str, ...]:
        return ("source" if (sigma >= self.sigma) == self.source_above else "target",)

    def forward(self, batch: Batch, target: nn.Module) -> Tensor:
        assert batch.source_velocity is not None
        above = batch.seen.sigma >= self.sigma
        chosen = above if self.source_above else ~above
        return torch.where(chosen.view(-1, 1, 1, 1, 1), batch.source_velocity, batch.alone)


class WeightAverage(Student):
    """The target with a share of the source's weights; for siblings of equal shapes."""

    def __init__(self, source: nn.Module, share: float):
        super().__init__()
        self.share, self.other = share, {n: p.detach() for n, p in source.named_parameters()}

    @staticmethod
    def fits(target: nn.Module, source: nn.Module) -> bool:
        ours, theirs = (
            {name: weight.shape for name, weight in x.named_parameters()} for x in (target, source)
        )
        return ours == theirs

    @contextmanager
    def attached(self, batch: Batch | None, target: nn.Module) -> Iterator[None]:
        own = {name: weight.detach().clone() for name, weight in target.named_parameters()}
        with torch.no_grad():
            for name, weight in target.named_parameters():
                weight.lerp_(self.other[name].to(weight), self.share)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in target.named_parameters():
                    weight.copy_(own[name])
