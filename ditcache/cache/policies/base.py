"""What a policy is: it decides *when* a unit computes. It knows no model and keeps no run state of
its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

from ditcache.cli import options
from ditcache.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ditcache.cache.state import UnitState


@dataclass(frozen=True)
class Schedule:
    """What is known of a run before its first step."""

    num_steps: int
    head: int = 0  # steps at the start that the driver computes without asking
    tail: int = 0  # likewise at the end
    sigmas: tuple[float, ...] = ()  # noise level per step, where the scheduler tells
    first: int = 0  # first step of this expert
    end: int | None = None  # step after its last; None: the run's end
    # Time embeddings of all steps, fp32 on the CPU: "e" [T, D] and "e0" [T, 6 D]; None where the
    # transformer has none that ditcache knows.
    embed: Callable[[], dict[str, Tensor]] | None = None

    @property
    def span(self) -> range:
        """The steps of this expert."""
        return range(self.first, self.num_steps if self.end is None else self.end)


@dataclass(slots=True)
class Context:
    """What a dynamic policy may look at when it decides about one unit at one call.

    hidden [B, N, D]: the unit's input. probe_residual [B, N, D]: what the probe blocks added, if
    the policy asked for a probe. e0 [B, 6, D]: the time embedding that modulates the blocks.
    latents [B, C, T, H, W]: the noisy channels of the transformer's input. `state` is this unit's
    own, fresh per generation.
    """

    expert: str
    branch: str
    step: int
    num_steps: int
    sigma: float | None
    timestep: Tensor | None
    unit_index: int
    num_units: int
    hidden: Tensor
    encoder_hidden: Tensor | None
    e0: Tensor | None
    probe_residual: Tensor | None
    latents: Tensor | None
    policy: Policy
    state: UnitState
    signal: float | None = field(
        default=None
    )  # a policy leaves here what it measured; it goes into steps.jsonl


@dataclass
class Policy:
    """Base of all policies. Override `mask` for a static policy or `should_compute` for a dynamic
    one.
    """

    per_unit: ClassVar[bool] = (
        False  # False: asked once per call, at the first unit; True: for every unit
    )
    # True: asked for the cond branch only; at the same step uncond does the same.
    branches_agree: ClassVar[bool] = False

    @property
    def probe(self) -> int:
        """How many blocks at the start always run, so that `probe_residual` can be looked at."""
        return 0

    @property
    def back(self) -> int:
        """How many blocks at the end always run."""
        return 0

    def fitted(self, calibration: str | None) -> Policy:
        """This policy with the constants filled in that it takes from the calibration of that name,
        the model's own.

        Raises ConfigError if it needs some and there are none.
        """
        return self

    def mask(self, schedule: Schedule) -> list[bool] | None:
        """One bool per step (True = compute) if the whole run is known in advance, else None."""
        return None

    def should_compute(self, ctx: Context) -> bool:
        """Whether this unit computes now. Not asked where the driver's own rules have decided."""
        raise TypeError(f"{type(self).__name__} defines neither mask nor should_compute")

    def record(self, ctx: Context, computed: bool) -> None:
        """Told of what was done whenever it could have been asked, forced or not, to keep
        references up to date.
        """

    def record_output(self, ctx: Context, output: Tensor) -> None:
        """Told of the transformer's output [B, C, T, H, W] after every computed call."""


P = TypeVar("P", bound=type[Policy])
REGISTERED: dict[str, type[Policy]] = {}


def register_policy(name: str) -> Callable[[P], P]:
    """Class decorator: make `enable_cache(pipe, name)` find a policy that has no YAML."""

    def register(cls: P) -> P:
        if not (isinstance(cls, type) and issubclass(cls, Policy)):
            raise ConfigError(
                f"register_policy('{name}'): {cls!r} does not derive from ditcache's Policy"
            )
        if name in options("cache"):
            raise ConfigError(f"register_policy('{name}'): conf/cache already has this name")
        REGISTERED[name] = cls
        return cls

    return register
