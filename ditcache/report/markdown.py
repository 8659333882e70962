"""report.md: the report's numbers as text, to read in a terminal or paste into a pull request."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ditcache.report.run_folder import write_text
from ditcache.report.summary import human_bytes

DASH = "–"
KINDS = {
    "a": "A, the reference",
    "b": "B, the candidate",
    "control": "control",
    "fewer_steps": "same compute, plain",
    "noise_floor": "noise floor",
}
METRICS = (
    ("psnr", "PSNR, dB ↑", ".2f"),
    ("ssim", "SSIM ↑", ".4f"),
    ("temporal", "temporal error ↓", ".3g"),
    ("flicker", "flicker ↓", ".3g"),
    ("latent", "latent L2 ↓", ".3g"),
    ("lpips", "LPIPS ↓", ".4f"),
    ("vmaf", "VMAF ↑", ".1f"),
    ("obeyed", "as asked ↑", ".0%"),
)
OPTIONAL = ("lpips", "vmaf", "obeyed")


def write_markdown(folder: Path, report: Mapping[str, Any]) -> None:
    """Write report.md."""
    write_text(folder / "report.md", markdown(report))


def markdown(report: Mapping[str, Any]) -> str:
    arms = report["arms"]
    parts = [
        f"# {plain(report['title'])}",
        f"A {plain(arms['a']['name'])} against B {plain(arms['b']['name'])}, {where(report)}.",
        verdict(report["gate"]),
        "## Summary",
        summary(report["rows"]),
        "Speed-up is the median over pairs, of denoising; compute ratio counts the blocks of a run "
        "without a cache over those that ran. Metrics are means over videos, on raw frames "
        "against A, with their confidence interval in brackets.",
        "## What differs",
        differences(report),
        "## Reproduce",
        fenced(report["command"]),
        "## Pairs, worst first",
        pairs(report["videos"]),
    ]
    if report["notes"]:
        parts += ["## Notes", "\n".join(f"- {plain(note)}" for note in report["notes"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def where(report: Mapping[str, Any]) -> str:
    s, machine = report["settings"], report["machine"]
    seeds = ", ".join(str(seed) for seed in s["seeds"])
    return plain(
        f"on {report['model']}: {s['steps']} steps, guidance {s['guidance']:g}, seeds {seeds}, "
        f"{s['num_frames']} frames of {s['width']}x{s['height']}; "
        f"{machine['device']}, {machine['cpu']}, {machine['threads']} threads; {report['created']}"
    )


def verdict(gate: Mapping[str, Any] | None) -> str:
    if gate is None:
        return ""
    lines = [f"**Gate {'passed' if gate['passed'] else 'failed'}**"]
    return "\n".join([*lines, *(f"- {plain(reason)}" for reason in gate["reasons"])])


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    metrics = [m for m in METRICS if m[0] not in OPTIONAL or any(row.get(m[0]) for row in rows)]
    columns = ["run", "", "steps", "speed-up ↑", "compute ratio", "bound reached"]
    columns += ["denoise", "peak memory", "cache state", *(title for _, title, _ in metrics)]
    return table(columns, [run(row, metrics) for row in rows], text=2)


def run(row: Mapping[str, Any], metrics: Iterable[tuple[str, str, str]]) -> list[str]:
    faster = row["speedup"]
    return [
        plain(row["name"]),
        KINDS[row["kind"]],
        str(row["steps"]),
        DASH if faster is None else spread(faster, "median", ".2f", "x"),
        number(row["compute_ratio"], ".2f", "x"),
        number(row["reached"], ".0%"),
        number(row["seconds"]["denoise"], ".3g", " s"),
        known(row["memory_bytes"], human_bytes),
        known(row["state_bytes"], human_bytes),
        *(score(row, key, style) for key, _, style in metrics),
    ]


def score(row: Mapping[str, Any], key: str, style: str) -> str:
    if row.get(key) is not None and row[key]["mean"] is not None:
        return spread(row[key], "mean", style)
    same = key == "psnr" and row["identical"] and row["kind"] != "a"
    return "identical" if same else DASH


def differences(report: Mapping[str, Any]) -> str:
    if not report["difference"]:
        return "Nothing: A and B are the same configuration."
    names = [f"{arm.upper()} {plain(report['arms'][arm]['name'])}" for arm in ("a", "b")]
    rows = [[code(entry[key]) for key in ("key", "a", "b")] for entry in report["difference"]]
    return table(["setting", *names], rows, text=3)


def pairs(videos: Sequence[Mapping[str, Any]]) -> str:
    columns = ["prompt", "seed", "PSNR, dB", "worst frame, dB", "SSIM", "temporal error"]
    columns += ["latent L2", "speed-up", "A", "B"]
    rows = [
        [
            plain(video["prompt"]),
            str(video["seed"]),
            *(decibel(video, key) for key in ("psnr", "worst_frame")),
            number(video["ssim"], ".4f"),
            *(number(video[key], ".3g") for key in ("temporal", "latent")),
            number(video["speedup"], ".2f", "x"),
            *(plain(video[arm]) for arm in ("a", "b")),
        ]
        for video in sorted(videos, key=badness)
    ]
    return table(columns, rows, text=1)


def badness(video: Mapping[str, Any]) -> tuple[bool, float]:
    """Sorts the worst video first, identical ones last."""
    found = video["psnr"]
    return (bool(video["identical"]), float("inf") if found is None else found)


def decibel(video: Mapping[str, Any], key: str) -> str:
    value = video[key]
    return "identical" if value is None and video["identical"] else number(value, ".2f")


def spread(value: Mapping[str, Any], centre: str, style: str, unit: str = "") -> str:
    text = number(value[centre], style, unit)
    if value["low"] is None or value["high"] is None or value["low"] == value["high"]:
        return text
    return f"{text} ({value['low']:{style}}{DASH}{value['high']:{style}})"


def number(value: float | None, style: str, unit: str = "") -> str:
    return DASH if value is None else f"{value:{style}}{unit}"


def known(value: Any, show: Callable[[Any], str]) -> str:
    return DASH if value is None else show(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, text: int) -> str:
    """The first `text` columns read from the left, numbers from the right."""
    rule = [":--" if index < text else "--:" for index in range(len(columns))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *rows))


def plain(text: str) -> str:
    """One line that Markdown shows as it is."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)


def fence(text: str, least: int) -> str:
    """More backticks than the text has in a row."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def code(text: str) -> str:
    """A table cell in fixed width; a bar is escaped, as GitHub's tables want it."""
    ticks = fence(text, 1)
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{' '.join(text.split())}{pad}{ticks}".replace("|", "\\|")


def fenced(text: str) -> str:
    ticks = fence(text, 3)
    return f"{ticks}\n{text}\n{ticks}"
