"""Makes a block list yield units: runs of consecutive blocks that are computed or skipped as
one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ditcache.cache.driver import Driver
from ditcache.cache.streams import Work
from ditcache.models.base import Blocks

if TYPE_CHECKING:
    from ditcache.cache.attach import StepCache


def partition(num_blocks: int, probe: int, back: int, granularity: int | str) -> list[range]:
    """Blocks between the front and the back ones that always run -> units. Raises ValueError when a
    setting does not fit this model.
    """
    if not probe + back < num_blocks:
        raise ValueError(
            f"policy: it always computes {probe + back} blocks, but the model has {num_blocks} "
            "blocks"
        )
    if granularity == "output" and back:
        raise ValueError(
            "granularity: output replaces what the blocks at the back compute; use stack, or a "
            "policy without them"
        )
    size = (
        {"stack": num_blocks, "output": num_blocks, "per_block": 1}.get(granularity, granularity)
        if isinstance(granularity, str)
        else granularity
    )
    if isinstance(granularity, int) and granularity > num_blocks:
        raise ValueError(
            "granularity: must be 'stack', 'per_block', 'output' or a group size from 1 to "
            f"{num_blocks}, got {granularity}"
        )
    assert isinstance(size, int)
    end = num_blocks - back
    return [range(start, min(start + size, end)) for start in range(probe, end, size)]


class Unit:
    """Called like a block. Looks its blocks up at every call, so that adapters may replace them
    meanwhile.

    index: among the expert's units; None for blocks that always run, at the front or the back.
    """

    __slots__ = ("blocks", "drops_text", "index", "plain", "span")

    def __init__(self, blocks: UnitList, index: int | None, span: range):
        self.blocks, self.index, self.span = blocks, index, span
        self.plain: int | None = None  # what its last computed call returned, see Work
        self.drops_text = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        units, driver = self.blocks, self.blocks.driver
        blocks = list(units._modules.values())[self.span.start : self.span.stop]
        work = Work(blocks, units.layout, args, kwargs)
        work.plain, work.drops_text = self.plain, self.drops_text
        try:
            if self.index is None:
                out = driver.run_always(work, front=self.span.start == 0)
            else:
                out = driver.run_unit(self.index, work, units.names)
            self.plain, self.drops_text = work.plain, work.drops_text
            return work.returned(out)
        except BaseException:  # torch runs no forward hook after a keyboard interrupt
            driver.call = None
            raise


class UnitList(nn.ModuleList):
    """The same blocks under the same names; iterating it inside the transformer's forward gives
    units instead.

    Shares the original list's dictionary of modules, so whatever happens to one happens to both.
    first: index of its first unit among the expert's.
    """

    cache: StepCache
    driver: Driver
    layout: Blocks
    names: list[str]
    original: nn.ModuleList
    units: list[Unit]

    def __init__(
        self,
        original: nn.ModuleList,
        cache: StepCache,
        driver: Driver,
        layout: Blocks,
        spans: list[range],
        first: int,
    ):
        super().__init__()
        self._modules = original._modules
        units = [Unit(self, first + index, span) for index, span in enumerate(spans)]
        if spans[0].start:
            units.insert(0, Unit(self, None, range(spans[0].start)))
        if spans[-1].stop < len(original):
            units.append(Unit(self, None, range(spans[-1].stop, len(original))))
        names = list(inspect.signature(original[0].forward).parameters)
        self.__dict__.update(
            cache=cache, original=original, driver=driver, layout=layout, units=units, names=names
        )

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self.driver.call is None else iter(self.units)

    def __getitem__(self, index: Any) -> Any:
        everything = range(len(self))
        if isinstance(index, slice) and self.driver.call and everything[index] == everything:
            return self.units  # some models iterate `layers[:num_layers]`
        return self.original[index]
