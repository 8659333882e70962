"""`cache=none` is diffusers, bit for bit: our loop against each pipeline's own."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import ditcache
from ditcache.pipeline.denoise import decode_latents, denoise
from ditcache.pipeline.inputs import draw_inputs
from ditcache.pipeline.text import encode_text

STEPS = 5


def ours(
    bundle, prompt, *, height, width, num_frames=5, seed=0, guidance=4.0, picture=None, **settings
):
    text = encode_text(bundle, prompt, negative_prompt="blurred", guidance=guidance)
    inputs = draw_inputs(
        bundle, text, height=height, width=width, num_frames=num_frames, seed=seed, picture=picture
    )
    return denoise(bundle, inputs, guidance=guidance, **{"steps": STEPS, **settings})


def theirs(
    bundle, prompt, *, height, width, num_frames=5, seed=0, guidance=4.0, picture=None, **settings
):
    if picture is not None:
        settings["image"] = picture
    return bundle.pipe(
        prompt=prompt,
        negative_prompt="blurred",
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **settings,
    )[0]


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize(
    "prompt", ["a red star moves left on a blue background", "a fox's tail (night), schön", "x"]
)
def test_equals_wan_pipeline(bundle, prompt, size):
    height, width = size
    for seed in (0, 7):
        a = ours(bundle, prompt, height=height, width=width, num_frames=17, seed=seed)
        b = theirs(bundle, prompt, height=height, width=width, num_frames=17, seed=seed)
        assert torch.equal(a, b)


def test_equals_wan_pipeline_without_guidance(bundle):
    a = ours(bundle, "a red star", height=64, width=64, guidance=1.0)
    assert torch.equal(a, theirs(bundle, "a red star", height=64, width=64, guidance=1.0))


def test_decoded_frames_equal_the_pipelines(bundle):
    latents = ours(bundle, "a red star", height=64, width=64)
    frames = bundle.pipe(
        prompt="a red star",
        negative_prompt="blurred",
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    assert np.array_equal(decode_latents(bundle, latents), frames)


def test_two_experts_with_their_own_guidance(checkpoints):
    bundle = ditcache.load(
        "wan2.2_t2v", path=str(checkpoints["wan2.2_t2v"]), dtype="float32", device="cpu"
    )
    a = ours(bundle, "a cat", height=32, width=48, guidance_low=3.0)
    b = theirs(bundle, "a cat", height=32, width=48, guidance_scale_2=3.0)
    assert torch.equal(a, b)


@pytest.mark.parametrize("model", ["wan2.1_i2v_480p", "wan2.2_i2v", "chronoedit"])
def test_image_conditioned(checkpoints, model):
    bundle = ditcache.load(model, path=str(checkpoints[model]), dtype="float32", device="cpu")
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    )
    settings = {"height": 32, "width": 48, "picture": picture, "guidance": 3.5}
    assert torch.equal(ours(bundle, "a cat", **settings), theirs(bundle, "a cat", **settings))


def test_shift_changes_the_result_and_does_not_stick(bundle):
    plain = ours(bundle, "a red star", height=64, width=64)
    shifted = ours(bundle, "a red star", height=64, width=64, shift=7.0)
    assert not torch.equal(plain, shifted)
    assert torch.equal(plain, ours(bundle, "a red star", height=64, width=64))


def test_callbacks_see_every_step_and_may_edit_latents(bundle):
    seen = []

    def edit(step):
        seen.append(
            (step.index, step.num_steps, step.expert, step.latents.shape == step.velocity.shape)
        )
        if step.index == STEPS - 1:
            step.latents = torch.zeros_like(step.latents)

    latents = ours(bundle, "a red star", height=64, width=64, callbacks=[edit])
    assert seen == [(i, STEPS, "transformer", True) for i in range(STEPS)]
    assert not latents.any()


FULL = {"interval": {"every": 1}, "taylorseer": {"every": 1}, "fbcache": {"threshold": 0.0}}
MODELS = ["wan", "wan2.2_t2v", "wan2.2_i2v", "wan2.1_i2v_480p", "chronoedit"]


@pytest.mark.parametrize("policy", FULL)
@pytest.mark.parametrize("model", MODELS)
def test_caches_are_exact_on_every_model(checkpoints, model, policy):
    """Nothing skipped and taken off again: equal. Something skipped: every expert skips."""
    bundle = ditcache.load(model, path=str(checkpoints[model]), dtype="float32", device="cpu")
    picture = Image.new("RGB", (48, 32), "red") if bundle.model.needs_image else None
    settings = {"height": 32, "width": 48, "picture": picture, "steps": 12}
    plain = ours(bundle, "a cat", **settings)
    for granularity in ("stack", "per_block", 2):
        ditcache.enable_cache(bundle, policy, granularity=granularity, **FULL[policy])
        assert torch.equal(ours(bundle, "a cat", **settings), plain)
        ditcache.disable_cache(bundle)
    skipping = {"threshold": 10.0, "max_skips": 1} if policy == "fbcache" else {"every": 2}
    cache = ditcache.enable_cache(bundle, policy, head=1, **skipping)
    skipped = ours(bundle, "a cat", **settings)
    ditcache.disable_cache(bundle)
    assert skipped.isfinite().all() and not torch.equal(skipped, plain)
    by_expert = {d.expert for d in cache.trace.decisions if not d.computed}
    assert by_expert == set(bundle.experts)
    assert torch.equal(ours(bundle, "a cat", **settings), plain)


@pytest.fixture(scope="module")
def per_token(checkpoints, tmp_path_factory):
    """A folder laid out like Wan2.2's TI2V 5B."""
    folder = tmp_path_factory.mktemp("ti2v")
    pipe = diffusers.WanPipeline.from_pretrained(checkpoints["wan"])
    pipe.register_to_config(expand_timesteps=True)
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model", ["wan2.2_ti2v", "wan2.2_ti2v_image"])
def test_one_timestep_per_token(per_token, model):
    bundle = ditcache.load(model, path=per_token, dtype="float32", device="cpu")
    picture = Image.linear_gradient("L").convert("RGB") if bundle.model.needs_image else None
    settings = {"height": 32, "width": 48, "picture": picture}
    plain = theirs(bundle, "a cat", **settings)
    assert torch.equal(ours(bundle, "a cat", **settings), plain)
    for policy, full in FULL.items():
        ditcache.enable_cache(bundle, policy, **full)
        assert torch.equal(ours(bundle, "a cat", **settings), plain)
        assert torch.equal(theirs(bundle, "a cat", **settings), plain)
        ditcache.disable_cache(bundle)
    cache = ditcache.enable_cache(bundle, "interval", every=2, head=1)
    skipped = ours(bundle, "a cat", **settings)
    assert torch.equal(theirs(bundle, "a cat", **settings), skipped)
    ditcache.disable_cache(bundle)
    assert [d.computed for d in cache.trace.decisions if d.branch == "cond"].count(False) == 2
    assert (skipped - plain).norm() < plain.norm()
    if picture is not None:  # the first frame is the picture's, whatever is skipped
        assert torch.equal(skipped[:, :, 0], plain[:, :, 0])


