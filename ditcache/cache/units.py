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
    """

    __slots__ = ("blocks", "driver", "index", "span")

    def __init__(self, blocks: UnitList, driver: Driver, index: int | None, span: range):
        self.blocks, self.driver, self.index, self.span = blocks, driver, index, span

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        blocks = [self.blocks[i] for i in self.span]
        try:
            if self.index is None:
                front = self.span.start == 0
                return self.driver.run_always(blocks, hidden_states, args, kwargs, front=front)
            return self.driver.run_unit(self.index, blocks, hidden_states, args, kwargs)
        except BaseException:  # torch runs no forward hook after a keyboard interrupt
            self.driver.call = None
            raise


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
        if spans[-1].stop < len(original):
            units.append(Unit(self, driver, None, range(spans[-1].stop, len(original))))
        self.__dict__.update(
            cache=cache, original=original, driver=driver, units=units, handles=handles
        )

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self.driver.call is None else iter(self.units)

    def __getitem__(self, index: Any) -> Any:
        return self.original[index]
