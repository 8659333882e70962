"""What a run of the step cache remembers. Everything here is made anew for each generation, so
nothing needs a reset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ditcache.store.base import Key, Store

if TYPE_CHECKING:
    from torch import Tensor


class Point(NamedTuple):
    """A residual that was observed: when, at which noise level, and under which slot it is kept."""

    step: int
    sigma: float | None
    slot: str


class UnitState:
    """What one unit of one branch of one expert keeps during one generation.

    `values` is the policy's: numbers it wants to remember. Tensors go through `put` and `get`,
    which reach the store; any of them may come back as None.
    """

    __slots__ = (
        "computed",
        "last_step",
        "prefix",
        "run",
        "signature",
        "sizes",
        "skipped",
        "store",
        "values",
    )

    def __init__(self, store: Store, prefix: tuple[int, str, str, int]):
        self.store, self.prefix = store, prefix
        self.computed: list[Point] = []  # every residual observed, oldest first
        self.last_step: int | None = None  # last step seen, computed or skipped
        self.run = 0  # steps skipped since the last computed one
        self.skipped = 0
        self.signature: tuple | None = None  # shape, dtype, device of the unit's input
        self.values: dict[str, Any] = {}
        self.sizes: dict[str, int] = {}  # bytes per slot

    def put(self, slot: str, tensor: Tensor) -> None:
        self.sizes[slot] = tensor.nbytes
        self.store.put(Key(*self.prefix, slot), tensor.detach())

    def get(self, slot: str) -> Tensor | None:
        return self.store.get(Key(*self.prefix, slot))

    def nbytes(self) -> int:
        """Bytes given to the store and not dropped; tiers may hold fewer."""
        return sum(self.sizes.values())

    def drop(self) -> None:
        self.sizes.clear()
        self.store.drop(*self.prefix)


class Generation:
    """One pass over all denoising steps: whose turn it is and what every unit keeps."""

    def __init__(
        self,
        number: int,
        num_steps: int,
        store: Store,
        segment: int | None = None,
        shelf: int = 0,
    ):
        self.number, self.num_steps, self.store = number, num_steps, store
        self.segment = segment  # of a long video; None: a video of its own
        self.weights: dict[tuple[str, int], str | None] = {}  # hash per expert and unit
        self.shelf = shelf  # number under which it leaves residuals to later segments
        self.sigmas: tuple[float, ...] = ()
        self.step = -1
        self.seen: set[tuple[str, str]] = set()  # (expert, branch) calls already made at this step
        self.expert: str | None = None
        self.units: dict[tuple[str, str, int], UnitState] = {}
        self.masks: dict[str, list[bool] | None] = {}
        self.ends: dict[str, int] = {}  # step after each expert's last
        self.needed: dict[str, list[bool]] = {}  # per expert and step: may the residual be used
        self.decided: dict[str, tuple[int, str, bool]] = {}  # last (step, branch, computed)
        self.cond_output: tuple[int, Tensor] | None = None  # (step, output), until uncond has come

    def continues_with(self, expert: str, branch: str, step: int, num_steps: int) -> bool:
        """Whether a call can belong to this generation: time does not run backwards, no branch
        calls twice a step.
        """
        if num_steps != self.num_steps or step < self.step:
            return False
        return step > self.step or (expert, branch) not in self.seen

    def enter(self, expert: str, branch: str, step: int) -> None:
        """Note a call; crossing from one expert to the next frees what the first one kept."""
        if step != self.step:
            self.step, self.seen = step, set()
        self.seen.add((expert, branch))
        if expert != self.expert:
            if self.expert is not None:
                self.free(self.expert)
            self.expert = expert

    def unit(self, expert: str, branch: str, index: int) -> UnitState:
        key = (expert, branch, index)
        if key not in self.units:
            self.units[key] = UnitState(self.store, (self.number, *key))
        return self.units[key]

    def wanted(self, expert: str, step: int) -> bool:
        """Whether a residual computed at `step` is worth keeping. Steps that compute against the
        plan are kept as well.
        """
        mask = self.masks[expert]
        if step == self.ends[expert] - 1:
            return False
        return self.needed[expert][step] or (mask is not None and not mask[step])

    def restart(self, state: UnitState) -> UnitState:
        """The same unit with nothing remembered, as after a change of shape."""
        _, expert, branch, index = state.prefix
        state.drop()
        del self.units[expert, branch, index]
        fresh = self.unit(expert, branch, index)
        fresh.skipped = state.skipped  # the budget is for the whole run
        return fresh

    def free(self, expert: str | None = None) -> None:
        """Drop what `expert` kept, or everything."""
        for key in [key for key in self.units if expert in (None, key[0])]:
            self.units.pop(key)
        self.cond_output = None
        self.store.drop(*((self.number,) if expert is None else (self.number, expert)))