@pytest.mark.parametrize("reasoning", [1, 3, STEPS, STEPS + 1])
def test_temporal_reasoning(checkpoints, reasoning):
    bundle = ditcache.load(
        "chronoedit",
        path=str(checkpoints["chronoedit"]),
        dtype="float32",
        device="cpu",
        reasoning_steps=reasoning,
    )
    settings = {"height": 32, "width": 48, "num_frames": 29, "picture": Image.new("RGB", (48, 32))}
    way = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": reasoning}
    plain = theirs(bundle, "a cat", **settings, **way)
    latents = ours(bundle, "a cat", **settings)
    assert torch.equal(latents, plain)
    assert latents.shape[2] == (2 if reasoning < STEPS else 8)
    assert len(decode_latents(bundle, latents)) == (5 if reasoning < STEPS else 29)
    for policy, full in FULL.items():
        ditcache.enable_cache(bundle, policy, **full)
        assert torch.equal(ours(bundle, "a cat", **settings), plain)
        ditcache.disable_cache(bundle)
    cache = ditcache.enable_cache(bundle, "interval", every=STEPS, head=1, tail=0)
    assert ours(bundle, "a cat", **settings).isfinite().all()
    ditcache.disable_cache(bundle)
    computed = {(d.step, d.reason) for d in cache.trace.decisions if d.computed}
    assert computed == {(0, "first"), *([(reasoning, "shape")] if reasoning < STEPS else [])}


def test_reasoning_frames_decode_as_the_pipelines(checkpoints):
    bundle = ditcache.load(
        "chronoedit",
        path=str(checkpoints["chronoedit"]),
        dtype="float32",
        device="cpu",
        reasoning_steps=STEPS,
    )
    settings = {"height": 32, "width": 48, "num_frames": 29, "picture": Image.new("RGB", (48, 32))}
    frames = bundle.pipe(
        prompt="a cat",
        negative_prompt="blurred",
        image=settings["picture"],
        height=32,
        width=48,
        num_frames=29,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        enable_temporal_reasoning=True,
        num_temporal_reasoning_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    assert np.array_equal(decode_latents(bundle, ours(bundle, "a cat", **settings)), frames)
