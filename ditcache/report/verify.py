"""`ditcache rollout verify=true`: the oracle on the user's own checkpoint, in fp32."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from ditcache.errors import ConfigError, GateFailed

if TYPE_CHECKING:
    from ditcache.commands.rollout import RolloutSettings


def verify(settings: RolloutSettings) -> None:
    """Print a row per expert. Raises GateFailed (exit code 1) if any is not exact."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ditcache.kv.oracle import TOLERANCE, examine
    from ditcache.models.load import load_once
    from ditcache.pipeline.extend import check_rollout
    from ditcache.pipeline.text import encode_text

    s = settings
    if s.kv.positions == "relative" and s.kv.sink:
        raise ConfigError(
            "kv.positions: relative positions with a sink differ from one forward by design; "
            "verify with kv.positions=absolute"
        )
    lengths = checked_lengths(s)
    bundle = load_once(replace(s.model, dtype="float32"))
    check_rollout(bundle, s)
    text = encode_text(bundle, s.texts[0], negative_prompt="", guidance=1.0).cond
    table = Table(
        title="cached rollout against one masked forward, largest difference over largest output",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    columns = ["expert", "chunks", "cached", "no context", "no window"]
    columns += [s.kv.codec] if s.kv.codec != "none" else ["offloaded"] if s.kv.offload else []
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    verdicts = []
    with closing(s.store) as store:
        for name, expert in bundle.experts.items():
            store.open()
            found = examine(
                expert, text, lengths, s.kv, newest=s.steps[-1], seed=s.seed, store=store
            )
            verdicts.append(found)
            cells = (found.error, found.blind, found.unwindowed, found.coded)
            shown = ["" if value is None else f"{value:.1e}" for value in cells]
            table.add_row(name, "+".join(map(str, lengths)), *shown[: len(columns) - 2])
    console = Console()
    console.print(table)
    worst = max(found.error for found in verdicts)
    if not all(found.passed for found in verdicts):
        raise GateFailed(
            f"verify: cached and masked differ by {worst:.1e} (allowed: {TOLERANCE:.0e}), or the "
            "negative control does not differ; the cache does not fit this checkpoint"
        )
    console.print(
        f"exact: {worst:.1e} of {TOLERANCE:.0e} allowed; without context it would be "
        f"{min(found.blind for found in verdicts):.1e}"
    )


def checked_lengths(settings: RolloutSettings) -> list[int]:
    """Chunks as the rollout's first ones, and so many that the window has to evict."""
    s = settings
    lengths = [s.lengths[0], *s.lengths[1:2]]
    enough = sum(lengths) + s.chunk if s.kv.window is None else s.kv.window + s.chunk
    while sum(lengths) < enough:
        lengths.append(s.chunk)
    return lengths
