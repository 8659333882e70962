"""Keys and values of a transformer's self-attention: taken out, and others' fused in.

Letters: B batch, N tokens, H heads, D head size. Keys are those before the rotary embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditcache.bridge.fusion import Fusion
from ditcache.bridge.nets import KeyValues, Net
from ditcache.bridge.projectors.base import Shape
from ditcache.errors import DitcacheError
from ditcache.models.attention import Rotary, open_self_attention, rotate, rotated


@dataclass
class Seen:
    """What a transformer is called with.

    latents [B, C, T, H, W]: noisy channels, then those of the condition. timestep [B], 1000 sigma.
    text [B, L, D]. image [B, M, D], for those that have an image encoder.
    """

    latents: Tensor
    timestep: Tensor
    text: Tensor
    image: Tensor | None = None

    @property
    def sigma(self) -> Tensor:
        return self.timestep.float() / 1000

    def call(self, transformer: nn.Module) -> Tensor:
        """velocity [B, 16, T, H, W]"""
        extra = {} if self.image is None else {"encoder_hidden_states_image": self.image}
        return transformer(
            hidden_states=self.latents,
            timestep=self.timestep,
            encoder_hidden_states=self.text,
            return_dict=False,
            **extra,
        )[0]


def told_apart(
    texts: Mapping[str, Tensor], args: tuple, kwargs: Mapping[str, Any]
) -> tuple[str, Seen]:
    """Branch and inputs of a forward of a transformer, without its image. texts: branch -> the very
    tensor that is read in it. Raises DitcacheError.
    """
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    latents, timestep, text = (inputs[name] for name in names)
    branch = next((name for name, own in texts.items() if own is text), None)
    if branch is None:
        raise DitcacheError(
            "bridge: this forward reads a text that is neither branch's; give `attached` the very "
            "tensors that the transformer is called with"
        )
    if timestep.dim() != 1:
        raise DitcacheError("bridge: models with a timestep per token are not supported")
    return branch, Seen(latents, timestep, text)


def shape_of(transformer: nn.Module) -> Shape:
    """Of its self-attention."""
    config: Any = transformer.config
    return Shape(config.num_layers, config.num_attention_heads, config.attention_head_dim)


def capture(transformer: nn.Module, seen: Seen) -> tuple[Tensor, list[KeyValues]]:
    """Velocity, and each block's keys and values. Bit for bit the velocity of a plain call."""
    found: dict[int, KeyValues] = {}
    with capturing(transformer, found.__setitem__):
        velocity = seen.call(transformer)
    return velocity, [found[layer] for layer in sorted(found)]


@contextmanager
def capturing(transformer: nn.Module, keep: Callable[[int, KeyValues], None]) -> Iterator[None]:
    """Within, `keep(layer, (key, value))` gets what each block computes."""

    def key_value(layer: int) -> Any:
        def look(key: Tensor, value: Tensor, rotary: Rotary) -> KeyValues:
            keep(layer, (key, value))
            return rotated(key, value, rotary)

        return look

    with open_self_attention(transformer, key_value):
        yield


@contextmanager
def fusing(transformer: nn.Module, fused: Callable[[int, KeyValues], KeyValues]) -> Iterator[None]:
    """Within, each block attends to `fused(layer, (key, value))` in place of its own."""

    def key_value(layer: int) -> Any:
        def fuse_one(key: Tensor, value: Tensor, rotary: Rotary) -> KeyValues:
            key, value = fused(layer, (key, value))
            return rotate(key, rotary), value

        return fuse_one

    with open_self_attention(transformer, key_value):
        yield


def fuse(
    fusion: Fusion,
    layer: int,
    target: KeyValues,
    sources: Mapping[str, tuple[Net, KeyValues | None]],
    time: Tensor,
    frames: int,
) -> KeyValues:
    """One layer's keys and values to attend to. sources: by name, each a projector and this layer's
    keys and values, or None where it has nothing to say. time [B]: sigma. frames: of the target's
    latents.

    Several sources add what each would change by itself, in the order of their names, so that the
    order in which they were given does not matter.
    """
    changed = [
        within_frames(fusion, net, layer, keys_values, target, time, frames)
        for _, (net, keys_values) in sorted(sources.items(), key=lambda item: item[0])
        if keys_values is not None
    ]
    if not changed:
        return target
    key, value = (
        changed[0][i]
        if len(changed) == 1
        else target[i] + torch.stack([c[i] - target[i] for c in changed]).sum(0)
        for i in (0, 1)
    )
    return (resized(key, target[0]) if fusion.renorm_k else key), value


def within_frames(
    fusion: Fusion,
    net: Net,
    layer: int,
    source: KeyValues,
    target: KeyValues,
    time: Tensor,
    frames: int,
) -> KeyValues:
    """One source's fusion, only in the latent frames that it reaches."""
    chosen = reached(fusion, frames)
    if chosen is None:
        check_tokens(source[0], target[0])
        return net(layer, source, target, time)
    here = [x.unflatten(1, (frames, -1)) for x in target]
    there = [x.unflatten(1, (len(chosen) if ends(fusion) else frames, -1)) for x in source]
    picked = [x if ends(fusion) else x[:, chosen] for x in there]
    own = (here[0][:, chosen].flatten(1, 2), here[1][:, chosen].flatten(1, 2))
    other = (picked[0].flatten(1, 2), picked[1].flatten(1, 2))
    check_tokens(other[0], own[0])
    fused = net(layer, other, own, time)
    key, value = (x.clone() for x in here)
    for whole, part in ((key, fused[0]), (value, fused[1])):
        whole[:, chosen] = part.unflatten(1, (len(chosen), -1))
    return key.flatten(1, 2), value.flatten(1, 2)


def ends(fusion: Fusion) -> bool:
    return fusion.source_frames == "ends"


def reached(fusion: Fusion, frames: int) -> list[int] | None:
    """Latent frames that are fused; None for all of them."""
    if ends(fusion) and frames > 2:
        return [0, frames - 1]
    return list(range(frames - 1)) if fusion.leave_last_frame else None


def check_tokens(source: Tensor, target: Tensor) -> None:
    if source.shape[:2] != target.shape[:2]:
        raise DitcacheError(
            f"bridge: the source has {source.shape[1]} tokens in a batch of {source.shape[0]}, the "
            f"target {target.shape[1]} in {target.shape[0]}; both must see the same latent grid"
        )


def resized(key: Tensor, like: Tensor) -> Tensor:
    """Keys with the root mean square of `like` over all heads, per token."""
    size, wanted = (x.float().square().mean((2, 3), keepdim=True).sqrt() for x in (key, like))
    return (key * (wanted / size.clamp_min(1e-12)).to(key.dtype)).type_as(key)
