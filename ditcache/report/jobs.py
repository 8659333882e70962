"""What the tables over the jobs of a sweep share. Does not import torch."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ditcache.files import complete_file


def read_reports(
    folder: Path, name: str = "report.json", command: str = "ab-test"
) -> dict[str, dict[str, Any]]:
    """Job -> report, by number; one that cannot be read is named and left out."""
    found = {}
    for path in folder.glob(f"*/{name}"):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(report, dict) or "command" not in report:
                raise ValueError("not a report")
            found[path.parent.name] = report
        except ValueError:
            print(f"ditcache {command}: {path} is damaged and left out", file=sys.stderr)
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def setting_of(reports: Mapping[str, Mapping[str, Any]], job: str) -> str:
    """What this job has that others have not: its words on the command line."""
    words = {name: shlex.split(report["command"])[2:] for name, report in reports.items()}
    shared = set.intersection(*(set(own) for own in words.values()))
    return " ".join(word for word in words[job] if word not in shared) or job


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with complete_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
