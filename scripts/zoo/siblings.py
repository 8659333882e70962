"""What the zoo's other members are fine-tuned on. Letters: N clips, T latent frames, L tokens.

wan22: wan-tiny's own clips; each expert sees its own noise range. i2v: the same clips with the
first picture as condition. chronoedit: an object that stays where it is and turns into another
colour or shape; either the pictures before and after alone (two latent frames) or with the way
between them (eight).
"""

import math
from dataclasses import dataclass
from inspect import signature

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ChronoEditTransformer3DModel, WanTransformer3DModel
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from ditcache.clips import world
from ditcache.clips.edits import render_edit
from zoo import dit, vae

BOUNDARY = 0.875  # of the noise range: above it the high-noise expert works
RANGES = {"wan22-high": (BOUNDARY, 1.0), "wan22-low": (0.0, BOUNDARY)}
EDIT_FRAMES = 5
PICTURE_SIDE, PICTURE_TOKENS, PICTURE_DIM = 32, 17, 48  # of what the image encoder sees and says
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Clips:
    """Training data in memory.

    latents fp16 [N, 16, T, 8, 8], normalised; tokens [N, L]; condition fp16 [N, 16, T, 8, 8]: of
    the first picture and grey; pictures uint8 [N, 64, 64, 3]. Without a picture the last two are
    None.
    """

    latents: torch.Tensor
    tokens: torch.Tensor
    condition: torch.Tensor | None = None
    pictures: torch.Tensor | None = None


def draw_sigma(rng: np.random.Generator, count: int, low: float, high: float) -> torch.Tensor:
    """wan-tiny's own distribution, within a range."""
    found = torch.zeros(0)
    while len(found) < count:
        drawn = dit.draw_sigma(rng, 8 * count)
        found = torch.cat([found, drawn[(drawn >= low) & (drawn <= high)]])
    return found[:count]


@torch.no_grad()
def encode(autoencoder, clips: np.ndarray) -> torch.Tensor:
    """uint8 [N, T, H, W, 3] -> normalised latents, as diffusers' pipelines make them."""
    return encode_video(autoencoder, vae.to_video(clips))


@torch.no_grad()
def encode_picture(autoencoder, picture: np.ndarray, num_frames: int) -> torch.Tensor:
    """The condition's latents: a picture uint8 [H, W, 3], then grey."""
    video = torch.zeros(1, 3, num_frames, *picture.shape[:2])
    video[:, :, 0] = vae.to_video(picture[None, None])[:, :, 0]
    return encode_video(autoencoder, video)


def encode_video(autoencoder, video: torch.Tensor) -> torch.Tensor:
    """Frames [B, 3, T, H, W] in -1..1 -> latents with mean 0 and standard deviation 1."""
    mean, spread = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
    )
    return (vae.encode(autoencoder, video)[0] - mean) / spread


def edit_latents(autoencoder, before: world.Scene, after: world.Scene, *, reasoning: bool):
    """Latents [1, 16, 2 or 8, 8, 8]: the last frame is that of the edited picture."""
    way = render_edit(before, after)
    pair = np.concatenate([way[:1], np.repeat(way[-1:], 4, 0)])
    ends = encode(autoencoder, pair[None])
    return torch.cat([encode(autoencoder, way[None]), ends[:, :, 1:]], 2) if reasoning else ends


def mask(frames: int) -> torch.Tensor:
    """The condition's mask [1, 4, T, 8, 8]: the first latent frame is known."""
    known = torch.zeros(1, 4, frames, 8, 8)
    known[:, :, 0] = 1
    return known


