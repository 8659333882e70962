"""The report's files and its table on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditcache.report.markdown import write_markdown
from ditcache.report.page import write_page
from ditcache.report.run_folder import write_json
from ditcache.report.summary import human_bytes


def write_report(folder: Path, report: dict[str, Any]) -> None:
    write_json(folder / "report.json", report)
    write_markdown(folder, report)
    write_page(folder, report)


def print_report(folder: Path, report: dict[str, Any]) -> None:
    """One row per arm: speed-up beside the compute ratio, quality with its interval."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    cases = len(report["videos"])
    title = f"{report['title']}: {cases} case(s), {report['settings']['steps']} steps"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    bridged = report["settings"].get("bridge") is not None
    last = ("as asked",) if bridged else ("worst", "SSIM", "kept")
    for column in ("", "compute", "speed-up", "PSNR dB", *last):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in report["rows"]:
        table.add_row(*cells(row, bridged=bridged))
    console = Console()
    console.print(table)
    b = next(row for row in report["rows"] if row["kind"] == "b")
    console.print(
        "compute: blocks of an uncached run over blocks run; speed-up: of denoising,\n"
        f"median over cases, {100 * b['reached']:.0f} % of what its blocks allow; PSNR,\n"
        "SSIM: raw frames against a, mean (95 % interval over cases)",
        style="dim",
    )
    for note in report["notes"]:
        console.print(note, highlight=False)
    if report["gate"] is not None:
        verdict = "passed" if report["gate"]["passed"] else "FAILED"
        console.print(f"gate {verdict}: {'; '.join(report['gate']['reasons'])}", highlight=False)
    console.print(str(folder / "report.html"), style="bold", highlight=False, soft_wrap=True)


def cells(row: dict[str, Any], *, bridged: bool) -> list[str]:
    """bridged: instead of how near to a: does the video show what its caption asks for."""
    speed = "1.00x" if row["speedup"] is None else f"{row['speedup']['median']:.2f}x"
    found = [row["name"], f"{row['compute_ratio']:.2f}x", speed]
    psnr, ssim = row["psnr"], row["ssim"]
    if row["kind"] == "a":
        near = ["", "", ""]
    elif row["identical"]:
        near = ["identical", "", "1"]
    else:
        spread = f"{psnr['mean']:.1f} ({psnr['low']:.1f}-{psnr['high']:.1f})"
        near = [spread, f"{psnr['worst']:.1f}", f"{ssim['mean']:.4f}"]
    if bridged:
        return [*found, near[0], "" if row["obeyed"] is None else f"{row['obeyed']['mean']:.0%}"]
    return [*found, *near, human_bytes(row["state_bytes"])]
