"""After a sweep: one table, one CSV, one page over all of its jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditcache.report.jobs import read_reports, setting_of, write_csv

COLUMNS = (
    "job", "setting", "compute_ratio", "speedup", "psnr", "psnr_low", "psnr_high", "psnr_worst",
    "ssim", "temporal", "latent", "state_bytes", "memory_bytes", "front", "identical",
)  # fmt: skip


def collect(folder: Path) -> list[dict[str, Any]]:
    """sweep.csv, sweep.json and report.html in a sweep's folder, from its jobs' reports; prints the
    table. Returns the rows, fastest first; none if fewer than two jobs finished.
    """
    reports = read_reports(folder)
    if len(reports) < 2:
        return []
    rows = rows_of(reports)
    write_csv(folder / "sweep.csv", COLUMNS, rows)
    write_sweep(folder, reports, rows)
    show(folder, rows)
    return rows


def rows_of(reports: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per job: its b, and whether it is on the front."""
    from ditcache.report.pareto import mark_front

    points = mark_front([point_of(reports, job) for job in reports])
    rows = []
    for (job, report), point in zip(reports.items(), points, strict=True):
        b = next(row for row in report["rows"] if row["kind"] == "b")
        psnr = b["psnr"] or {}
        rows.append(
            {
                "job": job,
                "setting": point["name"],
                "compute_ratio": b["compute_ratio"],
                "speedup": b["speedup"]["median"],
                **{f"psnr{end}": psnr.get(part) for end, part in PSNR.items()},
                **{name: (b[name] or {}).get("mean") for name in ("ssim", "temporal", "latent")},
                "state_bytes": b["state_bytes"],
                "memory_bytes": b["memory_bytes"],
                "front": point["front"],
                "identical": b["identical"],
            }
        )
    return sorted(rows, key=lambda row: row["speedup"])


PSNR = {"": "mean", "_low": "low", "_high": "high", "_worst": "worst"}


def point_of(reports: dict[str, dict[str, Any]], job: str) -> dict[str, Any]:
    own = next(p for p in reports[job]["points"] if p["kind"] == "b")
    return {**own, "kind": "sweep", "name": setting_of(reports, job)}


def write_sweep(folder: Path, reports: dict[str, dict[str, Any]], rows: list[dict]) -> None:
    """A page like a single run's, whose rows and points are the jobs; its videos are in theirs."""
    from ditcache.report.page import write_page
    from ditcache.report.run_folder import write_json

    first = next(iter(reports.values()))
    pages = ", ".join(f"{job}/report.html" for job in reports)
    front = {row["job"]: row["front"] for row in rows}
    table = [row for row in first["rows"] if row["kind"] == "a"]
    points = [p for p in first["points"] if p["kind"] != "b"]
    for job, report in reports.items():
        own = next(row for row in report["rows"] if row["kind"] == "b")
        table.append({**own, "name": setting_of(reports, job)})
        points.append({**point_of(reports, job), "front": front[job]})
    table += [row for row in first["rows"] if row["kind"] not in ("a", "b")]
    page = {
        **first,
        "title": f"sweep of {len(reports)} settings on {first['model']}",
        "rows": table,
        "points": points,
        "videos": [],
        "difference": [],
        "gate": None,
        "notes": [f"The videos are in the jobs' own pages: {pages}."],
    }
    write_json(folder / "sweep.json", page)
    write_page(folder, page)


def show(folder: Path, rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title="sweep, slowest first", title_justify="left", box=SIMPLE_HEAD)
    for name in ("setting", "compute", "speed-up", "PSNR dB", "worst", "SSIM", "front"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for row in rows:
        quality = ["identical", "", ""]
        if not row["identical"]:
            quality = [f"{row['psnr']:.1f}", f"{row['psnr_worst']:.1f}", f"{row['ssim']:.4f}"]
        figures = [f"{row['compute_ratio']:.2f}x", f"{row['speedup']:.2f}x"]
        table.add_row(row["setting"], *figures, *quality, "*" if row["front"] else "")
    console = Console()
    console.print(table)
    console.print(str(folder / "report.html"), style="bold", highlight=False, soft_wrap=True)
