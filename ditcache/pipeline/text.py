"""Prompts -> text embeddings, by the pipeline's own text encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditcache.models.base import Bundle

MAX_TOKENS = 512  # Wan pads every prompt to this length and attends to all of it


@dataclass
class TextStates:
    """cond, uncond: [1, 512, D] in the transformer's dtype; uncond is None without guidance."""

    cond: Tensor
    uncond: Tensor | None


@torch.no_grad()
def encode_text(
    bundle: Bundle, prompt: str, *, negative_prompt: str, guidance: float
) -> TextStates:
    """One prompt -> embeddings of both branches; the uncond branch exists only for guidance > 1."""
    cond, uncond = bundle.pipe.encode_prompt(
        prompt=prompt,
        negative_prompt=negative_prompt,
        do_classifier_free_guidance=guidance > 1.0,
        num_videos_per_prompt=1,
        max_sequence_length=MAX_TOKENS,
        device=bundle.device,
    )
    dtype = bundle.pipe.transformer.dtype
    return TextStates(cond.to(dtype), None if uncond is None else uncond.to(dtype))
