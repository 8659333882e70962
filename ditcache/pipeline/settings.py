"""The keys of conf/sampling.yaml, which every command that renders has. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditcache.errors import ConfigError
from ditcache.models.base import Bundle, Model
from ditcache.prompts import Prompts, choose_prompts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(kw_only=True)
class SamplingSettings:
    """What to render and how to sample it; `texts` are the prompts in the end, and `pictures` the
    file that each starts from, for image-conditioned models.
    """

    model: Model
    prompts: Prompts
    steps: int
    guidance: float
    height: int
    width: int
    num_frames: int
    prompt: Any = None
    prompt_file: str | None = None
    negative_prompt: str = ""
    image: str | None = None
    seed: int = 0
    guidance_low: float | None = None
    shift: float | None = None
    texts: list[str] = field(init=False)
    pictures: list[Path | None] = field(init=False)

    def __post_init__(self) -> None:
        if self.model.causal:
            raise ValueError(
                "model: this one generates chunk by chunk and not whole clips; use `ditcache "
                "rollout`"
            )
        for name, low in (("steps", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: must be >= {low}, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed: must be < 2**63, got {self.seed}")
        for name in ("guidance", "guidance_low", "shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1000:
                raise ValueError(f"{name}: must be > 0, got {value}")
        self.model.check_size(self.height, self.width, self.num_frames)
        self.texts = choose_prompts(self.prompt, self.prompt_file, self.prompts)
        if not self.model.needs_image and self.image is not None:
            raise ValueError("image: this model does not take a picture; set image=null")
        self.pictures = [None] * len(self.texts)
        if self.model.needs_image:
            self.pictures = choose_pictures(self.image or self.model.own_picture, self.texts)
        if self.guidance <= 1 and self.negative_prompt != self.model.negative_prompt:
            raise ValueError("negative_prompt: has no effect without guidance; set guidance > 1")
        if self.guidance <= 1 and self.guidance_low != self.model.guidance_low:
            raise ValueError("guidance_low: has no effect without guidance; set guidance > 1")


OVERLAP = 3  # latent frames; chosen by eye and by the jumps at the joins, see docs/long-video.md


@dataclass(kw_only=True)
class VideoSettings(SamplingSettings):
    """Sampling settings of commands that render whole videos, which may have several segments.

    segments: each of `num_frames`, going on from the one before. overlap: latent frames that a
    segment of a text-to-video model takes over (None: 3, or as many as leave one to make).
    """

    segments: int = 1
    overlap: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments < 1:
            raise ValueError(f"segments: must be >= 1, got {self.segments}")
        if self.segments == 1:
            if self.overlap is not None:
                raise ValueError("overlap: has no effect on one segment; set segments > 1")
            return
        name = type(self.model).__name__
        if self.model.goes_on is None:
            raise ValueError(
                f"segments: {name} cannot go on from an earlier segment, it makes one picture of "
                "another; set segments=1"
            )
        if self.model.goes_on == "picture" and self.overlap is not None:
            raise ValueError(
                f"overlap: {name} goes on from the last picture of a segment, not from latent "
                "frames; set overlap=null"
            )
        most = (self.num_frames - 1) // 4  # one latent frame at least is new
        if most < 1:
            raise ValueError("num_frames: a segment needs 5 or more to go on from another, got 1")
        if self.overlap is not None and not 1 <= self.overlap <= most:
            raise ValueError(
                f"overlap: must be from 1 to {most} latent frames of the {most + 1} that "
                f"num_frames={self.num_frames} has, got {self.overlap}"
            )

    @property
    def held(self) -> int:
        """Latent frames that a segment takes over."""
        return self.overlap or min(OVERLAP, (self.num_frames - 1) // 4)

    @property
    def total_frames(self) -> int:
        """Frames of the whole video."""
        new = self.num_frames - 1
        if self.model.goes_on == "overlap":
            new -= 4 * (self.held - 1)
        return self.num_frames + (self.segments - 1) * new


def choose_pictures(image: str | None, texts: list[str]) -> list[Path | None]:
    """One picture for all prompts, or a folder's by order of names. Raises ValueError."""
    if image is None:
        raise ValueError("image: this model starts from a picture; set image=<file or folder>")
    path = Path(image).expanduser()
    if not path.is_dir():
        return [path] * len(texts)
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if len(found) != len(texts):
        raise ValueError(
            f"image: {path} holds {len(found)} pictures for {len(texts)} prompts; needs one each"
        )
    return list(found)


def check_bundle(bundle: Bundle, settings: SamplingSettings) -> None:
    """What only the loaded model knows: how many experts it has, how long its position tables are.

    A setting that would have no effect is refused. Raises ConfigError.
    """
    if len(bundle.experts) == 1:
        for name, value in (
            ("guidance_low", settings.guidance_low),
            ("model.boundary", settings.model.boundary),
        ):
            if value is not None:
                raise ConfigError(f"{name}: this model has one expert; set {name}=null")
    elif bundle.boundary is None:
        raise ConfigError("model.boundary: the checkpoint does not say where its experts divide")
    config, vae = bundle.pipe.transformer.config, bundle.pipe.vae.config
    sizes = (
        ("num_frames", settings.num_frames, vae.scale_factor_temporal * config.patch_size[0]),
        ("height", settings.height, vae.scale_factor_spatial * config.patch_size[1]),
        ("width", settings.width, vae.scale_factor_spatial * config.patch_size[2]),
    )
    for name, value, unit in sizes:
        most = config.rope_max_seq_len * unit
        if value > most:
            raise ConfigError(f"{name}: this model's position tables end at {most}, got {value}")
