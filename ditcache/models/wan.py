"""Wan2.1 and Wan2.2 (arXiv:2503.20314), text to video and image to video."""

from dataclasses import dataclass
from typing import ClassVar

from ditcache.models.base import Blocks, Model

LAYOUTS = {"WanTransformer3DModel": (Blocks(),)}


@dataclass
class Wan(Model):
    """Text to video. Wan2.2's A14B has two experts split at `boundary`."""

    pipeline: ClassVar[str] = "WanPipeline"
    goes_on: ClassVar[str | None] = "overlap"


@dataclass
class WanImageToVideo(Model):
    """Image to video: 20 conditioning channels beside the 16 noisy ones, and CLIP tokens in
    Wan2.1.
    """

    pipeline: ClassVar[str] = "WanImageToVideoPipeline"
    needs_image: ClassVar[bool] = True
    goes_on: ClassVar[str | None] = "picture"


@dataclass
class WanFirstFrame(WanImageToVideo):
    """Wan2.2 TI2V given a picture: it stands in place of the first latent frame, whose tokens have
    timestep 0. The checkpoint is that of text to video.
    """

    stored_as: ClassVar[str] = "WanPipeline"
