"""Stable Diffusion 3 (arXiv:2403.03206): text to image. The last block drops the text stream."""

from ditcache.models.base import Blocks

LAYOUTS = {
    "SD3Transformer2DModel": (Blocks("transformer_blocks", ("text", "hidden")),),
}
