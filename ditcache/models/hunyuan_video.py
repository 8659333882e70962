"""HunyuanVideo (arXiv:2412.03603): text to video. Two streams, then blocks that join them."""

from ditcache.models.base import Blocks

LAYOUTS = {
    "HunyuanVideoTransformer3DModel": (
        Blocks("transformer_blocks", ("hidden", "text")),
        Blocks("single_transformer_blocks", ("hidden", "text")),
    ),
}