def make_image_encoder() -> CLIPVisionModel:
    """Random weights, two layers; trained with the image-to-video member, then frozen."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=PICTURE_DIM,
            intermediate_size=2 * PICTURE_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=PICTURE_SIDE,
            patch_size=8,
            projection_dim=PICTURE_DIM,
        )
    )


def make_image_processor() -> CLIPImageProcessor:
    side = {"height": PICTURE_SIDE, "width": PICTURE_SIDE}
    return CLIPImageProcessor(size={"shortest_edge": PICTURE_SIDE}, crop_size=side)


class PictureAttention(dit.TrainingAttention):
    """As the base's, with the picture's tokens in front of the text's; they have keys and values of
    their own and share nothing with the caption but the query.
    """

    def __call__(
        self, attn, hidden_states, encoder_hidden_states, attention_mask=None, rotary_emb=None
    ):
        if attn.add_k_proj is None or encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, None, rotary_emb)
        picture = encoder_hidden_states[:, :PICTURE_TOKENS]
        caption = encoder_hidden_states[:, PICTURE_TOKENS:]
        query = attn.norm_q(attn.to_q(hidden_states))
        mixed = [
            attend(
                attn, query, attn.norm_added_k(attn.add_k_proj(picture)), attn.add_v_proj(picture)
            ),
            attend(attn, query, attn.norm_k(attn.to_k(caption)), attn.to_v(caption), self.bias),
        ]
        return attn.to_out[0](mixed[0] + mixed[1])


def attend(attn, query, key, value, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
    query, key, value = (
        x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + bias
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2, 3)


class PictureDenoiser(nn.Module):
    """The base's transformer with 20 more input channels and picture tokens, and the encoder that
    makes those.
    """

    def __init__(self, base: dit.Denoiser, *, chronoedit: bool):
        super().__init__()
        kind = ChronoEditTransformer3DModel if chronoedit else WanTransformer3DModel
        self.transformer = make_picture_transformer(base.transformer, kind)
        self.image_encoder = make_image_encoder()
        self.text_encoder = base.text_encoder  # frozen, shared
        self.text_states = base.text_states

    def use_training_attention(self) -> PictureAttention:
        return dit.set_attention(self.transformer, PictureAttention())

    def picture_states(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 64, 64, 3] -> [B, 17, 48], what the pipelines take from the image encoder."""
        pixels = pictures.permute(0, 3, 1, 2).float() / 255
        pixels = F.interpolate(pixels, PICTURE_SIDE, mode="bicubic", antialias=True).clamp(0, 1)
        mean, spread = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        states = self.image_encoder((pixels - mean) / spread, output_hidden_states=True)
        return states.hidden_states[-2]


def make_picture_transformer(base: WanTransformer3DModel, kind: type):
    """Starts as the base: new input channels are zero, and so is what picture tokens add."""
    config = {name: base.config[name] for name in base.config if not name.startswith("_")}
    width = base.config.num_attention_heads * base.config.attention_head_dim
    config |= {"in_channels": 36, "image_dim": PICTURE_DIM, "added_kv_proj_dim": width}
    model = kind(**{k: v for k, v in config.items() if k in signature(kind.__init__).parameters})
    weights = base.state_dict()
    patches = torch.zeros_like(model.patch_embedding.weight)
    patches[:, :16] = weights["patch_embedding.weight"]
    model.load_state_dict({**weights, "patch_embedding.weight": patches}, strict=False)
    for block in model.blocks:
        nn.init.zeros_(block.attn2.add_v_proj.weight)
        nn.init.zeros_(block.attn2.add_v_proj.bias)
    return model


def picture_loss(
    model: PictureDenoiser,
    attention: PictureAttention,
    clips: Clips,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    sigma: torch.Tensor,
    padded_to: torch.Tensor,
) -> torch.Tensor:
    """`dit.flow_loss` with a condition."""
    attention.bias = dit.padding_bias(tokens, padded_to)
    latents, condition = clips.latents[rows].float(), clips.condition[rows].float()
    noise = torch.randn_like(latents)
    level = sigma[:, None, None, None, None]
    noisy = (1 - level) * latents + level * noise
    known = mask(latents.shape[2]).expand(len(rows), -1, -1, -1, -1)
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity = model.transformer(
            torch.cat([noisy, known, condition], 1),
            sigma * 1000,
            model.text_states(tokens),
            model.picture_states(clips.pictures[rows]),
            return_dict=False,
        )[0]
    return F.mse_loss(velocity.float(), noise - latents)
