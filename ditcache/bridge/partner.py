"""The other model of a pair. Does not import torch."""

from __future__ import annotations

from omegaconf import OmegaConf

from ditcache.bridge.fusion import Fusion
from ditcache.bridge.refuse import CHRONO_FRAMES
from ditcache.config import build, load_yaml
from ditcache.models.base import Model
from ditcache.models.chronoedit import ChronoEdit

BELONGS = {
    "zoo:wan-i2v-tiny": "tiny_chronoedit",
    "zoo:chronoedit-tiny": "tiny_i2v",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "chronoedit",
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": "chronoedit",
    "nvidia/ChronoEdit-14B-Diffusers": "wan2.1_i2v_720p",
}


def side_of(model: Model) -> str:
    return "chrono" if isinstance(model, ChronoEdit) else "wan"


def load_partner(model: Model, option: str | None, path: str | None) -> Model:
    """The other model's settings. Raises ValueError where it is not known."""
    option = option or BELONGS.get(model.path)
    if option is None:
        raise ValueError(
            f"partner: which model goes with {model.path}? Set partner=<option of model>"
        )
    node = OmegaConf.create({"model": load_yaml("model", option)})
    if path is not None:
        node.model.path = path
    node.model.device = model.device
    return build(node, "model", Model)


def check_two(model: Model, other: Model, num_frames: int, fusion: Fusion) -> None:
    """Raises ValueError for two models that are no pair, or a length that ChronoEdit never saw."""
    if side_of(model) == side_of(other):
        raise ValueError(
            f"partner: {other.path} and {model.path} are both on the {side_of(model)} side; a pair "
            "is one Wan image-to-video model and one ChronoEdit"
        )
    for one in (model, other):
        if not one.needs_image:
            raise ValueError(
                f"model: {one.path} takes no picture, ChronoEdit does; use an image-to-video model"
            )
    latent_frames = (num_frames - 1) // 4 + 1
    allowed = latent_frames in CHRONO_FRAMES or fusion.allow_out_of_range
    if not allowed and fusion.source_frames != "ends":
        raise ValueError(
            f"num_frames: {num_frames} is {latent_frames} latent frames, and ChronoEdit was "
            "trained on 2 or 8; use 5 or 29, or fusion.allow_out_of_range=true"
        )


def model_option(model: Model) -> str:
    """Its option of conf/model, or the first that loads such a pipeline."""
    from ditcache.cli import options

    nodes = {name: load_yaml("model", name) for name in options("model")}
    cls = f"{type(model).__module__}.{type(model).__qualname__}"
    same = [name for name, node in nodes.items() if node.path == model.path]
    kind = [name for name, node in nodes.items() if node._target_ == cls]
    return (same or kind or ["wan"])[0]
