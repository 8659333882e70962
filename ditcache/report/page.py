"""report.html: one static page that opens from disk and fetches nothing but the videos beside it.

The page is page.html with the report's dictionary (report.schema.json) embedded as JSON; its script
draws everything from that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditcache.report.run_folder import finite, write_text

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "{{data}}"


def write_page(folder: Path, report: Mapping[str, Any]) -> None:
    """Write report.html; paths in `report` are relative to `folder`."""
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACE)
    write_text(folder / "report.html", before + embedded(report) + after)


def embedded(value: Mapping[str, Any]) -> str:
    """JSON that can neither end nor open an HTML element or comment.

    Pure ASCII, so that line separators such as U+2028 and unpaired surrogates are escaped too.
    """
    text = json.dumps(finite(value), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
