"""After a sweep of bridge-train: one table over all of its jobs. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ditcache.bridge.verdict import Difference, Verdict, deviation, paired
from ditcache.report.bridge import with_spread
from ditcache.report.jobs import read_reports, setting_of, write_csv
from ditcache.report.markdown import plain, table
from ditcache.report.run_folder import write_text

Report = dict[str, Any]  # evaluation-<target>.json
TARGET = "target alone"
REFERENCES = {TARGET: TARGET, "source alone": "source alone", "router": "output router"}
VERDICTS = ("P1", "P2", "P3")
AGAINST = "composite - target"
NOTE = (
    "Held-out flow loss, lower is better: mean over training runs ± spread between them. "
    f"`{AGAINST}`: paired difference on clips that need both skills, mean over training runs ± "
    "standard error over clips. Reference lines are the first job's."
)


@dataclass
class Line:
    """A job's bridge, or a method beside it (job empty). losses: domain, or `mean` -> one number
    per training run. composite: from the target alone, where there are such clips.
    """

    job: str
    setting: str
    target: str
    parameters: int
    losses: dict[str, list[float]]
    composite: Difference | None
    cost: float | None
    verdicts: dict[str, str]

    @property
    def mean(self) -> float:
        return fmean(self.losses["mean"])


def collect(folder: Path) -> list[Line]:
    """sweep.md and sweep.csv in a sweep's folder, from its jobs' evaluations; prints the table.
    Returns its lines; none if fewer than two jobs finished.
    """
    names = sorted({path.name for path in folder.glob("*/evaluation-*.json")})
    sides = [read_reports(folder, name, "bridge-train") for name in names]
    jobs = {job: report for reports in sides for job, report in reports.items()}
    if len(jobs) < 2:
        return []
    settings = {job: setting_of(jobs, job) for job in jobs}
    lines = [line for reports in sides if reports for line in lines_of(reports, settings)]
    warnings = [note for reports in sides if reports for note in unequal(reports, settings)]
    domains = list(dict.fromkeys(name for line in lines for name in line.losses if name != "mean"))
    write_csv(folder / "sweep.csv", *csv_of(lines, domains))
    head, body = cells_of(lines, domains)
    notes = [NOTE, *map(plain, warnings)]
    write_text(folder / "sweep.md", "\n\n".join([table(head, body, text=2), *notes]) + "\n")
    show(folder, lines, head, body, warnings)
    return lines


def lines_of(reports: dict[str, Report], settings: dict[str, str]) -> list[Line]:
    """Into one target: what it is compared with, then the jobs, best first. Clips are the same in
    all jobs, and so are the references: each is taken from the first job that has it.
    """
    lines = []
    for method, setting in REFERENCES.items():
        has = [report for report in reports.values() if rows_of(report, method)]
        if has:
            lines.append(line_of(has[0], method, setting))
    own = [line_of(report, "bridge", settings[job], job) for job, report in reports.items()]
    return lines + sorted(own, key=lambda line: (math.isnan(line.mean), line.mean))


def line_of(report: Report, method: str, setting: str, job: str = "") -> Line:
    rows = rows_of(report, method)
    runs, (alone,) = losses_of(rows), losses_of(rows_of(report, TARGET))
    clips = {"mean": list(range(len(alone)))}
    for index, domain in enumerate(report["domains"]):
        clips.setdefault(domain, []).append(index)
    losses = {name: [fmean(run[i] for i in own) for run in runs] for name, own in clips.items()}
    both = clips.get("composite", [])
    composite = None
    if len(both) > 1 and method != TARGET:
        composite = paired([fmean(run[i] for run in runs) for i in both], [alone[i] for i in both])
    found = report["verdict"] if job else {}
    words = {name: Verdict(name, "", told["passed"], ()).word for name, told in found.items()}
    first = rows[0]
    return Line(
        job, setting, report["target"], first["parameters"], losses, composite, first["cost"], words
    )


def rows_of(report: Report, method: str) -> list[dict[str, Any]]:
    """One per training run."""
    return [row for name, row in report["rows"].items() if name.rpartition("|")[2] == method]


def losses_of(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Per run and clip. JSON has null for what is not a number."""
    return [[math.nan if loss is None else loss for loss in row["losses"]] for row in rows]


def unequal(reports: dict[str, Report], settings: dict[str, str]) -> list[str]:
    """A warning where jobs were judged on other clips than the first: the target alone tells."""
    alone = {job: losses_of(rows_of(report, TARGET))[0] for job, report in reports.items()}
    first = next(iter(alone.values()))
    other = [settings[job] for job, losses in alone.items() if not alike(losses, first)]
    if not other:
        return []
    side = next(iter(reports.values()))["target"]
    return [
        f"Not comparable, judged into {side} on other clips than the first job: {', '.join(other)}"
    ]


def alike(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Up to what another precision changes."""
    return len(losses) == len(others) and all(
        math.isclose(a, b, rel_tol=0.02) for a, b in zip(losses, others, strict=True)
    )


def cells_of(lines: Sequence[Line], domains: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table."""
    head = ["setting", "into", "parameters", *domains, "mean", AGAINST, "measured cost"]
    body = [
        [
            plain(line.setting),
            line.target,
            f"{line.parameters:,}",
            *(with_spread(line.losses[d]) if d in line.losses else "" for d in (*domains, "mean")),
            "" if line.composite is None else str(line.composite),
            "" if line.cost is None else f"{line.cost:.2f}x",
            *(line.verdicts.get(name, "") for name in VERDICTS),
        ]
        for line in lines
    ]
    return [*head, *VERDICTS], body


def csv_of(
    lines: Sequence[Line], domains: Sequence[str]
) -> tuple[list[str], list[dict[str, object]]]:
    """Columns and rows."""
    rows = []
    for line in lines:
        row: dict[str, object] = {
            "job": line.job,
            "setting": line.setting,
            "target": line.target,
            "parameters": line.parameters,
        }
        for name in (*domains, "mean"):
            runs = line.losses.get(name)
            row[name] = fmean(runs) if runs else None
            row[f"{name}_spread"] = deviation(runs) if runs and len(runs) > 1 else None
        row["composite_difference"] = line.composite.mean if line.composite else None
        row["composite_error"] = line.composite.error if line.composite else None
        row["cost"] = line.cost
        rows.append(row | {name: line.verdicts.get(name) for name in VERDICTS})
    return list(rows[0]), rows


def show(
    folder: Path, lines: Sequence[Line], head: list[str], body: list[list[str]], warnings: list[str]
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = "sweep: held-out flow loss, lower is better; first what it is compared with"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(head):
        shown.add_column(name, justify="left" if index < 2 else "right")
    for index, (line, cells) in enumerate(zip(lines, body, strict=True)):
        ends = index + 1 < len(lines) and bool(line.job) != bool(lines[index + 1].job)
        shown.add_row(escape(line.setting), *cells[1:], end_section=ends)
    needed = Console(width=1000).measure(shown).maximum
    console = Console(width=max(needed, Console().width))
    console.print(shown)
    for warning in warnings:
        console.print(warning, markup=False, highlight=False)
    console.print(str(folder / "sweep.md"), style="bold", highlight=False, soft_wrap=True)
