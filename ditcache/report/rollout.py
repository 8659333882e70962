"""A rollout's files, written while it runs: video, record per chunk, latents; then metrics and a
table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from ditcache.files import complete_file
from ditcache.pipeline.chunks import ceiling
from ditcache.report import pictures
from ditcache.report.run_folder import finite, versions, write_json
from ditcache.report.summary import human_bytes
from ditcache.video import mp4_writer, write_png

if TYPE_CHECKING:
    from ditcache.commands.rollout import RolloutSettings
    from ditcache.pipeline.rollout import Chunk

SHEET = 10  # chunks shown per video
Add = Callable[["Chunk", np.ndarray], None]


class Recorder:
    """Writes what comes, chunk by chunk. A file gets its name when it is complete."""

    def __init__(self, folder: Path, settings: RolloutSettings, names: dict[str, str]):
        self.folder, self.settings, self.names = folder, settings, names
        self.rows: list[dict[str, Any]] = []
        self.strips: list[tuple[str, list[tuple[str, np.ndarray]]]] = []
        self.console = Console(stderr=True)
        self.stack = ExitStack()

    def __enter__(self) -> Recorder:
        path = self.stack.enter_context(complete_file(self.folder / "chunks.jsonl"))
        self.lines = self.stack.enter_context(path.open("w", encoding="utf-8"))
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)
        if error[0] is None:
            write_png(self.folder / "contact_sheet.png", pictures.contact_sheet(self.strips, 1))
            write_json(self.folder / "metrics.json", self.metrics())

    @contextmanager
    def video(self, index: int, prompt: str) -> Iterator[Add]:
        """A function that takes the chunks of one video."""
        s, thumbs = self.settings, []
        shown = np.linspace(0, len(s.lengths) - 1, min(SHEET, len(s.lengths))).round()
        with mp4_writer(
            self.folder / f"video-{index:03d}.mp4", fps=s.fps, upscale=s.upscale
        ) as write:

            def add(chunk: Chunk, frames: np.ndarray) -> None:
                write(frames)
                if chunk.index in shown:
                    thumbs.append(pictures.sample(frames[-1:], 1)[0])
                row = {"video": index, **facts(chunk, prompt, s), "frames": len(frames)}
                self.rows.append(row)
                self.lines.write(json.dumps(finite(row), ensure_ascii=False) + "\n")
                self.lines.flush()
                if s.save_latents:
                    save(self.folder / f"latents-{index:03d}", chunk)
                self.progress(row)

            yield add
        label = f"last frame of\n{len(thumbs)} of {len(s.lengths)} chunks"
        self.strips.append((prompt, [(label, np.stack(thumbs))]))

    def progress(self, row: dict[str, Any]) -> None:
        if self.console.is_terminal:
            total, seconds = len(self.settings.lengths), sum(row["seconds"].values())
            self.console.print(
                f"video {row['video']}  chunk {row['chunk'] + 1} of {total}  {seconds:.2f} s",
                end="\r",
            )

    def metrics(self) -> dict[str, Any]:
        """Everything of the run in one file."""
        s, rows = self.settings, self.rows
        made = [row for row in rows if not row["given"]]
        return {
            "schema": 1,
            "command": "rollout",
            **{group: self.names[group] for group in ("model", "kv", "cache")},
            "seed": s.seed,
            "prompts": s.texts,
            "switch": {str(key): text for key, text in s.switches.items()},
            "lengths": s.lengths,
            "timesteps": s.steps,
            "window": s.kv.window,
            "sink": s.kv.sink,
            "positions": s.kv.positions,
            "frames": sum(row["frames"] for row in rows) // len(s.texts),
            "timing": {
                f"{part}_s": sum(row["seconds"][part] for row in rows)
                for part in ("denoise", "context", "decode")
            },
            "chunk_s": median(sum(row["seconds"].values()) for row in made),
            "kv_bytes_peak": max(row["kv_bytes"] for row in rows),
            "evicted": sum(row["evicted"] for row in rows),
            "forwards": sum(row["forwards"] for row in rows),
            "steps_skipped": sum(row["steps_skipped"] for row in rows),
            "ceiling": ceiling(len(s.steps)),
            "versions": versions(),
        }

    def show(self) -> None:
        """The final table."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        found, s, console = self.metrics(), self.settings, Console()
        title = f"{found['model']}, {len(s.texts)} video(s) of {found['frames']} frames"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
        for name in ("chunks", "window", "a chunk", "of it decoding", "K/V", "evicted"):
            table.add_column(name, justify="right", no_wrap=True)
        decoding = median(row["seconds"]["decode"] for row in self.rows)
        window = "all" if s.kv.window is None else f"{s.kv.window}"
        table.add_row(
            str(len(s.lengths)),
            window + (f" (sink {s.kv.sink})" if s.kv.sink else ""),
            f"{found['chunk_s']:.2f} s",
            f"{decoding:.2f} s",
            human_bytes(found["kv_bytes_peak"]),
            f"{found['evicted']} latent frames",
        )
        console.print(table)
        if s.cache.policy is not None:
            made = sum(not row["given"] for row in self.rows)
            console.print(
                f"step cache: {found['steps_skipped'] / made:.1f} of {len(s.steps)} steps skipped "
                f"per chunk; at most {found['ceiling']:g}x, as the first forward and the clean "
                "pass always run"
            )
        if found["evicted"] and (note := s.kv.note(s.chunk)):
            console.print(note)
        tiers = self.rows[-1].get("tiers")
        if tiers:
            held = ", ".join(f"{name} {human_bytes(size)}" for name, size in tiers.items())
            console.print(f"keys and values per tier: {held}")
        console.print(str(self.folder), style="bold", highlight=False, soft_wrap=True)


def facts(chunk: Chunk, prompt: str, settings: RolloutSettings) -> dict[str, Any]:
    """A line of chunks.jsonl. evicted: latent frames that left the window; steps_skipped: by the
    step cache, in the mean over its units.
    """
    current = [text for at, text in settings.switches.items() if at <= chunk.index]
    trace, skipped = chunk.trace, 0.0
    if trace is not None and trace.blocks:
        skipped = len(settings.steps) * (1 - trace.blocks_computed / trace.blocks)
    row = {
        "chunk": chunk.index,
        "start": chunk.start,
        "latent_frames": chunk.latents.shape[2],
        "given": chunk.given,
        "prompt": current[-1] if current else prompt,
        "seconds": chunk.seconds,
        "kv_bytes": chunk.kv_bytes,
        "evicted": chunk.evicted,
        "recached": chunk.recached,
        "forwards": chunk.forwards,
        "steps_skipped": skipped,
    }
    if settings.kv.offload:
        tiers = settings.store.stats()["tiers"]
        row["tiers"] = {name: tier["bytes"] for name, tier in tiers.items()}
    return row


def save(folder: Path, chunk: Chunk) -> None:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    with complete_file(folder / f"chunk-{chunk.index:04d}.safetensors") as partial:
        save_file({"latents": chunk.latents.cpu().contiguous()}, partial)
