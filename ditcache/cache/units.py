"""Makes a block list yield units: runs of consecutive blocks that are computed or skipped as
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ditcache.cache.driver import Driver

if TYPE_CHECKING:
    from ditcache.cache.attach import StepCache


def partition(num_blocks: int, probe: int, granularity: int | str) -> list[range]:
    """Blocks after the probe -> units. Raises ValueError when a setting does not fit this model."""
    if not probe < num_blocks:
        raise ValueError(
            f"policy: it always computes {probe} blocks, but the model has {num_blocks} blocks"
        )
    size = (
        {"stack": num_blocks, "per_block": 1}.get(granularity, granularity)
        if isinstance(granularity, str)
        else granularity
    )
    if isinstance(granularity, int) and granularity > num_blocks:
        raise ValueError(
            "granularity: must be 'stack', 'per_block' or a group size from 1 to "
            f"{num_blocks}, got {granularity}"
        )
    assert isinstance(size, int)
    return [range(start, min(start + size, num_blocks)) for start in range(probe, num_blocks, size)]


class Unit:
    """Called like a block. Looks its blocks up at every call, so that adapters may replace them
    meanwhile.
    """

    __slots__ = ("blocks", "driver", "index", "span")

    def __init__(self, blocks: UnitList, driver: Driver, index: int | None, span: range):
        self.blocks, self.driver, self.index, self.span = blocks, driver, index, span

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        blocks = [self.blocks[i] for i in self.span]
        if self.index is None:
            return self.driver.run_probe(blocks, hidden_states, args, kwargs)
        return self.driver.run_unit(self.index, blocks, hidden_states, args, kwargs)


class UnitList(nn.ModuleList):
    """The same blocks under the same names; iterating it inside the transformer's forward gives
    units instead.

    Shares the original list's dictionary of modules, so whatever happens to one happens to both.
    """

    cache: StepCache
    driver: Driver
    original: nn.ModuleList
    units: list[Unit]
    handles: tuple[RemovableHandle, ...]

    def __init__(
        self,
        original: nn.ModuleList,
        cache: StepCache,
        driver: Driver,
        spans: list[range],
        handles: tuple[RemovableHandle, ...],
    ):
        super().__init__()
        self._modules = original._modules
        units = [Unit(self, driver, index, span) for index, span in enumerate(spans)]
        if spans[0].start:
            units.insert(0, Unit(self, driver, None, range(spans[0].start)))
        self.__dict__.update(
            cache=cache, original=original, driver=driver, units=units, handles=handles
        )

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self.driver.call is None else iter(self.units)

    def __getitem__(self, index: Any) -> Any:
        return self.original[index]
