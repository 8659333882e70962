"""Where prompts come from: the command line, a file, or a group of conf/prompts. Does not import
torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Prompts:
    """A named list of prompts (conf/prompts)."""

    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("texts: needs at least one prompt")


def choose_prompts(prompt: Any, prompt_file: str | None, group: Prompts) -> list[str]:
    """`prompt` (text or list) if given, else the lines of `prompt_file`, else the group. Raises
    ValueError.
    """
    if prompt is not None and prompt_file is not None:
        raise ValueError("prompt_file: give either prompts or a file of prompts, not both")
    if prompt_file is not None:
        return read_prompts(Path(prompt_file).expanduser())
    chosen = group.texts if prompt is None else prompt if isinstance(prompt, list) else [prompt]
    texts = [str(text).strip() for text in chosen]
    if not texts or not all(texts):
        raise ValueError("prompt: must not be empty")
    return texts


def read_prompts(path: Path) -> list[str]:
    """Lines of a UTF-8 file without blank ones and `#` comments."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"prompt_file: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"prompt_file: {path} is not a UTF-8 text file") from None
    texts = [line for line in lines if line and not line.startswith("#")]
    if not texts:
        raise ValueError(f"prompt_file: {path} has no prompts")
    return texts
