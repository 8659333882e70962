"""What a model is: where its weights are, how it likes to be run, and, once loaded, which parts do
what.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar

from ditcache.errors import ConfigError, DitcacheError, one_of

if TYPE_CHECKING:
    from torch import nn

ZOO = Path(__file__).parent.parent / "zoo"
DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "group")


@dataclass(frozen=True)
class Architecture:
    """Shapes of a Wan-like model, to plan with before it is loaded. Parameters in numbers of them.

    width = heads * head_dim; ffn: hidden width of the feed-forward. channels: of the latents.
    spatial: pixels per latent pixel, of which 2x2 make a token; 4 frames per latent frame after the
    first. text: tokens that cross-attention sees, and their width; image: likewise, from an image
    encoder (0: none).
    """

    layers: int
    heads: int
    head_dim: int
    ffn: int
    channels: int = 16
    spatial: int = 8
    text: tuple[int, int] = (512, 4096)
    image: tuple[int, int] = (0, 0)
    experts: int = 1
    text_encoder: int = 5_680_910_336  # UMT5-XXL's encoder
    image_encoder: int = 0
    vae: int = 126_892_531

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Of one expert's transformer: matrices, without biases and norms."""
        d, picture = self.width, 2 if self.image[0] else 0
        block = (8 + picture) * d * d + 2 * d * self.ffn
        embeddings = (self.text[1] + 256 + self.image[1] + 10 * d) * d
        return self.layers * block + embeddings

    def tokens(self, height: int, width: int, num_frames: int) -> int:
        side = 2 * self.spatial
        return ((num_frames - 1) // 4 + 1) * (height // side) * (width // side)

    def flops(self, tokens: int) -> int:
        """Of one forward over `tokens`."""
        d, seen = self.width, self.text[0] + self.image[0]
        linear = 2 * tokens * (6 * d * d + 2 * d * self.ffn) + 4 * seen * d * d
        attention = 4 * tokens * (tokens + seen) * d
        return self.layers * (linear + attention)


@dataclass
class Model:
    """Base of all models: a diffusers pipeline to load and the settings its authors recommend.

    path: a folder in diffusers layout, a hub id (`org/name`), or `zoo:<name>` for an embedded
    checkpoint. dtype: of transformer and text encoder; vae_dtype: of the VAE. device: `auto`,
    `cpu`, `cuda`, `cuda:1`, ... offload: `none`; `model` keeps only the part at work on the GPU;
    `group` only the transformer layers at work. guidance_low: guidance of the low-noise expert
    (None: the same). boundary: share of the noise range at which the low-noise expert takes over
    (None: what the checkpoint says). shift: of the flow schedule (None: likewise). size_multiple:
    height and width must be multiples of it. calibration: an option of conf/calibration or a YAML
    file, with the constants some policies need. architecture: shapes for `plan=true`.
    """

    pipeline: ClassVar[str]  # class of diffusers that loads and conditions it
    needs_image: ClassVar[bool] = False
    causal: ClassVar[bool] = False  # generates chunk by chunk, see causal.py
    stored_as: ClassVar[str | None] = None  # the class that the checkpoint names, where it differs
    # How a segment of a long video goes on from the one before: from its last latent frames
    # ("overlap"), from its last picture ("picture"), or not at all (None).
    goes_on: ClassVar[str | None] = None

    path: str
    dtype: str = "bfloat16"
    vae_dtype: str = "float32"
    device: str = "auto"
    offload: str = "none"
    vae_tiling: bool = False
    height: int = 480
    width: int = 832
    num_frames: int = 81
    steps: int = 50
    guidance: float = 5.0
    guidance_low: float | None = None
    shift: float | None = None
    boundary: float | None = None
    negative_prompt: str = ""
    size_multiple: int = 16
    upscale: int = 1
    calibration: str | None = None
    architecture: Architecture | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("vae_dtype", DTYPES), ("offload", OFFLOADS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: no '{value}'. {one_of(value, allowed)}")
        if self.boundary is not None and not 0 < self.boundary < 1:
            raise ValueError(f"boundary: must be between 0 and 1, got {self.boundary}")
        if self.upscale < 1:
            raise ValueError(f"upscale: must be >= 1, got {self.upscale}")

    @property
    def folder(self) -> Path | None:
        """The local folder `path` means, or None for a hub id. Raises ConfigError if it should
        exist and does not.
        """
        if self.path.startswith("zoo:"):
            folder, name = ZOO / self.path[4:], self.path[4:]
            if not (folder / "model_index.json").is_file():
                names = [index.parent.name for index in ZOO.glob("*/model_index.json")]
                raise ConfigError(f"model.path: the zoo has no '{name}'. {one_of(name, names)}")
            return folder
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            return folder
        if self.path.count("/") != 1 or self.path[0] in "./~":
            raise ConfigError(
                f"model.path: no folder '{self.path}'; give a diffusers folder, a hub id or "
                "zoo:wan-tiny"
            )
        return None

    @property
    def own_picture(self) -> str | None:
        """What an embedded image-conditioned model starts from if it is given nothing."""
        picture = ZOO / self.path[4:] / "picture.png"
        return str(picture) if self.path.startswith("zoo:") and picture.is_file() else None

    def check_folder(self) -> None:
        """Whether a local folder holds the pipeline this model loads; reads no weights and does not
        import torch.
        """
        folder = self.folder
        if folder is None:
            return
        index = folder / "model_index.json"
        if not index.is_file():
            raise ConfigError(
                f"model.path: {folder} has no model_index.json; it is no diffusers pipeline folder"
            )
        try:
            found = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        except (json.JSONDecodeError, AttributeError, UnicodeDecodeError):
            raise ConfigError(f"model.path: {index} is damaged") from None
        if found != (self.stored_as or self.pipeline):
            raise ConfigError(
                f"model.path: {folder} holds a {found}, this model loads a "
                f"{self.stored_as or self.pipeline}"
            )

    def check_size(self, height: int, width: int, num_frames: int) -> None:
        """Raises ValueError for a size the model cannot make, naming the nearest ones it can."""
        unit = self.size_multiple
        for name, value in (("height", height), ("width", width)):
            if value < unit or value % unit:
                low = max(value // unit, 1) * unit
                near = f"{low} or {low + unit}"
                raise ValueError(
                    f"{name}: must be a multiple of {unit}, got {value}; nearest: {near}"
                )
        if num_frames < 1 or (num_frames - 1) % 4:
            low = max((num_frames - 1) // 4, 0) * 4 + 1
            raise ValueError(
                f"num_frames: must be 4n + 1, got {num_frames}; nearest: {low} or {low + 4}"
            )


@dataclass
class Bundle:
    """A loaded model: the diffusers pipeline and what the loop needs to know of it."""

    model: Model
    pipe: Any

    @property
    def experts(self) -> dict[str, Any]:
        """`transformer` (high noise, or the only one) and `transformer_2` (low noise)."""
        return transformers_of(self.pipe)

    @property
    def boundary(self) -> float | None:
        """Share of the noise range below which the second expert works, or None for one expert."""
        if len(self.experts) < 2:
            return None
        return self.model.boundary or self.pipe.config.boundary_ratio

    @property
    def device(self) -> Any:
        return self.pipe._execution_device


def transformers_of(pipe: Any) -> dict[str, Any]:
    """Expert name -> transformer of a diffusers pipeline."""
    names = ("transformer", "transformer_2")
    return {name: part for name in names if (part := getattr(pipe, name, None)) is not None}


@dataclass(frozen=True)
class Blocks:
    """One list of a transformer's blocks, for the step cache.

    path: dotted, from the transformer. returns: the streams that a block returns, in order:
    `hidden`, and `text` where it changes the text tokens as well. A block takes them as
    `hidden_states` and `encoder_hidden_states`, by name or as its first arguments.
    """

    path: str = "blocks"
    returns: tuple[str, ...] = ("hidden",)


def layout_of(transformer: nn.Module, blocks: str | None = None) -> tuple[Blocks, ...]:
    """The block lists of a transformer, in the order in which they run: those that its family's
    file describes (subclasses count), or the one named by a dotted path.
    """
    if blocks is not None:
        return (Blocks(blocks),)
    known = layouts()
    for cls in type(transformer).__mro__:
        if cls.__name__ in known:
            return known[cls.__name__]
    raise DitcacheError(
        f"enable_cache: {type(transformer).__name__} is not a model ditcache knows. "
        f"{one_of(type(transformer).__name__, known)}; or name its block list: "
        "enable_cache(..., blocks='path.to.blocks')"
    )


@cache
def layouts() -> dict[str, tuple[Blocks, ...]]:
    """Transformer class -> its block lists, from every file beside this one."""
    found: dict[str, tuple[Blocks, ...]] = {}
    for module in iter_modules([str(Path(__file__).parent)]):
        found |= getattr(import_module(f"ditcache.models.{module.name}"), "LAYOUTS", {})
    return found
