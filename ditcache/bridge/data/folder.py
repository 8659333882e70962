"""A folder of videos with their captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ditcache.bridge.data.base import Data

if TYPE_CHECKING:
    from ditcache.bridge.samples import Samples
    from ditcache.models.base import Bundle

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")


@dataclass(kw_only=True)
class FolderData(Data):
    """`clip.mp4` beside `clip.txt`, its caption; `clip.chrono.txt`, if there, is what ChronoEdit is
    told instead. Folders in it are domains; without any, all clips are of one. A clip's first
    `num_frames` frames count, scaled to the model's size.

    held_out: share of clips kept out of training, half of it to choose settings on and half to
    judge on.
    """

    path: str
    held_out: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: must be between 0 and 1, got {self.held_out}")

    def check(self) -> None:
        self.clips()

    def clips(self) -> list[tuple[Path, str, str, str]]:
        """(video, domain, caption, caption for ChronoEdit), by name. Raises ValueError."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"data.path: no folder '{folder}'")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if len(files) < 3:
            raise ValueError(
                f"data.path: {folder} holds {len(files)} videos ({', '.join(SUFFIXES)}), needs 3"
            )
        found = []
        for file in files:
            caption, own = file.with_suffix(".txt"), file.with_suffix(".chrono.txt")
            if not caption.is_file():
                raise ValueError(f"data.path: {file} has no caption {caption.name} beside it")
            text = caption.read_text(encoding="utf-8").strip()
            chrono = own.read_text(encoding="utf-8").strip() if own.is_file() else text
            domain = file.parent.relative_to(folder).as_posix()
            found.append((file, "clips" if domain == "." else domain, text, chrono))
        domains = {domain for _, domain, _, _ in found}
        for name in ("wan_domain", "chrono_domain"):
            value = getattr(self, name)
            if value is not None and value not in domains:
                raise ValueError(
                    f"data.{name}: {folder} has no folder '{value}'; "
                    f"there are: {', '.join(sorted(domains))}"
                )
        return found

    def prepare(
        self, bundles: Mapping[str, Bundle], *, height: int, width: int, num_frames: int
    ) -> Samples:
        from ditcache.bridge.encode import folder_samples

        size = (height, width, num_frames)
        return folder_samples(bundles, self.clips(), self.held_out, size)
