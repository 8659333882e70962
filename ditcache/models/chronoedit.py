"""ChronoEdit (arXiv:2510.04290): image editing as a short video from the picture before to the
picture after.
"""

from dataclasses import dataclass
from typing import ClassVar

from ditcache.models.base import Model


@dataclass
class ChronoEdit(Model):
    """5 frames for an edit; the last frame is the edited picture."""

    pipeline: ClassVar[str] = "ChronoEditPipeline"
    needs_image: ClassVar[bool] = True

    def check_size(self, height: int, width: int, num_frames: int) -> None:
        super().check_size(height, width, num_frames)
        if num_frames != 5:
            raise ValueError(f"num_frames: an edit has 5 (no temporal reasoning), got {num_frames}")
