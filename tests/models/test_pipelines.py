"""diffusers' own pipelines around the models of test_layouts, as they come; text as embeddings."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler
from test_layouts import MODELS

import ditcache

STEPS, BOTH = 6, ("cond", "uncond")
SEED = torch.Generator().manual_seed(0)
TEXT, POOLED = (torch.randn(shape, generator=SEED) for shape in ((1, 5, 24), (1, 12)))
MASK = torch.ones(1, 5)


def image_vae(channels):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
    )


def flux():
    pipe = diffusers.FluxPipeline(Scheduler(), image_vae(2), None, None, None, None, model("flux"))
    return pipe, {"prompt_embeds": TEXT, "pooled_prompt_embeds": POOLED}, ("cond",)


def flux_with_guidance():
    pipe, settings, _ = flux()
    negative = {"negative_prompt_embeds": -TEXT, "negative_pooled_prompt_embeds": -POOLED}
    return pipe, {**settings, **negative, "true_cfg_scale": 3.0}, BOTH


def sd3():
    """Both branches are one call with a batch of two."""
    parts = [model("sd3"), Scheduler(), image_vae(4), *[None] * 6]
    settings = {"prompt_embeds": TEXT, "pooled_prompt_embeds": POOLED, "guidance_scale": 4.0}
    negative = {"negative_prompt_embeds": -TEXT, "negative_pooled_prompt_embeds": -POOLED}
    return diffusers.StableDiffusion3Pipeline(*parts), {**settings, **negative}, ("cond",)


def hunyuan():
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    parts = [None, None, model("hunyuan"), vae, Scheduler(), None, None]
    settings = {
        "prompt_embeds": TEXT,
        "pooled_prompt_embeds": POOLED,
        "prompt_attention_mask": MASK,
        "negative_prompt_embeds": -TEXT,
        "negative_pooled_prompt_embeds": -POOLED,
        "negative_prompt_attention_mask": MASK,
        "true_cfg_scale": 3.0,
        "num_frames": 5,
        "height": 32,
        "width": 32,
    }
    return diffusers.HunyuanVideoPipeline(*parts), settings, BOTH


def qwen():
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=2,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 2,
        latents_std=[1.0] * 2,
    )
    settings = {
        "prompt_embeds": TEXT,
        "prompt_embeds_mask": MASK.long(),
        "negative_prompt_embeds": -TEXT,
        "negative_prompt_embeds_mask": MASK.long(),
        "true_cfg_scale": 3.0,
    }
    return diffusers.QwenImagePipeline(Scheduler(), vae, None, None, model("qwen")), settings, BOTH


def model(name):
    torch.manual_seed(0)
    return MODELS[name]()[0].eval()


PIPELINES = [flux, flux_with_guidance, sd3, hunyuan, qwen]


@pytest.mark.parametrize("make", PIPELINES, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_as_they_come(make):
    pipe, settings, branches = make()
    pipe.set_progress_bar_config(disable=True)

    def video():
        return pipe(
            num_inference_steps=STEPS,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **{"height": 16, "width": 16, **settings},
        )[0]

    plain = video()
    for policy in ("fbcache", "easycache"):
        cache = ditcache.enable_cache(pipe, policy, threshold=0.0, granularity="stack")
        for _ in range(2):
            assert torch.equal(video(), plain)
        calls = [(d.step, d.branch) for d in cache.trace.decisions if d.unit == 0]
        assert calls == [(step, branch) for step in range(STEPS) for branch in branches]
        ditcache.disable_cache(pipe)
    cache = ditcache.enable_cache(pipe, "interval", every=2, head=1)
    first = video()
    assert torch.equal(video(), first) and not torch.equal(first, plain)
    assert (first - plain).norm() < 0.2 * plain.norm()
    skipped = {d.step for d in cache.trace.decisions if not d.computed}
    assert skipped == {1, 3} and cache.store.stats()["bytes"] == 0
    ditcache.disable_cache(pipe)
    assert torch.equal(video(), plain)
