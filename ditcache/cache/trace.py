"""Every decision of a generation, as rows and as sums."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Decision:
    """One unit at one call. `reason` says who decided: first, head, tail, shape, gap, max_skips,
    budget, policy, cond (uncond follows cond), cfg (CFG-delta), missing, warm (a residual of an
    earlier segment), shared (computed by another process).

    blocks: how many blocks the unit spans. nbytes: what the unit keeps in the store after the call.
    segment: of a long video.
    """

    step: int
    expert: str
    branch: str
    unit: int
    computed: bool
    reason: str
    signal: float | None
    blocks: int
    nbytes: int
    segment: int = 0


@dataclass
class Trace:
    """The decisions of the current or last generation, or of all segments of one video."""

    decisions: list[Decision] = field(default_factory=list)
    always_blocks: int = 0  # blocks outside any unit, which run whatever is decided ...
    always_computed: int = 0  # ... except where nobody looks at the result

    @property
    def computed(self) -> int:
        """Units computed, of `len(decisions)`."""
        return sum(decision.computed for decision in self.decisions)

    @property
    def blocks(self) -> int:
        """Blocks a run without cache would compute."""
        return self.always_blocks + sum(decision.blocks for decision in self.decisions)

    @property
    def blocks_computed(self) -> int:
        return self.always_computed + sum(
            decision.blocks for decision in self.decisions if decision.computed
        )

    def note_forwards(
        self, step: int, expert: str, *, guided: bool, blocks: int, segment: int = 0
    ) -> None:
        """Record a step of a run without cache: every block of every branch computed."""
        for branch in ("cond", "uncond") if guided else ("cond",):
            self.decisions.append(
                Decision(step, expert, branch, 0, True, "no cache", None, blocks, 0, segment)
            )

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(decision) for decision in self.decisions]

    def stats(self) -> dict[str, Any]:
        """Per `expert/branch/unit`: computed, skipped, signals (None where nobody measured), bytes
        at most held.
        """
        table: dict[str, Any] = {}
        for d in self.decisions:
            row = table.setdefault(
                f"{d.expert}/{d.branch}/{d.unit}",
                {"computed": 0, "skipped": 0, "signals": [], "bytes": 0},
            )
            row["computed" if d.computed else "skipped"] += 1
            row["signals"].append(d.signal)
            row["bytes"] = max(row["bytes"], d.nbytes)
        return table
