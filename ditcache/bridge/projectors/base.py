"""What a projector is: a map from a source's keys and values to a target's, closed until trained.

Settings only; `make` builds the weights. Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditcache.errors import DitcacheError

if TYPE_CHECKING:
    from ditcache.bridge.nets import Net


@dataclass(frozen=True)
class Shape:
    """Self-attention of one transformer: layers, heads that keys and values have (not the queries',
    where those share), and their size.
    """

    layers: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.heads} x {self.head_dim}"


@dataclass(kw_only=True)
class Projector:
    """Base of all projectors.

    max_params: most parameters that `make` may build (None: no limit).
    """

    max_params: int | None = None

    def __post_init__(self) -> None:
        if self.max_params is not None and self.max_params < 0:
            raise ValueError(f"max_params: must be >= 0, got {self.max_params}")

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return True

    @property
    def own_is_target(self) -> bool:
        """Whether the target's own keys and values, given as a source, change nothing, so that the
        control "reads itself" is the target.
        """
        return True

    def make(self, source: Shape, target: Shape) -> Net:
        """Fresh weights, closed: what it fuses is the target, bit for bit. Raises DitcacheError
        where the shapes cannot be mapped or `max_params` is passed.
        """
        self.check(source, target)
        net = self.build(source, target)
        if self.max_params is not None and net.num_parameters > self.max_params:
            raise DitcacheError(
                f"projector.max_params: this projector has {net.num_parameters:,} parameters for "
                f"{target}, more than {self.max_params:,}"
            )
        return net

    def check(self, source: Shape, target: Shape) -> None:
        """Raises DitcacheError where the shapes cannot be mapped."""
        same = (source.heads, source.head_dim) == (target.heads, target.head_dim)
        if not same:
            raise DitcacheError(
                f"projector: {type(self).__name__.lower()} mixes keys and values of equal shape, "
                f"but the source has {source} and the target {target}; use projector=full"
            )

    def build(self, source: Shape, target: Shape) -> Net:
        """The weights, without checks."""
        raise NotImplementedError


def partners(source: Shape, target: Shape) -> dict[int, int]:
    """Target layer -> source layer, the last with the last; target layers without a partner are
    left out.
    """
    shift = target.layers - source.layers
    return {layer: layer - shift for layer in range(max(shift, 0), target.layers)}
