"""A progress bar with the live share of skipped blocks, on a terminal; silent elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ditcache.cache.trace import Trace
    from ditcache.pipeline.callbacks import Step
    from ditcache.pipeline.render import OnStep


@contextmanager
def progress(total: int) -> Iterator[OnStep]:
    """`total` denoising steps over all videos -> a callback for each of them."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[skipped]}"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=console,
        transient=True,
        refresh_per_second=4,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("loading", total=total, skipped="")

        def on_step(cache: str, video: int, step: Step, trace: Trace | None) -> None:
            share = (
                0.0 if not trace or not trace.blocks else 1 - trace.blocks_computed / trace.blocks
            )
            bar.update(
                task,
                advance=1,
                description=f"video {video} ({cache})",
                skipped=f"{share:.0%} skipped",
            )

        yield on_step
