"""Wan2.1 and Wan2.2 (arXiv:2503.20314), text to video and image to video."""

from dataclasses import dataclass
from typing import ClassVar

from ditcache.models.base import Model


@dataclass
class Wan(Model):
    """Text to video. Wan2.2's A14B has two experts split at `boundary`."""

    pipeline: ClassVar[str] = "WanPipeline"


@dataclass
class WanImageToVideo(Model):
    """Image to video: 20 conditioning channels beside the 16 noisy ones, and CLIP tokens in
    Wan2.1.
    """

    pipeline: ClassVar[str] = "WanImageToVideoPipeline"
    needs_image: ClassVar[bool] = True
