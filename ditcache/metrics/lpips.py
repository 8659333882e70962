"""Learned perceptual image patch similarity (Zhang et al. 2018, https://arxiv.org/abs/1801.03924),
AlexNet variant, version 0.1. Importing this imports torch. Downloads nothing: the weights are two
published files the user has, torchvision's AlexNet and the authors' linear heads.

N frames, C channels, H height, W width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import conv2d, max_pool2d, relu

from ditcache.errors import first_line
from ditcache.metrics.pair import check_pair

# AlexNet as torchvision numbers it: (name, [out, in, kernel, kernel], stride, padding, pool before)
LAYERS: list[tuple[str, tuple[int, ...], int, int, bool]] = [
    ("features.0", (64, 3, 11, 11), 4, 2, False),
    ("features.3", (192, 64, 5, 5), 1, 2, True),
    ("features.6", (384, 192, 3, 3), 1, 1, True),
    ("features.8", (256, 384, 3, 3), 1, 1, False),
    ("features.10", (256, 256, 3, 3), 1, 1, False),
]
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"{name}.weight": shape for name, shape, *_ in LAYERS},
    **{f"{name}.bias": shape[:1] for name, shape, *_ in LAYERS},
    **{f"lin{i}.model.1.weight": (1, layer[1][0], 1, 1) for i, layer in enumerate(LAYERS)},
}
# The authors' input normalisation, for pixels in -1..1.
SHIFT = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
SCALE = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
SMALLEST = 31  # pixels a side that leave one after two poolings
SUFFIXES = (".safetensors", ".pth", ".pt")


def lpips(reference: np.ndarray, candidate: np.ndarray, weights: str | Path) -> float:
    """Mean over frames, float32 on the CPU, one frame at a time; 0 for equal videos, no unit.

    reference, candidate: [T, H, W, 3] in 0..1, at least 31 pixels a side. weights: see
    `load_weights`. Raises ValueError otherwise.
    """
    return float(np.mean(lpips_per_frame(reference, candidate, weights)))


@torch.no_grad()
def lpips_per_frame(
    reference: np.ndarray, candidate: np.ndarray, weights: str | Path
) -> list[float]:
    """One value per frame; their mean is the LPIPS of the video."""
    check_pair("lpips", reference, candidate)
    if min(reference.shape[1:3]) < SMALLEST:
        raise ValueError(
            f"lpips: frames must be at least {SMALLEST} pixels a side, got {reference.shape[1:3]}"
        )
    known = load_weights(weights)
    return [
        distance(to_tensor(a), to_tensor(b), known)
        for a, b in zip(reference, candidate, strict=True)
    ]


def distance(a_NCHW: torch.Tensor, b_NCHW: torch.Tensor, known: dict[str, torch.Tensor]) -> float:
    """Squared differences of unit-length features, weighted per channel, averaged over positions,
    summed over layers.
    """
    total = 0.0
    for i, (a, b) in enumerate(zip(features(a_NCHW, known), features(b_NCHW, known), strict=True)):
        total += conv2d((a - b) ** 2, known[f"lin{i}.model.1.weight"]).mean().item()
    return total


def features(pixels_NCHW: torch.Tensor, known: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """pixels in 0..1 -> five [N, C, H, W], each position's channels scaled to length 1."""
    x = (2 * pixels_NCHW - 1 - SHIFT) / SCALE
    found = []
    for name, _, stride, padding, pool in LAYERS:
        x = max_pool2d(x, kernel_size=3, stride=2) if pool else x
        weight, bias = known[f"{name}.weight"], known[f"{name}.bias"]
        x = relu(conv2d(x, weight, bias, stride=stride, padding=padding))
        found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
    return found


def to_tensor(frame: np.ndarray) -> torch.Tensor:
    """[H, W, 3] -> float32 [1, 3, H, W]."""
    return torch.from_numpy(frame.astype(np.float32).transpose(2, 0, 1)[None])


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """`features.{0,3,6,8,10}.{weight,bias}` and `lin{0..4}.model.1.weight` in float32, from one
    safetensors or weights-only .pth file, or from all of them in a folder; other keys are left out.

    Raises ValueError if a file or key is missing, there twice, unreadable or of the wrong shape.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise ValueError(f"lpips: no file or folder {place}; give its weights or leave it null")
    inside = sorted(place.iterdir()) if place.is_dir() else [place]
    origin: dict[str, Path] = {}
    known: dict[str, torch.Tensor] = {}
    for file in (file for file in inside if file.suffix in SUFFIXES or file == place):
        for key, tensor in read(file).items():
            if key not in SHAPES:
                continue
            if key in known:
                raise ValueError(f"lpips: {key} is in {origin[key]} and in {file}; keep one")
            if tuple(tensor.shape) != SHAPES[key]:
                raise ValueError(
                    f"lpips: {key} in {file} is {tuple(tensor.shape)}, AlexNet's is {SHAPES[key]}"
                )
            known[key], origin[key] = tensor.float(), file
    missing = [key for key in SHAPES if key not in known]
    if missing:
        raise ValueError(
            f"lpips: {place} lacks {len(missing)} of {len(SHAPES)} tensors, first {missing[0]}; "
            "needs torchvision's AlexNet (features.*) and LPIPS 0.1's alex heads (lin*.model.1.*)"
        )
    return known


def read(file: Path) -> dict[str, Any]:
    """Tensors by name; nothing in the file is executed."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file makes the unpickler raise nearly anything
        raise ValueError(f"lpips: cannot read {file}: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"lpips: {file} holds a {type(content).__name__}, not named tensors")
    return content
