"""LongCat-Image (Meituan): text to image and editing, laid out like Flux."""

from ditcache.models.base import Blocks

LAYOUTS = {
    "LongCatImageTransformer2DModel": (
        Blocks("transformer_blocks", ("text", "hidden")),
        Blocks("single_transformer_blocks", ("text", "hidden")),
    ),
}
