"""ChronoEdit (arXiv:2510.04290): image editing as a short video from the picture before to the
picture after.
"""

from dataclasses import dataclass
from typing import ClassVar

from ditcache.models.base import Blocks, Model

LAYOUTS = {"ChronoEditTransformer3DModel": (Blocks(),)}


@dataclass
class ChronoEdit(Model):
    """5 frames for an edit; the last frame is the edited picture.

    reasoning_steps: so many steps at the start also imagine the frames on the way, which are then
    dropped (temporal reasoning; published with 29 frames). With all steps or more they stay, and
    the video shows them, then the edit. 0: none.
    """

    pipeline: ClassVar[str] = "ChronoEditPipeline"
    needs_image: ClassVar[bool] = True

    reasoning_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reasoning_steps < 0:
            raise ValueError(f"reasoning_steps: must be >= 0, got {self.reasoning_steps}")

    def check_size(self, height: int, width: int, num_frames: int) -> None:
        super().check_size(height, width, num_frames)
        if not self.reasoning_steps and num_frames != 5:
            raise ValueError(
                f"num_frames: an edit has 5, got {num_frames}; model.reasoning_steps=10 imagines "
                "more on the way"
            )
        if self.reasoning_steps and num_frames <= 5:
            raise ValueError(
                f"num_frames: with model.reasoning_steps there must be more than 5, such as 29, "
                f"got {num_frames}"
            )
