"""Random-weight pipelines in the exact layout of the big checkpoints: two experts, image
conditioning, ChronoEdit.
"""

from pathlib import Path

import diffusers
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from zoo import text, vae


def small_transformer(
    cls: str = "WanTransformer3DModel", in_channels: int = 16, image_dim: int | None = None
):
    return getattr(diffusers, cls)(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=in_channels,
        out_channels=16,
        text_dim=text.DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=64,
        image_dim=image_dim,
        added_kv_proj_dim=None if image_dim is None else 48,
    )


def save_all(root: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    tokenizer = text.make_tokenizer()
    shared = {
        "tokenizer": tokenizer,
        "text_encoder": text.make_text_encoder(len(tokenizer)),
        "vae": vae.make_vae(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }
    clip = {
        "image_encoder": CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                projection_dim=16,
            )
        ),
        "image_processor": CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    }
    pipelines = {
        "wan": diffusers.WanPipeline(**shared, transformer=small_transformer()),
        "wan2.2_t2v": diffusers.WanPipeline(
            **shared,
            transformer=small_transformer(),
            transformer_2=small_transformer(),
            boundary_ratio=0.875,
        ),
        "wan2.2_i2v": diffusers.WanImageToVideoPipeline(
            **shared,
            image_encoder=None,
            image_processor=None,
            transformer=small_transformer(in_channels=36),
            transformer_2=small_transformer(in_channels=36),
            boundary_ratio=0.9,
        ),
        "wan2.1_i2v_480p": diffusers.WanImageToVideoPipeline(
            **shared, **clip, transformer=small_transformer(in_channels=36, image_dim=16)
        ),
        "chronoedit": diffusers.ChronoEditPipeline(
            **shared, **clip, transformer=small_transformer("ChronoEditTransformer3DModel", 36, 16)
        ),
    }
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in pipelines}
