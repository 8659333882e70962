"""What bridge-train leaves: loss curves, the table of controls, the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ditcache.bridge.verdict import deviation
from ditcache.files import complete_file
from ditcache.report.pictures import contact_sheet
from ditcache.report.run_folder import command_line, versions, write_json, write_jsonl, write_text
from ditcache.video import write_png

if TYPE_CHECKING:
    from ditcache.bridge.evaluate import Row
    from ditcache.bridge.train import History
    from ditcache.bridge.verdict import Losses, Verdict
    from ditcache.bridge.videos import Score, Strips
    from ditcache.commands.bridge_train import BridgeTrainSettings

NAMES = {
    "bridge": "bridge",
    "self": "control: self as source",
    "shuffled": "control: shuffled source",
    "router": "control: output router",
    "lora": "control: LoRA of equal size",
}
VIDEO_COLUMNS = {"psnr": "PSNR, dB", "latent": "latents' distance"}
Cells = list[str]


def write_losses(folder: Path, histories: Mapping[str, History]) -> None:
    """losses.jsonl, losses.png, and TensorBoard's own files where it is installed."""
    rows = [
        {"run": run, "step": step, **losses}
        for run, history in histories.items()
        for step, losses in enumerate(history.steps)
    ]
    if not rows:
        return
    write_jsonl(folder / "losses.jsonl", rows)
    draw_losses(folder / "losses.png", histories)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    for run, history in histories.items():
        with SummaryWriter(str(folder / "tensorboard" / run)) as writer:
            for step, losses in enumerate(history.steps):
                for name, loss in losses.items():
                    writer.add_scalar(f"flow loss/{name}", loss, step)


def draw_losses(path: Path, histories: Mapping[str, History]) -> None:
    """Running means relative to the target alone on the same batches, whose noise cancels so."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for run, history in histories.items():
        alone = np.array([losses["target alone"] for losses in history.steps])
        width = min(25, len(alone))
        mean = lambda values, n=width: np.convolve(values, np.ones(n) / n, "valid")  # noqa: E731
        for name in (name for name in history.steps[0] if name != "target alone"):
            own = np.array([losses[name] for losses in history.steps])
            axes.plot(mean(own) / mean(alone) - 1, label=f"{run} {name}", linewidth=1)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="step", ylabel="flow loss against the target alone")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    axes.legend(fontsize=7)
    figure.tight_layout()
    with complete_file(path) as partial:
        figure.savefig(partial, dpi=130)
    plt.close(figure)


def write_bridge_report(
    folder: Path,
    target: str,
    rows: Sequence[Row],
    domain: Sequence[str],
    judged: Sequence[Losses],
    verdicts: Sequence[Verdict],
    settings: BridgeTrainSettings,
) -> None:
    """evaluation-<target>.json and .md, and the same on the terminal."""
    domains = sorted(set(domain), key=list(domain).index)
    head, body = table_of(rows, domain, domains)
    write_json(
        folder / f"evaluation-{target}.json",
        {
            "target": target,
            "command": command_line("bridge-train"),
            "evaluate": settings.evaluate,
            "versions": versions(),
            "domains": list(domain),
            "rows": {
                row.name: {
                    "losses": row.losses.tolist(),
                    "forwards": row.forwards,
                    "parameters": row.parameters,
                    "picked": row.picked,
                    "cost": row.cost,
                }
                for row in rows
            },
            "verdict": {
                v.name: {"passed": v.passed, "question": v.question, "lines": list(v.lines)}
                for v in verdicts
            },
        },
    )
    lines = [*table_lines(head, body), ""]
    for v in verdicts:
        lines += [f"- **{v.name} {v.word}**: {v.question}", *(f"  - {line}" for line in v.lines)]
    write_text(folder / f"evaluation-{target}.md", "\n".join(lines) + "\n")
    print_table(f"held-out flow loss into {target}, lower is better", head, body)
    console = Console(width=max(150, Console().width))
    if not settings.evaluate:
        console.print("controls: the trained bridge with a wrong source; evaluate=true trains them")
    for verdict in verdicts:
        console.print(f"{verdict.name} {verdict.word}: {verdict.question}")
        for line in verdict.lines:
            console.print(f"   {line}")


def write_videos(
    folder: Path, target: str, found: Mapping[str, Sequence[Score]], sheet: Sequence[Strips]
) -> None:
    """videos-<target>.json and .md, and the same on the terminal: means over clips, and over the
    training runs of one method, with the standard error over clips. videos-<target>.png: the sheet.
    """
    named = [
        (caption, [(label_of(name).removeprefix("control: "), frames) for name, frames in strips])
        for caption, strips in sheet
    ]
    write_png(folder / f"videos-{target}.png", contact_sheet(named, 1))
    scores = {name: [one.numbers for one in videos] for name, videos in found.items()}
    write_json(folder / f"videos-{target}.json", scores)
    groups: dict[str, list[list[dict[str, float]]]] = {}
    for name, videos in scores.items():
        groups.setdefault(label_of(name), []).append(videos)
    columns = list(next(iter(scores.values()))[0])
    titles = ["method", *(VIDEO_COLUMNS.get(column, column) for column in columns)]
    body = []
    for label, members in groups.items():
        cells = [label]
        for column in columns:
            per_clip = [fmean(run[column] for run in runs) for runs in zip(*members, strict=True)]
            cells.append(with_error(column, per_clip))
        body.append(cells)
    write_text(folder / f"videos-{target}.md", "\n".join(table_lines(titles, body)) + "\n")
    count = len(next(iter(scores.values())))
    print_table(f"{count} held-out clips rendered whole into {target}", titles, body)


def with_error(column: str, values: Sequence[float]) -> str:
    mean, error = fmean(values), deviation(values) / len(values) ** 0.5
    style = {"latent": ".3f", "psnr": ".1f"}.get(column, ".0%")
    return f"{mean:{style}} ± {error:{style}}"


def table_lines(head: Sequence[str], body: Sequence[Cells]) -> list[str]:
    """Markdown."""
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return [rows[0], "|" + "---|" * len(head), *rows[1:]]


def print_table(title: str, head: Sequence[str], body: Sequence[Cells]) -> None:
    table = Table(title=title)
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index == 0 else "right")
    for cells in body:
        table.add_row(*cells)
    Console(width=max(150, Console().width)).print(table)


def label_of(name: str) -> str:
    """`0|router` -> what the tables call it, whichever training run it is of."""
    number, _, method = name.rpartition("|")
    return NAMES.get(method, method) if number else name


def table_of(
    rows: Sequence[Row], domain: Sequence[str], domains: Sequence[str]
) -> tuple[Cells, list[Cells]]:
    """Head and body: one line per method, training runs of one method as their mean with the spread
    between runs.
    """
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(label_of(row.name), []).append(row)
    head = ["method", *domains, "mean", "forwards", "measured cost", "parameters"]
    body = []
    for label, members in groups.items():
        cells = [f"{label} ({members[0].picked})" if members[0].picked else label]
        for wanted in (*([one] for one in domains), domains):
            chosen = [i for i, d in enumerate(domain) if d in wanted]
            values = [float(row.losses[chosen].mean()) for row in members]
            cells.append(with_spread(values))
        row = members[0]
        cost = "" if row.cost is None else f"{row.cost:.2f}x"
        cells += [f"{row.forwards:g}x", cost, f"{row.parameters:,}"]
        body.append(cells)
    return head, body


def with_spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{fmean(values):.4f}"
    return f"{fmean(values):.4f} ± {deviation(values):.4f}"
