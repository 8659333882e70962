"""Pictures of a run: the strip of computed and skipped steps, contact sheets, captioned
side-by-side video.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ditcache.video import to_uint8

PAPER, INK, PALE = (250, 250, 247), (38, 50, 72), (222, 226, 232)
CELL, MARGIN, LINE = 14, 12, 18


def font(size: int = 12) -> Any:
    return ImageFont.load_default(size)


def cache_map(rows: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Decisions (lines of steps.jsonl) -> uint8 picture: a strip per video, segment, expert, branch
    and unit, a cell per step.

    A full cell was computed; an empty one with a dot was skipped.
    """
    strips: dict[tuple, dict[int, bool]] = {}
    for row in rows:
        key = (row["video"], row["segment"], row["expert"], row["branch"], row["unit"])
        strips.setdefault(key, {})[row["step"]] = row["computed"]
    steps = 1 + max((max(strip) for strip in strips.values()), default=0)
    label = 8 + max((int(font().getlength(strip_name(key))) for key in strips), default=0)
    size = (2 * MARGIN + label + steps * CELL, 2 * MARGIN + LINE * 2 + len(strips) * CELL)
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN - 4), "full: computed, dot: skipped; a column per step", INK, font())
    for line, (key, strip) in enumerate(sorted(strips.items())):
        y = MARGIN + LINE + line * CELL
        draw.text((MARGIN, y), strip_name(key), INK, font(11))
        for step, computed in strip.items():
            x = MARGIN + label + step * CELL
            box = (x, y, x + CELL - 2, y + CELL - 2)
            draw.rectangle(box, fill=INK if computed else PALE)
            if not computed:
                draw.ellipse((x + 5, y + 5, x + 7, y + 7), fill=INK)
    return np.asarray(image)


def strip_name(key: tuple) -> str:
    video, segment, expert, branch, unit = key
    part = f"  segment {segment}" if segment else ""
    return f"video {video}{part}  {expert}  {branch}  unit {unit}"


def sample(frames: np.ndarray, count: int = 7) -> np.ndarray:
    """A few frames of a video [T, H, W, 3], evenly spread, thinned to 256 pixels a side."""
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    stride = -(-max(frames.shape[1:3]) // 256)
    return chosen[:, ::stride, ::stride].copy()


def contact_sheet(
    entries: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]], upscale: int = 2
) -> np.ndarray:
    """(caption, [(label, frames [n, H, W, 3] in 0..1), ...]) per video -> uint8 picture.

    With two rows a third shows their difference, eight times enlarged in brightness.
    """
    blocks = []
    for caption, rows in entries:
        strips = list(rows)
        if len(strips) == 2:
            strips.append(("difference x 8", np.abs(strips[1][1] - strips[0][1]) * 8))
        pictures = [
            labelled(label, np.concatenate(list(to_uint8(f, upscale)), 1)) for label, f in strips
        ]
        blocks.append(captioned(np.concatenate(pictures, 0), caption))
    width = max(block.shape[1] for block in blocks)
    return np.concatenate([pad_width(block, width) for block in blocks], 0)


def labelled(label: str, strip: np.ndarray, width: int = 150) -> np.ndarray:
    """A strip with its name at the left."""
    side = Image.new("RGB", (width, strip.shape[0]), PAPER)
    ImageDraw.Draw(side).multiline_text((MARGIN, 8), label, INK, font(), spacing=4)
    return np.concatenate([np.asarray(side), strip], 1)


def captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    """A picture with its caption above, wrapped to its width."""
    lines = wrap(caption, picture.shape[1] - 2 * MARGIN)
    bar = Image.new("RGB", (picture.shape[1], MARGIN + LINE * len(lines)), PAPER)
    ImageDraw.Draw(bar).multiline_text(
        (MARGIN, MARGIN // 2), "\n".join(lines), INK, font(13), spacing=4
    )
    return np.concatenate([np.asarray(bar), picture], 0)


def wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font(13).getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def pad_width(picture: np.ndarray, width: int) -> np.ndarray:
    return np.concatenate([picture, paper(len(picture), width - picture.shape[1])], 1)


def side_by_side(caption: str, rows: Sequence[tuple[str, np.ndarray]], upscale: int) -> np.ndarray:
    """Videos [T, H, W, 3] in 0..1 next to each other, each under its label -> uint8."""
    videos = [to_uint8(frames, upscale) for _, frames in rows]
    blanks = [np.zeros((0, video.shape[2], 3), np.uint8) for video in videos]
    heads = [captioned(blank, label) for blank, (label, _) in zip(blanks, rows, strict=True)]
    height = max(head.shape[0] for head in heads)
    heads = [np.concatenate([h, paper(height - h.shape[0], h.shape[1])], 0) for h in heads]
    title = captioned(np.concatenate(heads, 1), caption)
    titles = np.broadcast_to(title, (len(videos[0]), *title.shape))
    return np.concatenate([titles, np.concatenate(videos, 2)], 1)


def paper(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), PAPER, np.uint8)
