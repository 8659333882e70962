"""Qwen-Image (arXiv:2508.02324): text to image and editing. Two streams throughout."""

from ditcache.models.base import Blocks

LAYOUTS = {
    "QwenImageTransformer2DModel": (Blocks("transformer_blocks", ("text", "hidden")),),
}
