"""The output folder of one run. A file appears in it only when it is complete."""

from __future__ import annotations

import json
import math
import platform
import shlex
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ditcache.files import complete_file

PACKAGES = ("ditcache", "torch", "diffusers", "transformers", "hydra-core", "omegaconf", "numpy")


def open_run_folder(config_yaml: str) -> Path:
    """Hydra's output folder of this job, with the resolved configuration in it."""
    from hydra.core.hydra_config import HydraConfig

    folder = Path(HydraConfig.get().runtime.output_dir)
    write_text(folder / "config.yaml", config_yaml)
    return folder


def chosen_options() -> dict[str, str]:
    """Config group -> the option chosen for it on the command line, e.g. cache -> taylorseer."""
    from hydra.core.hydra_config import HydraConfig

    return {str(group): str(option) for group, option in HydraConfig.get().runtime.choices.items()}


def command_line(command: str) -> str:
    """Of this job; without arguments where Hydra has not started it."""
    from hydra.core.hydra_config import HydraConfig

    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return shlex.join(["ditcache", command, *map(str, given)])


def write_text(path: Path, text: str) -> None:
    with complete_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Strict JSON: infinity and NaN become null."""
    write_text(
        path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(
        path,
        "".join(
            json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows
        ),
    )


def finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def versions() -> dict[str, str]:
    """Python, platform and the packages that can change a number."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
