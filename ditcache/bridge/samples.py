"""Clips as both models take them, in memory and as a file. Letters: N clips, C channels, T latent
frames, H W latent sides, L text tokens, M image tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditcache.bridge.data.base import SPLITS
from ditcache.bridge.fingerprint import fingerprint
from ditcache.errors import ConfigError, first_line
from ditcache.files import complete_file
from ditcache.models.base import Bundle

FORMAT = "ditcache bridge clips 1"


@dataclass
class Caption:
    """What one side reads and sees of N clips.

    text [N, L, D] without the rows of zeros that Wan pads to `padded_to` with; lengths [N]: rows of
    each that are its own. image [N, M, D] or None.
    """

    text: Tensor
    lengths: Tensor
    image: Tensor | None
    padded_to: int

    def at(self, rows: Tensor) -> Caption:
        image = None if self.image is None else self.image[rows]
        return Caption(self.text[rows], self.lengths[rows], image, self.padded_to)


@dataclass
class Samples:
    """latents fp16 [N, C, T, H, W], normalised. condition fp16 [N, 20, T, H, W]. domain, split [N]:
    index into `domains` and SPLITS. sides: `wan` and `chrono`. empty: what the uncond branch reads,
    N = 1, without image.
    """

    latents: Tensor
    condition: Tensor
    domain: Tensor
    split: Tensor
    domains: list[str]
    sides: dict[str, Caption]
    empty: dict[str, Caption]

    def rows(self, split: str, domain: str | None = None) -> Tensor:
        """Indices of a split's clips, of one domain or of all."""
        chosen = self.split == SPLITS.index(split)
        if domain is not None:
            chosen &= self.domain == self.domains.index(domain)
        return chosen.nonzero().flatten()


def save_samples(samples: Samples, path: Path, models: Mapping[str, str]) -> None:
    """models: side -> fingerprint of the model whose embeddings these are."""
    tensors = {name: getattr(samples, name) for name in ("latents", "condition", "domain", "split")}
    for part, captions in (("sides", samples.sides), ("empty", samples.empty)):
        for side, caption in captions.items():
            tensors[f"{part}.{side}.text"] = caption.text
            tensors[f"{part}.{side}.lengths"] = caption.lengths
            if caption.image is not None:
                tensors[f"{part}.{side}.image"] = caption.image
    about = {
        "format": FORMAT,
        "domains": samples.domains,
        "padded_to": {side: caption.padded_to for side, caption in samples.sides.items()},
        "models": dict(models),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as partial:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, {"ditcache": json.dumps(about)})


def load_samples(path: Path, bundles: Mapping[str, Bundle]) -> Samples:
    """Raises ConfigError for a file of another kind, or one made with other models."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("ditcache", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"data.path: cannot read {path}: {first_line(error)}") from None
    if about.get("format") != FORMAT:
        raise ConfigError(f"data.path: {path} holds no clips of bridge-train")
    for side, bundle in bundles.items():
        if about["models"].get(side) != fingerprint(bundle.pipe.transformer):
            raise ConfigError(
                f"data.path: {path} was made with another {side} model than {bundle.model.path}"
            )
    sides: dict[str, dict[str, Caption]] = {"sides": {}, "empty": {}}
    for part, captions in sides.items():
        for side, padded_to in about["padded_to"].items():
            own = f"{part}.{side}"
            captions[side] = Caption(
                tensors[f"{own}.text"],
                tensors[f"{own}.lengths"],
                tensors.get(f"{own}.image"),
                padded_to,
            )
    return Samples(
        latents=tensors["latents"],
        condition=tensors["condition"],
        domain=tensors["domain"],
        split=tensors["split"],
        domains=about["domains"],
        sides=sides["sides"],
        empty=sides["empty"],
    )


def cached(
    folder: Path | None,
    bundles: Mapping[str, Bundle],
    parts: Mapping[str, Any],
    make: Callable[[], Samples],
) -> Samples:
    """`make()`, or what it made in an earlier run with the same `parts` and models."""
    if folder is None:
        return make()
    models = {side: fingerprint(bundle.pipe.transformer) for side, bundle in bundles.items()}
    key = hashlib.sha256(json.dumps([FORMAT, parts, models], sort_keys=True).encode())
    path = folder / f"clips-{key.hexdigest()[:12]}.safetensors"
    if not path.is_file():
        save_samples(make(), path, models)
    return load_samples(path, bundles)


def trimmed(states: Tensor) -> tuple[Tensor, int]:
    """text [1, L, D] -> without trailing rows of zeros, and how many rows that leaves."""
    used = states[0].abs().sum(-1).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return states[0, :length], length


def stacked(texts: list[Tensor]) -> Tensor:
    """Texts [L_i, D] -> [N, L, D], zeros behind the shorter ones."""
    longest = max(len(text) for text in texts)
    wide = texts[0].new_zeros(len(texts), longest, texts[0].shape[1])
    for row, text in zip(wide, texts, strict=True):
        row[: len(text)] = text
    return wide
