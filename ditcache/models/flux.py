"""Flux (Black Forest Labs): text to image. Two streams, then blocks that join them."""

from ditcache.models.base import Blocks

LAYOUTS = {
    "FluxTransformer2DModel": (
        Blocks("transformer_blocks", ("text", "hidden")),
        Blocks("single_transformer_blocks", ("text", "hidden")),
    ),
}
