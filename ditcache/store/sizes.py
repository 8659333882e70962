"""Sizes as people write them: `512MiB`, `1.5GB`, a number of bytes, or null for no limit."""

from __future__ import annotations

import re

UNITS = {
    "B": 1,
    **{f"{letter}iB": 1024**n for n, letter in enumerate("KMGT", 1)},
    **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)},
}
BY_NAME = {unit.lower(): factor for unit, factor in UNITS.items()}
FORM = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def read_size(name: str, size: float | str | None) -> int | None:
    """Bytes; None has no limit. name: of the setting, for the message.

    Raises ValueError with the allowed forms.
    """
    if size is None:
        return None
    if isinstance(size, int) and size >= 0 and not isinstance(size, bool):
        return size
    found = FORM.fullmatch(str(size).strip()) if isinstance(size, str) else None
    number, unit = found.groups() if found else ("", "")
    factor = BY_NAME.get(unit.lower()) if unit else 1 if "." not in number else None
    if not number or factor is None:
        raise ValueError(
            f"{name}: must be bytes or a size such as 512MiB, 2GiB, 1.5GB (units {', '.join(UNITS)}"
            f"), 0 (tier off) or null (no limit), got {size!r}"
        )
    return int(float(number) * factor) if "." in number else int(number) * factor
